"""HTTP and WebSocket connections to one platform, with their errors translated.

Every error of httpx, websocket-client and the operating system leaves this module as an
`InfernoError`.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import websocket

from inferno.client.results import rebuild
from inferno.errors import ConfigurationError, PlatformUnreachable, ServingError

#: Time limit of an answer in seconds, without the time that the platform was told to wait.
ANSWER_S = 30.0
#: How long an idle connection is kept, in seconds: less than front ends and proxies keep it, or a
#: call could be sent on a connection that is being closed.
KEEPALIVE_S = 2.0
#: A socket that is silent for this many seconds is dead: the server pings more often.
SILENCE_S = 60.0

#: OpenSSL's codes for a certificate whose names do not include the host name or the IP address.
_OTHER_NAME = (62, 64)

#: What the libraries raise when no connection comes about.
_UNREACHABLE = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    websocket.WebSocketAddressException,
    ConnectionRefusedError,
    # Only from connecting: websocket wraps the timeouts of an open connection.
    TimeoutError,
)


class Connection:
    """A pool of HTTP connections to one platform. Safe to share between threads."""

    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        """Store the platform's URL; nothing is sent yet.

        Args:
          url: the platform's URL, without a slash at its end.
          tls: which certificates are trusted; see `Client`.

        Raises:
          ConfigurationError: SSL_CERT_FILE or SSL_CERT_DIR cannot be read.
        """
        self.url = url
        if tls is None and url.startswith("https:"):
            tls = _trusted()
        self._tls = tls
        limits = httpx.Limits(keepalive_expiry=KEEPALIVE_S)
        # Without TLS there is no certificate to verify, and none is read from disk.
        verify = tls or False
        self._http = httpx.Client(base_url=url, timeout=ANSWER_S, limits=limits, verify=verify)

    def close(self) -> None:
        """Close all HTTP connections."""
        self._http.close()

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        wait_s: float = 0.0,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> Any:
        """Send a request and return the JSON of its answer.

        Args:
          method: HTTP method.
          path: path of the route.
          body: sent as JSON; None for no body.
          wait_s: how long the platform may wait before it answers, in seconds.
          headers: headers besides Content-Type.
          params: parameters of the query string.

        Raises:
          InfernoError: the error that the platform answers.
          PlatformUnreachable: nothing answers at the URL.
        """
        with _translating(self.url):
            answer = self._http.request(
                method,
                path,
                content=None if body is None else json.dumps(body),
                headers={"Content-Type": "application/json", **(headers or {})},
                params=params,
                timeout=ANSWER_S + wait_s,
            )
        content = _content(answer)
        if answer.is_error:
            raise rebuild(content, answer.status_code)
        return content

    def get_any(self, path: str, timeout_s: float) -> Any:
        """Return the JSON of an answer, whatever its status.

        Raises:
          PlatformUnreachable: nothing answers at the URL.
        """
        with _translating(self.url):
            answer = self._http.get(path, timeout=timeout_s)
        return _content(answer)

    def open_socket(self) -> Socket:
        """Open a WebSocket.

        Raises:
          PlatformUnreachable: nothing answers at the URL.
        """
        address = "ws" + self.url.removeprefix("http") + "/ws"
        with _translating(self.url):
            # `Origin` is for browsers; behind a proxy that renames hosts, it would look foreign.
            socket = websocket.create_connection(
                address,
                timeout=SILENCE_S,
                suppress_origin=True,
                sslopt={} if self._tls is None else {"context": self._tls},
            )
            return Socket(self.url, socket)


class Socket:
    """An open WebSocket that carries JSON messages."""

    def __init__(self, url: str, socket: websocket.WebSocket) -> None:
        self._url = url
        self._socket = socket

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message.

        Raises:
          ServingError: the connection was lost.
        """
        with _translating(self._url):
            self._socket.send(json.dumps(message))

    def receive(self) -> dict[str, Any]:
        """Wait for the next message.

        Raises:
          ServingError: the connection was lost, or the platform closed it.
        """
        with _translating(self._url):
            opcode, data = self._socket.recv_data()
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            # A code of two bytes, then the reason.
            reason = data[2:].decode(errors="replace") or "it gave no reason"
            raise ServingError(f"{self._url} closed the connection: {reason}")
        message: dict[str, Any] = json.loads(data)
        return message

    def close(self) -> None:
        """Close the WebSocket."""
        self._socket.close()


@contextmanager
def _translating(url: str) -> Iterator[None]:
    """Raise the errors of the libraries as errors of Inferno."""
    try:
        yield
    except _UNREACHABLE as exc:
        _raise_untrusted(url, exc)
        raise PlatformUnreachable(f"nothing answers at {url}; is the platform running?") from None
    except httpx.InvalidURL as exc:
        raise ServingError(f"{url}: {exc}") from None
    except (httpx.HTTPError, websocket.WebSocketException, OSError) as exc:
        _raise_untrusted(url, exc)
        reason = str(exc) or type(exc).__name__
        raise ServingError(f"the connection to {url} failed: {reason}") from exc


def _raise_untrusted(url: str, exc: BaseException) -> None:
    """Raise a ServingError if the cause of an error is the server's certificate."""
    cause: BaseException | None = exc
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        return
    advice = "set SSL_CERT_FILE to the certificate of its authority"
    if cause.verify_code in _OTHER_NAME:
        advice = "use a name that the certificate has"
    reason = cause.verify_message.rstrip(".")
    raise ServingError(f"the certificate of {url} is not trusted: {reason}; {advice}") from exc


def _trusted() -> ssl.SSLContext:
    """Trust the certificates that SSL_CERT_FILE or SSL_CERT_DIR names, or else certifi's."""
    try:
        return httpx.create_ssl_context()
    except OSError as exc:
        name = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
        raise ConfigurationError(
            f"{name}={os.environ.get(name)}: expected certificates in PEM: {exc}"
        ) from None


def _content(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        where = f"{answer.url.scheme}://{answer.url.netloc.decode()}"
        raise ServingError(
            f"{where} answered with status {answer.status_code} and without JSON; "
            "it is not an Inferno platform"
        ) from None
