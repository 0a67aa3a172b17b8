"""Which predicts are plain, and so answered without Flask."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from gunicorn.config import Config

from inferno.settings import Settings
from web.app import create_app
from web.security import Head
from web.server.fast_predict import FastPredict

LINE = "POST /v1/models/sentiment:predict HTTP/1.1"
LENGTH = "Content-Length: 5"


@pytest.fixture(scope="module")
def fast(repository):
    app = create_app(Settings.model_validate({"repository": {"root": repository}}))
    yield FastPredict(app, Config())
    app.extensions["inferno"].close()


def head(line, *headers):
    host = [] if "Host: here" in headers else ["Host: here"]
    return "\r\n".join([line, *host, *headers, "", ""]).encode("latin-1")


@pytest.mark.parametrize(
    "lines",
    [
        [LINE, LENGTH],
        ["POST /models/sentiment:predict HTTP/1.1", LENGTH],
        ["POST /api/v1/models/a.b-c_d:predict HTTP/1.1", LENGTH],
        [LINE, "Host: here", "User-Agent: wrk", "Accept: */*", "Accept-Encoding: gzip", LENGTH],
        [LINE, "Content-Type: application/json", "Connection: keep-alive", LENGTH],
        [LINE, "Content-Type: application/json; charset=utf-8", "Connection: close", LENGTH],
        [LINE, "X-Forwarded-For: 192.0.2.1", "X-Forwarded-Proto: https", LENGTH],
    ],
)
def test_usual_heads_are_plain(fast, lines):
    assert fast.read_head(head(*lines)).body_bytes == 5


@pytest.mark.parametrize(
    "lines",
    [
        [LINE],
        [LINE.replace("POST", "GET"), LENGTH],
        [LINE.replace("1.1", "1.0"), LENGTH],
        [LINE.replace(" HTTP", "? HTTP"), LENGTH],
        [LINE.replace(" HTTP", "?version=2 HTTP"), LENGTH],
        [LINE.replace("/v1", "http://here/v1"), LENGTH],
        [LINE.replace("iment", "%69ment"), LENGTH],
        [LINE, LENGTH, LENGTH],
        [LINE, "Content-Length: 99999999999"],
        [LINE, "Accept: a", "Accept: b", LENGTH],
        [LINE, "Connection: upgrade", LENGTH],
        [LINE, "Content-Type: application/octet-stream", LENGTH],
        [LINE, "Content-Type: text/plain", LENGTH],
        [LINE, "Accept: a\nX: b", LENGTH],
        *(
            [LINE, f"{name}: a", LENGTH]
            for name in (
                "Authorization",
                "Cache-Control",
                "Cookie",
                "Expect",
                "Forwarded",
                "Idempotency-Key",
                "Inferno-Sticky-Key",
                "Inferno-Version",
                "Origin",
                "Prefer",
                "Transfer-Encoding",
                "Upgrade",
                "X-API-Key",
                "X-Anything",
                "traceparent",
            )
        ),
    ],
)
def test_other_heads_are_not(fast, lines):
    assert fast.read_head(head(*lines)) is None


def test_a_hook_sees_the_same_head_on_both_ways(repository):
    seen: list[Head] = []
    app = create_app(
        Settings.model_validate({"repository": {"root": repository}}), admit=seen.append
    )
    lines = [LINE, "Host: here", "User-Agent: wrk", LENGTH]
    plain = FastPredict(app, Config()).read_head(head(*lines))
    assert plain is not None
    headers = {"Host": "here", "User-Agent": "wrk"}
    app.test_client().post("/v1/models/sentiment:predict", data=b"12345", headers=headers)
    app.extensions["inferno"].close()
    assert seen == [plain.head]


def test_heads_are_parsed_once(fast, monkeypatch):
    text = head(LINE, "User-Agent: once", LENGTH)
    first = fast.read_head(text)
    monkeypatch.setattr("web.server.fast_predict.parse", SimpleNamespace)
    assert fast.read_head(bytes(text)) is first
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.model = "other"


def test_only_plain_heads_are_kept(fast):
    before = fast._cached.cache_info().currsize
    assert fast.read_head(head(LINE, "Authorization: Bearer secret", LENGTH)) is None
    assert fast.read_head(head(LINE, "Idempotency-Key: once", LENGTH)) is None
    assert fast._cached.cache_info().currsize == before
    assert fast.read_head(head(LINE, "User-Agent: kept", LENGTH))
    assert fast._cached.cache_info().currsize == before + 1
