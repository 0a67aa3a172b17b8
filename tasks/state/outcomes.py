"""The one outcome of a finished task, in Celery's own format (steps "settle" and "deliver").

It is stored under the task's result key, where `celery.result.AsyncResult` finds it, and published
on the channel of that name.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
from celery.exceptions import TaskRevokedError

from inferno import errors
from inferno.errors import (
    ForwardFailed,
    InfernoError,
    RequestError,
    StateUnreadable,
    TaskCancelled,
    for_callers,
)


class Outcome(msgspec.Struct, frozen=True):
    """The one outcome of a finished task."""

    task_id: str
    #: JSON of `inferno.protocol.tasks.Result` if the task succeeded; empty otherwise.
    result: msgspec.Raw
    #: The error if the task did not succeed.
    error: InfernoError | None

    @property
    def succeeded(self) -> bool:
        """Whether the task has a result."""
        return self.error is None


class _Meta(msgspec.Struct):
    """The fields of Celery's format that are read."""

    task_id: str
    status: str
    result: msgspec.Raw


class _Written(_Meta):
    """All fields of Celery's format."""

    traceback: None
    children: list[str]
    date_done: str


class _Failure(msgspec.Struct):
    """Celery's format of an exception."""

    exc_type: str
    exc_message: Any
    exc_module: str | None = None


#: Every error by its name. Nothing else is looked up by a stored name.
_ERRORS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, InfernoError)
}

_decode_meta = msgspec.json.Decoder(_Meta).decode
_decode_metas = msgspec.json.Decoder(list[_Meta]).decode
_decode_failure = msgspec.json.Decoder(_Failure).decode
_encode = msgspec.json.Encoder().encode


def decode_outcome(payload: bytes) -> Outcome | None:
    """Read an outcome from Celery's format, as it is stored and published.

    Returns:
      The outcome, or None when the state is not final.
    Raises:
      StateUnreadable: it is not in Celery's format.
    """
    try:
        return _outcome(_decode_meta(payload))
    except msgspec.DecodeError as exc:
        raise StateUnreadable(f"the stored result cannot be read: {exc}") from None


def decode_outcomes(payload: bytes) -> list[Outcome]:
    """Read outcomes that were announced together: a JSON array of Celery's format.

    Raises:
      StateUnreadable: it is not in Celery's format.
    """
    try:
        outcomes = map(_outcome, _decode_metas(payload))
        return [outcome for outcome in outcomes if outcome is not None]
    except msgspec.DecodeError as exc:
        raise StateUnreadable(f"announced results cannot be read: {exc}") from None


def _outcome(meta: _Meta) -> Outcome | None:
    if meta.status == "SUCCESS":
        return Outcome(meta.task_id, meta.result, None)
    if meta.status in ("FAILURE", "REVOKED"):
        return Outcome(meta.task_id, msgspec.Raw(b""), _rebuild(_decode_failure(meta.result)))
    return None


def encode_outcome(task_id: str, result: bytes | InfernoError) -> bytes:
    """Write an outcome in Celery's format.

    Args:
      task_id: id of the task.
      result: JSON of the result, or the error.
    """
    status = "SUCCESS"
    if isinstance(result, InfernoError):
        status = "REVOKED" if isinstance(result, TaskCancelled) else "FAILURE"
        result = msgspec.json.encode(
            _Failure(type(result).__name__, _arguments(result), type(result).__module__)
        )
    done = datetime.now(UTC).isoformat()
    return _encode(_Written(task_id, status, msgspec.Raw(result), None, [], done))


def _arguments(error: InfernoError) -> list[Any]:
    """Return the arguments of an error as callers may read them: a model may raise it with any."""
    texts = [arg if arg is None else writable(str(arg)) for arg in error.args]
    # What a client sent is told as it is.
    if isinstance(error, RequestError):
        return texts
    return [text and for_callers(text) for text in texts]


def writable(text: str) -> str:
    """Return a text with lone surrogates escaped, so that UTF-8 can hold it."""
    return text.encode("utf-8", "backslashreplace").decode()


def _rebuild(failure: _Failure) -> InfernoError:
    arguments = (
        failure.exc_message if isinstance(failure.exc_message, list) else [str(failure.exc_message)]
    )
    if failure.exc_module == InfernoError.__module__ and failure.exc_type in _ERRORS:
        detail, field = [*arguments, None, None][:2]
        return _ERRORS[failure.exc_type](str(detail), None if field is None else str(field))
    # Celery itself stored it: the task was revoked by hand, or no worker knows its name.
    if failure.exc_type == TaskRevokedError.__name__:
        return TaskCancelled("the task was revoked by Celery's remote control")
    return ForwardFailed(": ".join([failure.exc_type, *map(str, arguments)]))
