"""Which calls of browsers the routes answer, and what browsers are told about the answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from flask import Flask
from flask.testing import FlaskClient

from inferno.settings import Settings
from web.app import create_app

APP = "https://app.example"
EVIL = "https://evil.example"

#: What a page of another site can send without asking first: each would change something.
CHANGES = [
    ("POST", "/infer", b'{"model": "sentiment", "inputs": {"text": "Good."}}'),
    ("POST", "/v1/models/sentiment:predict", b'{"inputs": {"text": "Good."}}'),
    ("POST", "/v2/models/sentiment/infer", b"{}"),
    ("POST", "/v1/models:unload", b'{"name": "sentiment", "version": 1}'),
    ("POST", "/v1/models:load", b'{"name": "sentiment", "version": 1}'),
    ("POST", "/v2/repository/models/sentiment/unload", b""),
    ("PUT", "/v1/models/sentiment/active", b'{"version": 1}'),
    ("POST", "/lanes/sentiment/pause", b""),
    ("POST", "/api/v1/lanes/sentiment/purge?confirm=0", b""),
    ("POST", "/dead/replay?all=true", b""),
    ("DELETE", "/tasks/some", b""),
    ("DELETE", "/cache", b""),
    ("POST", "/no/such/route", b""),
]


@pytest.fixture(scope="module")
def sharing(settings: Settings) -> Iterator[Flask]:
    """The app, when the pages of another site may call it."""
    server = settings.server.model_copy(update={"cors_origins": (APP,), "hosts": ("here",)})
    app = create_app(settings.model_copy(update={"server": server}))
    yield app
    app.extensions["inferno"].close()


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
@pytest.mark.parametrize("kind", ["text/plain", "application/json", "multipart/form-data"])
def test_pages_of_other_sites_change_nothing(
    client: FlaskClient, store, method: str, path: str, body: bytes, kind: str
) -> None:
    before = store.dbsize()
    response = client.open(
        path, method=method, data=body, headers={"Origin": EVIL, "Content-Type": kind}
    )
    assert response.status_code == 403
    assert response.json is not None
    assert response.json["code"] == "foreign_origin"
    assert "INFERNO_SERVER__CORS_ORIGINS" in response.text
    assert "Access-Control-Allow-Origin" not in response.headers
    assert store.dbsize() == before


def test_sockets_of_other_sites_are_refused(client: FlaskClient) -> None:
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Origin": EVIL,
    }
    for path in ("/ws", "/v1/ws/some"):
        assert client.get(path, headers=headers).status_code == 403


def test_names_of_others_are_not_answered(client: FlaskClient) -> None:
    for path in ("/", "/health/live", "/tasks", "/v2/health/ready", "/static/front.js", "/none"):
        response = client.get(path, headers={"Host": "evil.example:8000"})
        assert response.status_code == 421
        assert "INFERNO_SERVER__HOSTS" in response.text


def test_own_pages_change_things(client: FlaskClient) -> None:
    headers = {"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}
    assert client.post("/lanes/sentiment/pause", headers=headers).status_code == 200
    assert client.post("/lanes/sentiment/resume", headers=headers).status_code == 200


def test_answers_are_what_their_type_says_and_only_for_own_pages(client: FlaskClient) -> None:
    for path in ("/", "/docs", "/tasks", "/openapi.json", "/static/front.js", "/no/such/route"):
        with client.get(path) as response:
            assert response.headers["X-Content-Type-Options"] == "nosniff", path
            assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin", path


def test_pages_fit_in_no_frame_and_have_nothing_inline(client: FlaskClient) -> None:
    for path in ("/", "/docs"):
        with client.get(path) as response:
            assert response.mimetype == "text/html"
            policy = response.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            assert "unsafe" not in policy
            assert response.headers["X-Frame-Options"] == "DENY"
            assert response.headers["Referrer-Policy"] == "no-referrer"


def ask_first(client: FlaskClient, origin: str) -> dict[str, str]:
    """Ask as browsers do before a call; return the answer's headers of CORS."""
    response = client.options(
        "/infer",
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type,idempotency-key",
        },
    )
    return {
        name: value for name, value in response.headers if name.startswith("Access-Control-Allow")
    }


def test_without_allowed_origins_nothing_is_shared(client: FlaskClient) -> None:
    assert ask_first(client, EVIL) == {}
    response = client.get("/tasks", headers={"Origin": EVIL})
    assert response.status_code == 200
    assert not [name for name, _ in response.headers if name.startswith("Access-Control")]
    assert "Vary" not in response.headers


def test_allowed_pages_may_call_and_read(sharing: Flask, store) -> None:
    client = sharing.test_client()
    allowed = ask_first(client, APP)
    assert allowed["Access-Control-Allow-Origin"] == APP
    assert "DELETE" in allowed["Access-Control-Allow-Methods"]
    assert allowed["Access-Control-Allow-Headers"] == "*, Authorization"
    for path, status in (("/tasks", 200), ("/tasks/none", 404), ("/v2/none", 404)):
        response = client.get(path, headers={"Origin": APP})
        assert response.status_code == status
        assert response.headers["Access-Control-Allow-Origin"] == APP
        assert response.headers["Access-Control-Expose-Headers"] == "*"
        assert response.headers["Vary"] == "Origin"
    assert client.post("/lanes/sentiment/pause", headers={"Origin": APP}).status_code == 200


def test_other_pages_still_may_not(sharing: Flask, store) -> None:
    client = sharing.test_client()
    assert ask_first(client, EVIL) == {}
    for origin in (EVIL, "null", APP + ".evil", APP.upper() + ":8443"):
        assert client.post("/lanes/sentiment/pause", headers={"Origin": origin}).status_code == 403
        response = client.get("/tasks", headers={"Origin": origin})
        assert "Access-Control-Allow-Origin" not in response.headers
        # Caches must not hand this answer to an allowed page.
        assert response.headers["Vary"] == "Origin"


def test_listed_names_are_answered(sharing: Flask, store) -> None:
    client = sharing.test_client()
    assert client.get("/tasks", headers={"Host": "here:8000"}).status_code == 200
    assert client.get("/tasks", headers={"Host": "there"}).status_code == 421
