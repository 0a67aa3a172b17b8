"""HTTP requests to addresses that clients choose.

Such an address may be meant to reach what only the platform can reach (server-side request
forgery). So a name is looked up once, what it leads to is checked, and the connection goes to the
very address that was checked; redirects are not followed, proxies of the environment are not used.
TLS still verifies the name.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import httpcore
import httpx

from inferno.protocol.webhooks import Address, is_public

#: Returns the IP addresses of a host.
Resolve = Callable[[str, int], list[str]]

#: Bytes written before the time is looked at again.
CHUNK_BYTES = 64 * 1024


class NotReached(Exception):
    """The request could not be made, or was not answered; it may be another time."""


class NotAllowed(Exception):
    """The host has an address that must not be called."""


def resolve(host: str, port: int) -> list[str]:
    """Return the IP addresses of a host, in the order in which to try them.

    Raises:
      OSError: there are none.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Outbound:
    """Makes such requests; it may be used by several threads."""

    def __init__(
        self, timeout_s: float, *, allow_private: bool, resolve: Resolve = resolve
    ) -> None:
        """Store the limits.

        Args:
          timeout_s: for a whole request; only looking up a name is left to the system's limits.
          allow_private: call addresses that are not public too.
          resolve: looks up names.
        """
        self._timeout_s = timeout_s
        self._allow_private = allow_private
        self._resolve = resolve
        self._ssl = httpx.create_ssl_context()

    def post(self, address: Address, headers: Mapping[str, str], body: bytes) -> int:
        """Post a body and return the status of the answer, whose own body is not read.

        Raises:
          NotReached: no answer came in time.
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
            raise NotReached(f"{type(exc).__name__}: {exc}") from exc
        except OSError as exc:
            raise NotReached(f"{address.host} was not found: {exc}") from exc


class _CheckedNetwork(httpcore.NetworkBackend):
    """Connects to addresses that are allowed, for one request."""

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
        """Look the host up, check what came, and connect to the first address that answers."""
        addresses = self._resolve(host, port)
        if not self._allow_private:
            for address in addresses:
                # Also when others are public: who names a private one has no good reason.
                if not is_public(address):
                    raise NotAllowed(f"{host} leads to {address}, which is not a public address")
        error: Exception = httpcore.ConnectError(f"{host} has no address")
        for tried, address in enumerate(addresses):
            # So that one that swallows packets leaves time for the others.
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
    """A connection whose operations all end by one deadline, however slow the other side is."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), CHUNK_BYTES):
            self._stream.write(buffer[start : start + CHUNK_BYTES], _left(self._deadline))

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


def _left(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise httpcore.TimeoutException("the time was over")
    return left_s
