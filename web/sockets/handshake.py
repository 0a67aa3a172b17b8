"""The handshake of a WebSocket: what is checked before flask-sock answers it."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable

from flask import Blueprint, Request, Response, current_app, request
from werkzeug.routing import WebsocketMismatch
from wsproto.utilities import RemoteProtocolError

from inferno.errors import InvalidRequest, UpgradeRequired
from web.calls.errors import problem
from web.sockets.peer import Peers

#: The only version of the protocol (RFC 6455).
VERSION = "13"
#: Bytes of the random value in `Sec-WebSocket-Key`.
_KEY_BYTES = 16
#: What flask-sock repeats to wsproto, besides the key; see `_forget_the_rest`.
_KEPT = {
    "HTTP_HOST": "inferno",
    "HTTP_CONNECTION": "Upgrade",
    "HTTP_UPGRADE": "websocket",
    "HTTP_SEC_WEBSOCKET_VERSION": VERSION,
}


class NoThread:
    """Stands in for simple-websocket's reading thread: `web.sockets.peer` reads by itself."""

    name = ""

    def __init__(self, target: Callable[[], None]) -> None:
        """Ignore what is to run."""

    def start(self) -> None:
        """Start nothing."""


def register(blueprint: Blueprint) -> None:
    """Check the handshakes of a blueprint, whose routes are all WebSockets."""
    blueprint.before_request(check)
    blueprint.app_errorhandler(WebsocketMismatch)(_mismatched)
    blueprint.app_errorhandler(UpgradeRequired)(_upgrade_required)
    # What wsproto refuses besides is the client's fault too.
    blueprint.app_errorhandler(RemoteProtocolError)(_refused)


def check() -> None:
    """Refuse a malformed handshake.

    Raises:
      InvalidRequest: a header is missing or malformed, or there is a body.
      UpgradeRequired: the client speaks another version of the protocol.
      Overloaded: the client's address has too many sockets.
    """
    headers = request.headers
    if request.method != "GET":
        raise InvalidRequest(f"expected a WebSocket handshake with GET, got {request.method}")
    if request.content_length or "Transfer-Encoding" in headers:
        raise InvalidRequest("expected a WebSocket handshake without a body")
    version = headers.get("Sec-WebSocket-Version", "")
    if version != VERSION:
        raise UpgradeRequired(f"expected Sec-WebSocket-Version: {VERSION}, got {version[:80]!r}")
    if not _is_key(headers.get("Sec-WebSocket-Key", "")):
        raise InvalidRequest("expected one Sec-WebSocket-Key: base64 of 16 bytes")
    peers: Peers = current_app.extensions["peers"]
    peers.require_room(request.remote_addr or "")
    _forget_the_rest(request)


def _is_key(text: str) -> bool:
    try:
        return len(base64.b64decode(text, validate=True)) == _KEY_BYTES
    except (binascii.Error, ValueError):
        return False


def _forget_the_rest(request: Request) -> None:
    """Leave only the checked headers, from which flask-sock rebuilds the request for wsproto.

    wsproto stumbles over some others. Without them it also agrees to no extension: compressed
    frames could grow a thousandfold before their size is known.
    """
    environ = request.environ
    for name in [name for name in environ if name.startswith("HTTP_")]:
        if name != "HTTP_SEC_WEBSOCKET_KEY":
            del environ[name]
    environ.update(_KEPT)


def _mismatched(_: WebsocketMismatch) -> Response:
    tokens = [token.strip() for token in request.headers.get("Connection", "").lower().split(",")]
    if "upgrade" in tokens and request.headers.get("Upgrade", "").lower() == "websocket":
        return problem(InvalidRequest("the path is no WebSocket: expected no Upgrade header"))
    return _upgrade_required(
        UpgradeRequired("the path is a WebSocket: expected Connection: Upgrade, Upgrade: websocket")
    )


def _upgrade_required(error: UpgradeRequired) -> Response:
    response = problem(error)
    response.headers["Upgrade"] = "websocket"
    response.headers["Sec-WebSocket-Version"] = VERSION
    return response


def _refused(error: RemoteProtocolError) -> Response:
    return problem(InvalidRequest(f"expected a WebSocket handshake: {error}"))
