"""Parameters in URLs."""

from __future__ import annotations

import pytest


def raw(client, method, path, query, **options):
    """Ask with bytes in the query that no client should send: WSGI has them as latin-1."""
    environ = {"QUERY_STRING": query.decode("latin-1")}
    return client.open(path, method=method, environ_overrides=environ, **options)


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        ("GET", "/tasks", {}),
        ("GET", "/tasks/unknown", {}),
        ("DELETE", "/dead", {}),
        ("POST", "/infer", {"json": {"model": "sentiment", "inputs": {"text": "a"}}}),
        ("POST", "/infer", {"data": b"a", "content_type": "application/octet-stream"}),
        (
            "POST",
            "/v1/models/digits:predict",
            {"data": b"a", "content_type": "image/png"},
        ),
    ],
)
@pytest.mark.parametrize("query", [b"model=\xff", b"\xff=1", b"a=\xed\xa0\x80"])
def test_raw_bytes_in_a_query_are_refused(client, method, path, options, query):
    response = raw(client, method, path, query, **options)
    assert response.status_code == 400
    assert response.get_json()["code"] == "invalid_request"
    assert "raw bytes" in response.get_json()["detail"]


def test_utf_8_in_a_query_need_not_be_encoded(client):
    response = raw(client, "GET", "/tasks", "model=größe".encode())
    assert response.status_code == 200
    assert response.get_json()["tasks"] == []


@pytest.mark.parametrize(
    "path", ["/tasks/unknown?wait=null", "/v1/models/digits/schema?version=NULL"]
)
def test_null_is_no_number(client, path):
    response = client.get(path)
    assert response.status_code == 400
    assert response.get_json()["field"] == path.partition("?")[2].partition("=")[0]


def test_null_is_a_name(client):
    assert client.get("/tasks?model=null").status_code == 200
