"""Requests to addresses that clients choose, against real servers on this machine."""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from inferno.operate.ports import free_port
from inferno.protocol.webhooks import parse_address
from tests.receiver import Receiver, receiver
from workers.webhooks.outbound import NotAllowed, NotReached, Outbound


@pytest.fixture
def here() -> Iterator[Receiver]:
    with receiver() as running:
        yield running


def post(
    url: str,
    *,
    private: bool = True,
    timeout_s: float = 10.0,
    leads_to: Callable[[], list[str]] | None = None,
    body: bytes = b"{}",
) -> int:
    def resolve(host: str, port: int) -> list[str]:
        assert leads_to is not None
        return leads_to()

    options = {} if leads_to is None else {"resolve": resolve}
    outbound = Outbound(timeout_s, allow_private=private, **options)
    return outbound.post(parse_address(url), {"x-test": "yes"}, body)


def test_a_body_is_posted_with_its_headers(here: Receiver) -> None:
    body = b"x" * 300_000

    assert post(here.url("/a?b=c"), body=body) == 200

    (request,) = here.received
    assert request.path == "/a?b=c"
    assert request.body == body
    assert request.headers["x-test"] == "yes"
    assert request.headers["host"] == f"127.0.0.1:{here.port}"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.1", "[::ffff:127.0.0.1]"])
def test_a_private_address_is_not_called(here: Receiver, host: str) -> None:
    with pytest.raises(NotAllowed, match="not a public address"):
        post(here.url("/", host), private=False)
    assert here.received == []


def test_one_private_address_among_public_ones_is_enough_to_refuse(here: Receiver) -> None:
    with pytest.raises(NotAllowed, match=r"a\.example leads to 127\.0\.0\.1"):
        post(here.url("/", "a.example"), private=False, leads_to=lambda: ["8.8.8.8", "127.0.0.1"])
    assert here.received == []


def test_a_name_is_looked_up_once_so_that_it_cannot_change_after_the_check(
    here: Receiver,
) -> None:
    answers = iter([["127.0.0.1"], ["127.0.0.2"]])

    assert post(here.url("/", "rebound.example"), leads_to=lambda: next(answers)) == 200

    assert here.received[0].headers["host"] == f"rebound.example:{here.port}"
    assert next(answers) == ["127.0.0.2"]


def test_an_address_that_does_not_answer_leaves_the_next(here: Receiver) -> None:
    # Nothing listens on the first address.
    assert post(here.url("/", "a.example"), leads_to=lambda: ["127.0.0.3", "127.0.0.1"]) == 200


def test_a_redirect_is_not_followed(here: Receiver) -> None:
    here.statuses["/from"] = [302]
    here.location = here.url("/to")

    assert post(here.url("/from")) == 302

    assert [request.path for request in here.received] == ["/from"]


def test_a_proxy_of_the_environment_is_not_used(
    here: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")

    assert post(here.url("/")) == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such.invalid"])
def test_nobody_there_is_told(host: str) -> None:
    with pytest.raises(NotReached):
        post(f"http://{host}:{free_port()}/")


def test_a_receiver_that_never_ends_its_answer_is_left_in_time() -> None:
    """The receiver sends byte by byte, so that no single read takes long."""
    done = threading.Event()

    def drip(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nx: ")
            while not done.wait(0.02):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,))
        thread.start()
        with pytest.raises(NotReached):
            post(f"http://127.0.0.1:{server.getsockname()[1]}/", timeout_s=0.3)
        done.set()
        thread.join()


def test_an_answer_that_is_no_http_is_told() -> None:
    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"220 mail.example ESMTP\r\n")
            connection.shutdown(socket.SHUT_WR)
            # Closing a socket with unread bytes would reset the connection.
            while connection.recv(65536):
                pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        with pytest.raises(NotReached, match="ProtocolError"):
            post(f"http://127.0.0.1:{server.getsockname()[1]}/")
        thread.join()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for receiver.example, with its key."""
    file = tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(file), "-out", str(tmp_path / "public.pem")),
            *("-subj", "/CN=receiver.example"),
            *("-addext", "subjectAltName=DNS:receiver.example"),
        ],
        check=True,
        capture_output=True,
    )
    file.write_text(file.read_text() + (tmp_path / "public.pem").read_text())
    return file


def test_tls_verifies_the_name_although_the_address_is_connected_to(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with receiver(context) as here:

        def call(name: str) -> int:
            return post(f"https://{name}:{here.port}/", leads_to=lambda: ["127.0.0.1"])

        with pytest.raises(NotReached, match="CERTIFICATE_VERIFY_FAILED"):
            call("receiver.example")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert call("receiver.example") == 200
        with pytest.raises(NotReached, match=r"not valid for 'other\.example'"):
            call("other.example")
    assert len(here.received) == 1
