"""What `inferno doctor` says of real Redis servers, well and badly configured."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Thread

import pytest

from inferno.errors import ConfigurationError
from inferno.operate import doctor
from inferno.operate.doctor import Finding
from inferno.operate.embedded_redis import prepare
from inferno.operate.ports import free_port
from inferno.operate.redis_program import find_program
from inferno.operate.redis_status import RedisStatus, ask
from inferno.settings import RedisSettings, Settings
from inferno.testing.processes import process, wait_until

Start = Callable[..., str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a server with further options, behind a prefix of the command; returns its URL."""
    with ExitStack() as stack:

        def start(*options: str, prefix: str = "", password: str = "") -> str:
            port = str(free_port())
            given = ["--port", port, "--bind", "127.0.0.1", "--dir", str(tmp_path), *options]
            given = ["--save", "", *given]
            shell = ["sh", "-c", f'{prefix} exec "$@"', "sh", str(find_program().path), *given]
            stack.enter_context(process(shell, {}, Path("/dev/null")))
            url = f"redis://{password and f':{password}@'}127.0.0.1:{port}/0"
            wait_until(lambda: answers(url))
            return url

        yield start


def answers(url: str) -> bool:
    with suppress(ConfigurationError):
        return ask(url, 1).info["loading"] == "0"
    return False


def say(url: str, *words: str) -> str:
    """Send one inline command and return the whole reply."""
    port = int(url.rpartition(":")[2].partition("/")[0])
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(" ".join(words).encode() + b"\r\nQUIT\r\n")
        return b"".join(iter(lambda: connection.recv(4096), b"")).decode()


def examine(url: str | None, data: Path = Path("data")) -> list[Finding]:
    settings = Settings(redis={"url": url}, data={"dir": data})
    return list(doctor._check_redis(settings))


def found(findings: list[Finding], text: str) -> Finding:
    (finding,) = [finding for finding in findings if text in finding.detail]
    return finding


def test_well_configured_server_is_all_right(start: Start, tmp_path: Path) -> None:
    findings = examine(start("--appendonly", "yes", "--appendfsync", "always"))

    version = found(findings, "is version")
    assert version.state == ("ok" if find_program().version >= (7, 0) else "warning")
    assert {finding.state for finding in findings if finding is not version} == {"ok"}
    assert "a power cut loses nothing" in found(findings, "appendfsync").detail
    assert found(findings, "memory used of").detail.endswith("in the machine")
    assert str(tmp_path) in found(findings, "data directory").detail


@pytest.mark.parametrize(
    ("options", "state", "text"),
    [
        (["--maxmemory-policy", "allkeys-lru"], "failure", "SET maxmemory-policy noeviction"),
        (["--maxmemory-policy", "volatile-ttl"], "failure", "policy is volatile-ttl: tasks are dr"),
        (["--appendonly", "no"], "warning", "CONFIG SET appendonly yes"),
        (["--appendonly", "yes", "--appendfsync", "everysec"], "ok", "up to two seconds"),
        (["--appendonly", "yes", "--appendfsync", "no"], "warning", "up to half a minute"),
        (["--maxmemory", "500mb"], "ok", "of 524 MB maxmemory"),
    ],
)
def test_options_are_judged(start: Start, options: list[str], state: str, text: str) -> None:
    assert found(examine(start(*options)), text).state == state


def test_server_that_is_nearly_full_is_a_warning(start: Start) -> None:
    url = start("--maxmemory", "5mb", "--maxmemory-policy", "noeviction")
    fill = "\"for i = 1, 40 do redis.call('SET', i, string.rep('x', 100000)) end\""
    say(url, "EVAL", fill, "0")

    assert found(examine(url), "tasks are refused when it is nearly full").state == "warning"


def test_failed_write_to_the_append_only_file_is_a_failure(start: Start) -> None:
    # Files may not grow beyond 8 KB, as on a full disk.
    url = start("--appendonly", "yes", prefix="trap '' XFSZ; ulimit -f 16;")
    say(url, "SET", "large", "x" * 20_000)
    wait_until(lambda: ask(url, 1).info["aof_last_write_status"] == "err")

    assert found(examine(url), "aof_last_write_status").state == "failure"


def test_failed_snapshot_is_a_failure(start: Start, tmp_path: Path) -> None:
    url = start()
    (tmp_path / "dump.rdb").mkdir()
    say(url, "BGSAVE")
    wait_until(lambda: ask(url, 1).info["rdb_last_bgsave_status"] == "err")

    assert found(examine(url), "the last snapshot failed").state == "failure"


@pytest.mark.parametrize(("url", "count"), [("redis://10.0.0.1", 1), ("rediss://10.0.0.1", 0)])
def test_redis_that_everybody_may_use_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, url: str, count: int
) -> None:
    status = RedisStatus("10.0.0.1:6379", {"redis_version": "7.0.15", "aof_enabled": "1"}, {})
    monkeypatch.setattr(doctor, "ask", lambda url, timeout_s: status)

    risks = [finding for finding in examine(url) if "neither a password" in finding.detail]

    assert [finding.state for finding in risks] == ["warning"] * count


