"""TLS: nginx in front as in deploy/nginx.conf, and gunicorn's own."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import websocket

from inferno.operate.ports import free_port
from inferno.testing.platform import Platform
from inferno.testing.processes import ROOT, process, wait_until, web

NAME = "inferno.example"
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


@dataclass(frozen=True)
class Place:
    """A server with TLS, which clients reach by its name."""

    port: int
    #: Knows the server's certificate.
    context: ssl.SSLContext

    @property
    def host(self) -> str:
        return f"{NAME}:{self.port}"

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request to the address, with the name in TLS and in `Host`."""
        headers = {"Host": self.host, **options.pop("headers", {})}
        url = f"https://127.0.0.1:{self.port}{path}"
        with httpx.Client(verify=self.context, timeout=60) as client:
            return client.request(
                method, url, headers=headers, extensions={"sni_hostname": NAME}, **options
            )

    def open_socket(self, **options: Any) -> websocket.WebSocket:
        """Open a WebSocket as a browser does, with `Origin`."""
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        wrapped = self.context.wrap_socket(raw, server_hostname=NAME)
        opened: websocket.WebSocket = websocket.create_connection(
            f"wss://{self.host}/ws", socket=wrapped, timeout=30, **options
        )
        return opened


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for the name, signed by itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "inferno.crt", folder / "inferno.key"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", str(key), "-out", str(certificate)),
            *("-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@pytest.fixture(scope="module")
def start_web(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Start one more front end of the platform, which knows the name; for a `with` statement."""
    env = platform.env | {"INFERNO_SERVER__HOSTS": NAME}
    env.pop("INFERNO_SERVER__PORT")
    return lambda **more: web(env | more, tmp_path_factory.mktemp("web") / "web.log")


def example(folder: Path, address: str, port: int, certificate: tuple[Path, Path]) -> str:
    """Return the example with other ports and paths."""
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    changes = {
        "127.0.0.1:8000": address,
        "listen 80 ": f"listen 127.0.0.1:{free_port()} ",
        "listen 443 ": f"listen 127.0.0.1:{port} ",
        "/etc/nginx/inferno.crt": str(certificate[0]),
        "/etc/nginx/inferno.key": str(certificate[1]),
        "/run/nginx.pid": f"{folder}/nginx.pid",
        "/var/log/nginx": str(folder),
        "worker_processes auto": "worker_processes 1",
    }
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    temporary = "".join(f"\n  {kind}_temp_path {folder}/{kind};" for kind in kinds)
    return re.sub(r"^http \{", rf"\g<0>{temporary}", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def nginx(
    start_web: Callable[..., Any],
    certificate: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    if NGINX is None:
        assert "CI" not in os.environ, "continuous integration installs nginx"
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    place = Place(port, ssl.create_default_context(cafile=str(certificate[0])))
    with start_web() as address:
        configuration = folder / "nginx.conf"
        configuration.write_text(example(folder, address, port, certificate))
        # One process, with the rights of the test.
        command = [NGINX, "-c", str(configuration), "-g", "daemon off; master_process off;"]
        log = folder / "nginx.log"
        with process(command, {}, log) as popen:
            wait_until(lambda: popen.poll() is not None or listens(port))
            assert popen.poll() is None, log.read_text()
            yield place


@pytest.fixture(scope="module")
def gunicorn(start_web: Callable[..., Any], certificate: tuple[Path, Path]) -> Iterator[Place]:
    files = {
        "INFERNO_SERVER__CERTFILE": str(certificate[0]),
        "INFERNO_SERVER__KEYFILE": str(certificate[1]),
    }
    with start_web(**files) as address:
        port = int(address.rpartition(":")[2])
        yield Place(port, ssl.create_default_context(cafile=str(certificate[0])))


@pytest.fixture(params=["nginx", "gunicorn"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_predict(place: Place) -> None:
    body = {"inputs": {"text": "over TLS"}}
    answer = place.call("POST", "/v1/models/echo:predict", json=body)
    assert answer.status_code == 200
    assert answer.json()["outputs"]["text"]["data"] == ["over TLS"]


def test_submit_and_ask(place: Place) -> None:
    submitted = place.call("POST", "/infer", json={"model": "echo", "inputs": "over TLS"})
    assert submitted.status_code == 202
    # Relative, so it is right behind any proxy.
    assert submitted.headers["Location"].startswith("/tasks/")
    done = place.call("GET", submitted.headers["Location"], params={"wait": 30})
    assert done.json()["status"] == "succeeded"


def test_large_bodies(place: Place) -> None:
    rows = ["x" * 900_000] * 12
    body = json.dumps({"inputs": {"text": rows}, "outputs": ["text"]}).encode()
    assert 10_000_000 < len(body) < 12_000_000
    answer = place.call("POST", "/v1/models/echo:predict", content=body)
    assert answer.status_code == 200
    assert answer.json()["outputs"]["text"]["data"] == rows
    refused = place.call("POST", "/v1/models/echo:predict", content=body + 2_000_000 * b" ")
    assert refused.status_code == 413
    assert refused.json()["code"] == "payload_too_large"


def test_socket(place: Place) -> None:
    opened = place.open_socket()
    try:
        submit = {"type": "submit", "id": 1, "model": "echo", "inputs": "over TLS"}
        opened.send(json.dumps(submit))
        types = [json.loads(opened.recv())["type"] for _ in range(2)]
    finally:
        opened.close()
    assert types == ["accepted", "result"]


def test_pages_of_other_sites_are_refused(place: Place) -> None:
    for origin, status in ((f"https://{place.host}", 200), ("https://evil.example", 403)):
        answer = place.call("POST", "/lanes/mock/resume", headers={"Origin": origin})
        assert answer.status_code == status
    with pytest.raises(websocket.WebSocketBadStatusException, match="403"):
        place.open_socket(origin="https://evil.example")


def test_forwarded_headers_change_nothing(place: Place) -> None:
    headers = {
        "X-Forwarded-For": "192.0.2.1",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Port": "80",
        "Forwarded": "host=evil.example;proto=http",
    }
    body = {"model": "echo", "inputs": "over TLS"}
    answer = place.call("POST", "/infer", json=body, headers=headers)
    assert answer.headers["Location"].startswith("/tasks/")
    page = place.call("GET", "/docs", headers=headers)
    assert page.status_code == 200
    assert "evil.example" not in page.text


def test_nginx_speaks_http_2(nginx: Place, certificate: tuple[Path, Path]) -> None:
    done = subprocess.run(
        [
            *("curl", "--silent", "--http2", "--cacert", str(certificate[0])),
            *("--resolve", f"{nginx.host}:127.0.0.1", "--write-out", "\\n%{http_version}"),
            *(f"https://{nginx.host}/v1/models/echo:predict", "-d", '{"inputs": {"text": "2"}}'),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    answer, version = done.stdout.rsplit("\n", 1)
    assert json.loads(answer)["outputs"]["text"]["data"] == ["2"]
    assert version == "2"


def test_nginx_answers_by_its_name_only(nginx: Place) -> None:
    raw = socket.create_connection(("127.0.0.1", nginx.port), timeout=30)
    with raw, pytest.raises(ssl.SSLError, match="UNRECOGNIZED_NAME"):
        nginx.context.wrap_socket(raw, server_hostname="evil.example")
    assert nginx.call("GET", "/health/live", headers={"Host": "evil.example"}).status_code == 421
