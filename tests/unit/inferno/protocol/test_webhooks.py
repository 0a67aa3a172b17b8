"""Webhooks: which URLs are accepted, and how messages are signed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferno.errors import InvalidField
from inferno.protocol.webhooks import Address, check_reach, parse_address, sign
from inferno.settings import WebhookSettings


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://a.example", Address("https", "a.example", 443, "/")),
        ("http://a.example?x=1#y", Address("http", "a.example", 80, "/?x=1")),
        ("HTTPS://A.Example:8443/b%20c/?d", Address("https", "a.example", 8443, "/b%20c/?d")),
        ("http://8.8.8.8/", Address("http", "8.8.8.8", 80, "/")),
        ("http://[2001:db8::1]:81/", Address("http", "2001:db8::1", 81, "/")),
        ("http://my_service.internal./x", Address("http", "my_service.internal.", 80, "/x")),
    ],
)
def test_a_url_is_taken_apart(url: str, expected: Address) -> None:
    assert parse_address(url) == expected


@pytest.mark.parametrize(
    ("url", "detail"),
    [
        ("", "begins with http:// or https://"),
        ("a.example/hook", "begins with http:// or https://"),
        ("file:///etc/passwd", "begins with http:// or https://"),
        ("gopher://a.example", "begins with http:// or https://"),
        ("https://", "with a host"),
        ("https:///path", "with a host"),
        ("https://:443/", "with a host"),
        ("https://user@a.example", "without a user name"),
        ("https://user:pass@a.example", "without a user name"),
        ("https://@a.example", "without a user name"),
        ("https://a.example:0", "a port from 1 to 65535"),
        ("https://a.example:65536", "such as https://"),
        ("https://a.example:x", "such as https://"),
        ("https://[::1", "such as https://"),
        ("https://[v1.x]/", "host name or an IP address"),
        ("https://a..example", "host name or an IP address"),
        ("https://-a.example", "host name or an IP address"),
        ("https://a%2eexample", "host name or an IP address"),
        (f"https://{'a' * 64}.example", "host name or an IP address"),
        (f"https://{'a.' * 127}example", "host name or an IP address"),
        ("https://ä.example", "printable ASCII"),
        ("https://a.example/a b", "printable ASCII"),
        ("https://a.example/a\r\nb", "printable ASCII"),
        ("https://a.example\\@b.example", "printable ASCII"),
        ("https://a.example/" + "x" * 2048, "at most 2048 characters, got 2066"),
    ],
)
def test_a_wrong_url_is_refused(url: str, detail: str) -> None:
    with pytest.raises(InvalidField) as raised:
        parse_address(url)
    assert raised.value.field == "webhook"
    assert detail in raised.value.detail


@given(url=st.text() | st.text().map("https://".__add__))
def test_any_url_is_an_address_or_refused(url: str) -> None:
    try:
        address = parse_address(url)
    except InvalidField:
        return
    assert address.host.isascii()
    assert 1 <= address.port <= 65535
    assert address.target.startswith("/")


def test_where_an_address_is_shown_its_path_is_not() -> None:
    address = parse_address("https://[2001:db8::1]/services/TOKEN?key=TOKEN")
    assert str(address) == "https://[2001:db8::1]:443"
    assert "TOKEN" not in repr(address)


@pytest.mark.parametrize("host", ["169.254.169.254", "[::ffff:a9fe:a9fe]", "[fe80::1%25eth0]"])
def test_an_address_of_no_public_network_is_refused(host: str) -> None:
    with pytest.raises(InvalidField, match="expected a public address") as raised:
        check_reach(f"http://{host}:8080/hook")
    assert raised.value.field == "webhook"
    assert "INFERNO_WEBHOOKS__ALLOW_PRIVATE" in raised.value.detail


@pytest.mark.parametrize("host", ["93.184.216.34", "[2606:4700:4700::1111]"])
def test_a_public_address_is_allowed(host: str) -> None:
    check_reach(f"http://{host}/")


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST.", "a.localhost"),
        *("127.1", "2130706433", "0x7f.1", "017700000001", "0177.0.0.1", "127.0.0.1.", "0"),
    ],
)
def test_other_spellings_of_this_machine_are_refused(host: str) -> None:
    with pytest.raises(InvalidField, match="expected a public address"):
        check_reach(f"http://{host}/")


def test_a_name_is_left_to_the_delivery() -> None:
    check_reach("https://intranet.example/")


def test_the_signature_is_that_of_standard_webhooks() -> None:
    # The example of the libraries of Standard Webhooks.
    key = WebhookSettings(secret="whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").key
    assert key is not None

    signature = sign(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')

    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
