"""TLS of the front end itself: failed handshakes, wrong files, and what the Python client says."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from inferno.client import Client
from inferno.errors import ConfigurationError, InfernoError, ServingError
from inferno.operate.addresses import local_client
from inferno.operate.ports import free_port
from inferno.settings import Settings
from inferno.testing.processes import wait_until, web

NAME = "inferno.example"


@dataclass(frozen=True)
class Server:
    """A front end without Redis."""

    port: int
    certificate: Path
    key: Path
    log: Path

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two certificates, each with its key."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("own", "other"):
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"]
        command += ["ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", f"/CN={NAME}"]
        command += ["-addext", f"subjectAltName=DNS:{NAME}"]
        command += ["-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.crt")]
        subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    certificate, key, log = folder / "own.crt", folder / "own.key", folder / "web.log"
    env = {
        # Nothing listens there.
        "INFERNO_REDIS__URL": f"redis://127.0.0.1:{free_port()}/0",
        "INFERNO_REPOSITORY__ROOT": str(folder),
        "INFERNO_SERVER__CERTFILE": str(certificate),
        "INFERNO_SERVER__KEYFILE": str(key),
        "INFERNO_SERVER__HEAD_TIMEOUT_S": "1",
    }
    with web(env, log) as address:
        # What waited for the start has left without a handshake.
        wait_until(lambda: "TLS handshake" in log.read_text())
        yield Server(int(address.rpartition(":")[2]), certificate, key, log)


@pytest.mark.parametrize("sent", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello"])
def test_a_failed_handshake_is_one_line_of_the_log(server: Server, sent: bytes) -> None:
    before = server.log.read_text()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        sock.sendall(sent)
    wait_until(lambda: "TLS handshake" in server.log.read_text()[len(before) :])
    written = server.log.read_text()[len(before) :]
    assert written.count("\n") == 1
    assert "TLS handshake with 127.0.0.1 failed" in written


def test_a_handshake_has_the_time_limit_of_a_head(server: Server) -> None:
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock:
        while sock.recv(4096):  # An alert, then the end.
            pass
    assert time.monotonic() - started < 5


def test_this_machine_reaches_its_own_platform_whatever_the_certificate(server: Server) -> None:
    tls = {"certfile": server.certificate, "keyfile": server.key, "port": server.port}
    settings = Settings.model_validate({"server": {**tls, "hosts": [NAME]}})
    with local_client(settings) as client:
        assert client.health()["redis"] == "down"


@pytest.mark.parametrize(
    ("trusted", "message"),
    [
        ("other.crt", "self-signed certificate; set SSL_CERT_FILE to the certificate of its"),
        ("own.crt", "IP address mismatch.*; use a name that the certificate has"),
    ],
)
def test_the_client_says_why_it_does_not_trust_a_certificate(
    server: Server, trusted: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(server.certificate.with_name(trusted)))
    with Client(server.url) as client:
        with pytest.raises(ServingError, match=f"the certificate of {server.url} .*{message}"):
            client.health()
        with pytest.raises(ServingError, match=f"the certificate of {server.url} .*{message}"):
            list(client.stream(["a task"]))


def test_the_client_names_a_file_of_certificates_that_it_cannot_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    with pytest.raises(ConfigurationError, match=r"SSL_CERT_FILE=/nowhere.pem: .*No such file"):
        Client("https://127.0.0.1:1")
    with Client("http://127.0.0.1:1") as client, pytest.raises(InfernoError, match="nothing ans"):
        client.health()


@pytest.mark.parametrize(
    ("key", "reason"), [("other.key", "(?i)values mismatch"), ("none.key", "none.key")]
)
def test_a_wrong_key_is_refused(folder: Path, key: str, reason: str) -> None:
    tls = {"certfile": folder / "own.crt", "keyfile": folder / key}
    settings = Settings.model_validate({"server": tls})
    with pytest.raises(ConfigurationError, match=r"INFERNO_SERVER__CERTFILE=.*KEYFILE=") as error:
        settings.server.check_certificate()
    assert error.match(reason)


def test_the_front_end_does_not_start_with_a_wrong_key(folder: Path) -> None:
    env = {
        "INFERNO_REPOSITORY__ROOT": str(folder),
        "INFERNO_SERVER__CERTFILE": str(folder / "own.crt"),
        "INFERNO_SERVER__KEYFILE": str(folder / "other.key"),
    }
    log = folder / "refused.log"
    with pytest.raises(AssertionError), web(env, log):
        pass
    assert "Error: INFERNO_SERVER__CERTFILE=" in log.read_text()
    assert "Traceback" not in log.read_text()
