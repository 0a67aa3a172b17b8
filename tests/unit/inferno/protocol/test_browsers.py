"""Which calls of browsers are answered, by their Host and Origin."""

from __future__ import annotations

import pytest

from inferno.errors import ForeignOrigin, Misdirected
from inferno.protocol.browsers import BrowserRules

RULES = BrowserRules(("127.0.0.1", "Inferno.Example"), ["https://app.example"])


def check(method: str = "POST", rules: BrowserRules = RULES, **headers: str) -> None:
    rules.check(method, {name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "127.0.0.1:8000",
        "192.0.2.1",
        "[::1]",
        "[2001:db8::1]:8000",
        "inferno.example",
        "INFERNO.example:443",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_own_names_and_addresses_are_answered(method: str, host: str) -> None:
    check(method, host=host)


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "evil.example.localhost:8000",
        "inferno.example.evil",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "evil.example#localhost",
        "localhost:8000:9000",
        "localhost, evil.example",
        "localhost:evil",
        "[evil.example]",
        "[::1",
        "::1",
        "localhost\n",
        "l\u043ecalhost",
        "*",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_other_names_are_not(method: str, host: str) -> None:
    with pytest.raises(Misdirected, match="INFERNO_SERVER__HOSTS"):
        check(method, host=host)


def test_any_name_can_be_answered() -> None:
    rules = BrowserRules(["*"])
    check(rules=rules, host="evil.example:8000")
    with pytest.raises(Misdirected):
        check(rules=rules, host="no name")


def test_clients_that_send_neither_are_answered() -> None:
    check()


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("localhost:8000", "http://localhost:8000"),
        ("inferno.example", "https://Inferno.Example"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("localhost:8000", "https://app.example"),
    ],
)
def test_own_pages_and_allowed_ones_may_change_things(host: str, origin: str) -> None:
    check(host=host, origin=origin)
    check("GET", host=host, origin=origin, upgrade="websocket")


FOREIGN = [
    "null",
    "",
    "https://evil.example",
    "http://localhost",
    "http://localhost:80000",
    "http://127.0.0.1:8000",
    "http://app.example",
    "https://app.example:8443",
    "https://app.example.evil",
    "localhost:8000",
    "file://",
    "chrome-extension://localhost:8000",
]


@pytest.mark.parametrize("origin", FOREIGN)
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "NONSENSE"])
def test_foreign_pages_may_not(method: str, origin: str) -> None:
    with pytest.raises(ForeignOrigin, match="INFERNO_SERVER__CORS_ORIGINS"):
        check(method, host="localhost:8000", origin=origin)


@pytest.mark.parametrize("origin", FOREIGN)
def test_foreign_pages_open_no_socket(origin: str) -> None:
    with pytest.raises(ForeignOrigin):
        check("GET", host="localhost:8000", origin=origin, upgrade="websocket")
    check("GET", host="localhost:8000", origin=origin)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_calls_without_origin_tell_of_foreign_pages_otherwise(site: str) -> None:
    for mode in ("navigate", "no-cors", "cors"):
        with pytest.raises(ForeignOrigin):
            check(host="localhost", sec_fetch_site=site, sec_fetch_mode=mode)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_foreign_pages_may_link_but_not_include(site: str) -> None:
    check("GET", host="localhost", sec_fetch_site=site, sec_fetch_mode="navigate")
    for mode in ("no-cors", "cors", "same-origin"):
        with pytest.raises(ForeignOrigin):
            check("GET", host="localhost", sec_fetch_site=site, sec_fetch_mode=mode)
    check(
        "GET",
        host="localhost",
        sec_fetch_site=site,
        sec_fetch_mode="cors",
        origin="https://app.example",
    )
    with pytest.raises(ForeignOrigin):
        check(
            "OPTIONS",
            host="localhost",
            sec_fetch_site=site,
            sec_fetch_mode="cors",
            origin="https://evil.example",
        )


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_other_calls_without_origin_are_answered(site: str) -> None:
    check(host="localhost", sec_fetch_site=site)


def test_every_page_can_be_allowed() -> None:
    rules = BrowserRules([], ["*"])
    for origin in ("null", "https://evil.example"):
        check(rules=rules, host="localhost", origin=origin)
    assert rules.allows("https://anywhere.example")


def test_kept_decisions_are_bounded() -> None:
    rules = BrowserRules([])
    for number in range(1000):
        check(rules=rules, host=f"localhost:{number}")
    assert rules._knows.cache_info().currsize == 256