@pytest.mark.parametrize("version", ["6.0.16", "5.0.7"])
def test_old_version_is_a_failure(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    old = RedisStatus("10.0.0.1:6379", {"redis_version": version, "aof_enabled": "1"}, {})
    monkeypatch.setattr(doctor, "ask", lambda url, timeout_s: old)

    finding = found(examine("redis://10.0.0.1"), "is version")

    assert (finding.state, version in finding.detail) == ("failure", True)
    assert "6.2 is needed, 7 or newer recommended" in finding.detail


def test_server_that_hides_its_configuration_is_examined_as_far_as_it_lets_us(
    start: Start,
) -> None:
    findings = examine(start("--appendonly", "yes", "--rename-command", "CONFIG", '""'))

    assert found(findings, "does not report its appendfsync").state == "ok"
    assert "failure" not in {finding.state for finding in findings}


def test_user_without_info_is_a_warning(start: Start) -> None:
    url = start()
    say(url, "ACL", "SETUSER", "web", "on", ">secret", "~*", "+@read", "-info", "+ping")
    (finding,) = examine(url.replace("://", "://web:secret@"))
    assert finding.state == "warning"
    assert "does not let this user run INFO" in finding.detail


def test_password_is_used_and_never_shown(start: Start) -> None:
    url = start("--requirepass", "a:b c", password="a%3Ab%20c")

    right = examine(url)
    wrong = examine(url.replace("a%3Ab", "other"))
    missing = examine(url.replace(":a%3Ab%20c@", ""))
    unescaped = examine("redis://user:sec/ret@127.0.0.1:6379")

    assert found(right, "is version").state != "failure"
    for findings, reason in (
        (wrong, "invalid username-password"),
        (missing, "Authentication required"),
        (unescaped, "escaped"),
    ):
        assert found(findings, reason).state == "failure"
        assert "other" not in found(findings, reason).detail
        assert "sec" not in found(findings, reason).detail


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_connection_can_be_encrypted(start: Start, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out"]
    subprocess.run([*make, str(certificate)], check=True, capture_output=True)
    plain = start()
    with encrypted(plain, key, certificate) as url:
        for option in (f"ssl_ca_certs={certificate}", "ssl_cert_reqs=none"):
            assert found(examine(f"{url}?{option}"), "is version").state != "failure"
        assert "certificate verify failed" in found(examine(url), "cannot be used").detail


@contextmanager
def encrypted(url: str, key: Path, certificate: Path) -> Iterator[str]:
    """Offer a server through TLS, whether or not its program was built with it."""
    port = free_port()
    target = url.removeprefix("redis://").removesuffix("/0")
    code = f"""
import socket, ssl, threading
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain({str(certificate)!r}, {str(key)!r})
host, port = {target!r}.split(":")

def copy(source, target):
    while data := source.recv(65536):
        target.sendall(data)

def serve(plain):
    client = context.wrap_socket(plain, server_side=True)
    server = socket.create_connection((host, int(port)))
    threading.Thread(target=copy, args=(server, client), daemon=True).start()
    copy(client, server)

listener = socket.create_server(("127.0.0.1", {port}))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
    with process([sys.executable, "-c", code], {}, Path("/dev/null")):
        wait_until(lambda: listens(port))
        yield f"rediss://127.0.0.1:{port}/0"


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_what_is_no_redis_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = Thread(target=answer)
        thread.start()
        findings = examine(f"redis://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()

    assert found(findings, "it does not answer as a Redis server does").state == "failure"


def test_running_embedded_server_is_examined(tmp_path: Path) -> None:
    embedded = prepare(tmp_path, RedisSettings(fsync="always"))
    with process([str(embedded.program.path), str(embedded.config_path)], {}, Path("/dev/null")):
        assert embedded.wait_until_ready(lambda: True)
        findings = examine(None, data=tmp_path)

    assert found(findings, "started by `inferno up`").state == "ok"
    assert found(findings, "a power cut loses nothing").state == "ok"


def test_embedded_server_that_does_not_run_is_not_asked(tmp_path: Path) -> None:
    (finding,) = examine(None, data=tmp_path)

    assert "started by `inferno up`" in finding.detail


@pytest.mark.parametrize(
    ("scheme", "state", "text"),
    [("amqp", "ok", "RabbitMQ"), ("redis", "warning", "come back after an hour")],
)
def test_other_broker_is_reached_and_judged(scheme: str, state: str, text: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"{scheme}://guest:password@127.0.0.1:{listener.getsockname()[1]}//"
        (finding,) = doctor._check_broker(Settings(broker={"url": url}))

    assert finding.state == state
    assert text in finding.detail
    assert "password" not in finding.detail


def test_broker_that_is_away_is_a_failure() -> None:
    url = f"amqp://guest:password@127.0.0.1:{free_port()}//"
    (finding,) = doctor._check_broker(Settings(broker={"url": url}))

    assert finding.state == "failure"
    assert finding.detail.startswith("INFERNO_BROKER__URL: 127.0.0.1 cannot be reached: ")


def test_lanes_in_the_redis_of_the_records_are_not_checked_twice() -> None:
    assert list(doctor._check_broker(Settings())) == []


def test_settings_without_effect_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERNO_SERVER__HOSTNAMES", "inferno.example")
    settings = Settings(redis={"url": "redis://127.0.0.1:6379/0", "port": 6380})
    findings = list(doctor._check_settings(settings))
    assert [finding.state for finding in findings] == ["warning", "warning"]
    assert "did you mean INFERNO_SERVER__HOSTS?" in findings[0].detail
    assert "INFERNO_REDIS__LISTEN and INFERNO_REDIS__PORT have no effect" in findings[1].detail
