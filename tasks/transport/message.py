"""Messages: packed to be published, and unpacked when they are fetched."""

from __future__ import annotations

from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from typing import Annotated, Any

import msgspec
import orjson
from kombu.transport import virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

from tasks.transport.lane import consumer_name


class _Headers(msgspec.Struct):
    """The headers that Celery and the transport rely on. Others may have any type."""

    id: str = ""
    task: str = ""
    retries: Annotated[int, msgspec.Meta(ge=0)] | None = None
    eta: str | None = None
    expires: str | float | None = None
    compression: str | None = None


class _Properties(msgspec.Struct):
    delivery_tag: str
    delivery_info: dict[str, Any] | None = None
    priority: int | None = None
    body_encoding: str | None = None
    reply_to: str | None = None
    correlation_id: str | None = None


class _Envelope(msgspec.Struct, rename={"content_type": "content-type"}):
    """A message around its body, which its reader checks."""

    properties: _Properties
    headers: _Headers | None = None
    body: str | None = None
    content_type: str | None = None


#: Numbers of the messages that this process packs.
_tags = count()


def pack(
    body: str,
    queue: str,
    *,
    headers: dict[str, Any],
    properties: dict[str, Any],
    priority: int = 0,
    content_type: str = "application/json",
    content_encoding: str = "utf-8",
) -> bytes:
    """Return a message as it is stored in a stream, for scripts that publish by `lua/lane.lua`.

    kombu's producer writes the same for a message to the default exchange.
    """
    return orjson.dumps(
        {
            "body": body,
            "content-encoding": content_encoding,
            "content-type": content_type,
            "headers": headers,
            "properties": {
                **properties,
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": priority,
                "body_encoding": "utf-8",
                "delivery_tag": f"{consumer_name()}:{next(_tags)}",
            },
        }
    )


class Message(virtual.Message):  # type: ignore[misc]
    """A message whose JSON is decoded by a faster library than kombu's."""

    def __init__(self, payload: dict[str, Any], channel: Any = None, **kwargs: Any) -> None:
        headers, properties = payload.get("headers") or {}, payload["properties"]
        encoding = properties.get("body_encoding")
        try:
            body = payload["body"].encode()
        except (LookupError, AttributeError, UnicodeEncodeError):
            body = None
        if kwargs or body is None or encoding != "utf-8" or "compression" in headers:
            super().__init__(payload, channel=channel, **kwargs)
            return
        # The attributes that kombu's constructors set for a plain UTF-8 body.
        self._raw = payload
        self.errors: list[Any] = []
        self.channel = channel
        self.delivery_tag = properties["delivery_tag"]
        self.content_type = payload.get("content-type")
        self.content_encoding = payload.get("content-encoding")
        self.delivery_info = properties.get("delivery_info") or {}
        self.headers = headers
        self.properties = properties
        self.body = body
        self.accept = None
        self._decoded_cache = None
        self._state = "RECEIVED"

    def _decode(self) -> Any:
        accepted = self.accept is None or self.content_type in self.accept
        if self.content_type == "application/json" and accepted and not self.errors:
            with suppress(ValueError):  # For example NaN, which Python's own JSON accepts.
                return _loads(self.body)
        return super()._decode()


def unpack(payload: bytes, queue: str, stream: str, entry: str) -> dict[str, Any]:
    """Return the raw message of an entry; its `delivery_info` says where it comes from.

    Args:
      payload: as `pack` or kombu's producer writes it.
      queue: name of the queue.
      stream: key of the stream.
      entry: id within the stream.
    Raises:
      ValueError: it is not a message.
    """
    message = checked(payload)
    info = message["properties"].get("delivery_info") or {}
    message["properties"]["delivery_info"] = info
    info["queue"], info["stream"], info["entry"] = queue, stream, entry
    # Not the sender's tag: two messages with the same one would be taken for one.
    message["properties"]["delivery_tag"] = f"{stream}/{entry}"
    return message


def checked(payload: bytes) -> dict[str, Any]:
    """Return a raw message with the structure that kombu and Celery rely on.

    Raises:
      ValueError: it is not a message.
    """
    try:
        message: dict[str, Any] = _loads(payload)
        msgspec.convert(message, _Envelope)
    except Exception as exc:  # kombu's decoders of types may raise anything.
        raise ValueError(f"not a message: {exc!r}") from exc
    return message


def entry_of(message: virtual.Message | None) -> tuple[str, str] | None:
    """Return the stream and id of a delivered message, or None when it came out of a list."""
    info = message.delivery_info if message is not None else {}
    return (info["stream"], info["entry"]) if "entry" in info else None


def due_ms(message: dict[str, Any]) -> int | None:
    """Return when a raw message is due, in milliseconds since the epoch; None: it is due now."""
    eta = (message.get("headers") or {}).get("eta")
    if not eta:
        return None
    due = datetime.fromisoformat(eta)
    return round((due if due.tzinfo else due.replace(tzinfo=UTC)).timestamp() * 1000)


def _loads(payload: bytes) -> Any:
    # kombu's clients may have written types of their own, as objects with a `__type__`.
    if b'"__type__"' in payload:
        return loads(bytes_to_str(payload))
    return orjson.loads(payload)
