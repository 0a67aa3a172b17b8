"""Deliver step of webhooks: HTTP requests to URLs that clients choose.

Such a URL may aim at hosts that only the platform can reach (server-side request forgery). So a
name is resolved once, the addresses are checked, and the connection goes to a checked address.
Redirects are not followed, and proxies of the environment are not used. TLS still verifies the
name.

The receiver may be hostile as well. One deadline holds for everything that it can delay, only the
head of its answer is read, and messages about it have no control characters.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import httpcore
import httpx

from inferno.protocol.internet import is_public
from inferno.protocol.webhooks import Address

#: Returns the IP addresses of a host.
Resolve = Callable[[str, int], list[str]]

#: Bytes written between two checks of the deadline.
CHUNK_BYTES = 64 * 1024

#: Maximum bytes that are read of an answer, with all interim answers before it.
MAX_ANSWER_BYTES = 128 * 1024

#: Maximum characters of a receiver's words in a message.
MAX_REASON = 200


class NotReached(Exception):
    """The request could not be sent, or was not answered; a later attempt may succeed."""


class NotAllowed(Exception):
    """The host has an address that must not be called."""


def resolve(host: str, port: int) -> list[str]:
    """Return the IP addresses of a host, in the order in which to try them.

    Raises:
      OSError: the name cannot be resolved.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Outbound:
    """Posts to URLs of clients; thread-safe."""

    def __init__(
        self, timeout_s: float, *, allow_private: bool, resolve: Resolve = resolve
    ) -> None:
        """Store the limits.

        Args:
          timeout_s: limit of a whole request, except for name resolution, which has the system's
            own limits.
          allow_private: also call addresses that are not public.
          resolve: resolves names.
        """
        self._timeout_s = timeout_s
        self._allow_private = allow_private
        self._resolve = resolve
        self._ssl = httpx.create_ssl_context()

    def post(self, address: Address, headers: Mapping[str, str], body: bytes) -> int:
        """Post a body, and return the status of the answer; the answer's body is not read.

        Raises:
          NotReached: there was no answer in time.
          NotAllowed: the host has an address that is not public.
        """
        url = httpcore.URL(
            scheme=address.scheme,
            host=address.host,
            port=address.port,
            target=address.target,
        )
        network = _CheckedNetwork(self._timeout_s, self._allow_private, self._resolve)
        try:
            with (
                httpcore.ConnectionPool(self._ssl, network_backend=network) as pool,
                pool.stream("POST", url, headers=list(headers.items()), content=body) as answer,
            ):
                return answer.status
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError) as exc:
            raise NotReached(f"{type(exc).__name__}: {_printable(str(exc))}") from None
        except OSError as exc:
            raise NotReached(f"{address.host} was not found: {exc}") from exc


class _CheckedNetwork(httpcore.NetworkBackend):
    """Connects to allowed addresses only; serves one request."""

    def __init__(self, timeout_s: float, allow_private: bool, resolve: Resolve) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._allow_private = allow_private
        self._resolve = resolve
        self._network = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        """Resolve the host, check its addresses, and connect to the first one that answers."""
        addresses = self._resolve(host, port)
        if not self._allow_private:
            for address in addresses:
                # Even if others are public: no honest receiver has a private address, too.
                if not is_public(address):
                    raise NotAllowed(f"{host} leads to {address}, which is not a public address")
        error: Exception = httpcore.ConnectError(f"{host} has no address")
        for tried, address in enumerate(addresses):
            # Share the time, so that an address which drops packets leaves some for the others.
            share_s = _left(self._deadline) / (len(addresses) - tried)
            try:
                stream = self._network.connect_tcp(
                    address, port, share_s, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as exc:
                error = exc
            else:
                return _TimedStream(stream, self._deadline)
        raise error


class _TimedStream(httpcore.NetworkStream):
    """A connection with one deadline for all operations, however slow the other side is."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline
        self._unread = MAX_ANSWER_BYTES

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._unread <= 0:
            raise httpcore.ReadError(f"the answer's head is longer than {MAX_ANSWER_BYTES} bytes")
        data = self._stream.read(min(max_bytes, self._unread), _left(self._deadline))
        self._unread -= len(data)
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # `NetworkStream.write` would give each part that the receiver takes the whole time again.
        connection, rest = self._stream.get_extra_info("socket"), memoryview(buffer)
        try:
            while rest:
                connection.settimeout(_left(self._deadline))
                rest = rest[connection.send(rest[:CHUNK_BYTES]) :]
        except TimeoutError as exc:
            raise httpcore.WriteTimeout(exc) from exc
        except OSError as exc:
            raise httpcore.WriteError(exc) from exc

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline))
        return _TimedStream(stream, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _printable(text: str) -> str:
    """Return a receiver's words on one line of limited length."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= MAX_REASON else shown[:MAX_REASON] + "..."


def _left(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise httpcore.TimeoutException("the request took too long")
    return left_s
