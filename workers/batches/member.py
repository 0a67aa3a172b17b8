"""Batch step: read a Celery request as a member of a batch. It runs on the worker's event loop."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgspec
from celery.worker.request import Request

from inferno.batching.former import FlushReason
from inferno.engine.collation import count_rows
from inferno.errors import InvalidInput, ModelNotFound
from inferno.protocol.limits import Limits
from inferno.protocol.tensors import Tensors
from inferno.protocol.webhooks import DEFAULT_EVENTS
from inferno.repository.package import Package
from tasks.broker.lanes import Held, Lanes
from tasks.state import claims

#: How far in the future a task may have been accepted, in seconds.
_AHEAD_S = 86_400

#: What Celery itself would run after a task. Refused, because it would never run.
_FOLLOWERS = ("callbacks", "errbacks", "chain", "chord")


class Webhook(msgspec.Struct, frozen=True):
    """Where a task's client wants to be notified."""

    url: str
    #: Keys of `inferno.protocol.webhooks.EVENTS`.
    events: tuple[str, ...] = DEFAULT_EVENTS


class Member(msgspec.Struct, frozen=True, eq=False):
    """One task in a worker's hands."""

    request: Request
    #: Its message.
    held: Held
    package: Package
    inputs: Tensors
    #: Batch rows that this task occupies: the first dimension of its inputs; 1 if the signature
    #: is not batched.
    rows: int
    #: Outputs that the client wants, or None for all.
    outputs: list[str] | None
    #: Encoding of numbers in the result.
    codec: str
    priority: int
    #: Acceptance of the client's call, in seconds since the epoch.
    accepted_at: float
    #: Arrival in this worker, in seconds since the epoch.
    received_at: float
    webhook: Webhook | None = None
    #: Whether `inputs` are stand-ins for inputs under a key of their own; see `tasks.state.claims`.
    claimed: bool = False


@dataclass(frozen=True)
class Batch:
    """Members that leave for one forward pass together."""

    id: str
    reason: FlushReason
    members: list[Member]


def arguments(member: Member) -> dict[str, Any]:
    """Return the keyword arguments of a member's message; empty if they cannot be read."""
    try:
        found: Any = member.request.kwargs
    except Exception:  # Decoding a foreign message may raise anything.
        return {}
    return found if isinstance(found, dict) else {}


def read_arguments(request: Request) -> dict[str, Any]:
    """Return the keyword arguments of a request.

    Raises:
      InvalidInput: they cannot be read, or something is to follow the task.
    """
    try:
        kwargs = request.kwargs
    except Exception as exc:  # Decoding a foreign message may raise anything.
        raise InvalidInput(f"the message cannot be read: {type(exc).__name__}: {exc}") from exc
    if not isinstance(kwargs, dict):
        raise InvalidInput("expected keyword arguments", "inputs")
    _, _, embedded = request.message.payload
    followers = [name for name in _FOLLOWERS if embedded.get(name)]
    if followers:
        raise InvalidInput(f"nothing can follow the task of a batch: {', '.join(followers)}")
    return kwargs


def read_version(kwargs: dict[str, Any]) -> int | None:
    """Return the version that a message asks for, or None if it leaves the choice to the worker.

    Raises:
      ModelNotFound: it is not a whole number.
    """
    version = kwargs.get("version")
    if version is not None and type(version) is not int:
        raise ModelNotFound(f"expected the version as a whole number, got {version!r}", "version")
    return version


def read_member(
    request: Request, package: Package, received_at: float, lanes: Lanes, limits: Limits
) -> Member:
    """Read a request as a member.

    The web tier has checked the inputs of its tasks; those of other Celery clients are only checked
    here.

    Args:
      request: the message, as Celery has read it.
      package: version that answers.
      received_at: arrival in this worker, in seconds since the epoch.
      lanes: translate the broker's priorities.
      limits: largest sizes of inputs.
    Raises:
      InfernoError: says what is wrong with the message.
    """
    kwargs = request.kwargs
    inputs = kwargs.get("inputs")
    claimed = claims.is_claim(kwargs)
    if not claimed and not isinstance(inputs, dict):
        raise InvalidInput(
            "expected the keyword argument `inputs`, a mapping of named inputs", "inputs"
        )
    outputs = kwargs.get("outputs")
    if outputs is not None:
        package.signature.check_outputs(outputs)
    if claimed:
        arrays = claims.stand_ins(kwargs[claims.ARGUMENT])
        package.signature.check_shapes(arrays, limits)
    else:
        arrays = package.signature.parse(inputs, limits)
    return Member(
        request=request,
        held=Held.of(request.message.delivery_info),
        package=package,
        inputs=arrays,
        rows=count_rows(arrays) if package.signature.batched else 1,
        outputs=outputs,
        codec=kwargs.get("codec") or package.manifest.codecs.default,
        priority=lanes.from_broker(request.delivery_info.get("priority")),
        accepted_at=_time(kwargs.get("accepted_at"), received_at),
        received_at=received_at,
        webhook=_webhook(kwargs.get("webhook")),
        claimed=claimed,
    )


def read_stub(request: Request, package: Package, received_at: float, lanes: Lanes) -> Member:
    """Return a member that will be refused, with whatever can be read of its message."""
    webhook, priority, accepted_at = None, 0, received_at
    with suppress(Exception):
        priority = lanes.from_broker(request.delivery_info.get("priority"))
        accepted_at = _time(request.kwargs.get("accepted_at"), received_at)
        webhook = _webhook(request.kwargs.get("webhook"))
    held = Held.of(request.message.delivery_info)
    return Member(
        request, held, package, {}, 0, None, "json", priority, accepted_at, received_at, webhook
    )


def _time(given: Any, default: float) -> float:
    """Return a time that a client may have sent, or the default if it is not a valid time."""
    # Clocks of other machines may be ahead, but not by a day.
    if type(given) is float and 0 < given < default + _AHEAD_S:
        return given
    is_time = isinstance(given, int) and 0 < given < default + _AHEAD_S
    return float(given) if is_time else default


def _webhook(given: Any) -> Webhook | None:
    if given is None:
        return None
    try:
        return msgspec.convert(given, Webhook | None)
    except msgspec.ValidationError as exc:
        raise InvalidInput(f"{exc}: expected a URL and events", "webhook") from None
