"""Every error that a client or an operator can see.

    InfernoError
    ├── RequestError             the client must change something
    │   ├── InvalidRequest       400  the body or a header is malformed
    │   │   ├── InvalidField     422  a field of the body is wrong, missing or unknown
    │   │   └── UpgradeRequired  426  the path is a WebSocket
    │   ├── InvalidInput         422  an input does not match the model's signature
    │   ├── ForeignOrigin        403  a page of another site made the call
    │   ├── Misdirected          421  the platform does not know itself by this host name
    │   ├── PayloadTooLarge      413  the body or one input exceeds its limit
    │   ├── ModelNotFound        404  no such model or version
    │   ├── TaskNotFound         404  no such task
    │   ├── TaskCancelled        409  a client cancelled the task
    │   ├── WrongState           409  the task's state does not allow this
    │   ├── NotConfirmed         409  the call would affect more or fewer items than confirmed
    │   ├── LoadFailed           409  a worker could not load a version
    │   ├── KeyReused            422  another request used this Idempotency-Key
    │   ├── RequestInProgress    409  the first request with this Idempotency-Key is still running
    │   ├── ResultExpired        410  the task is known, but its result was deleted
    │   └── PayloadGone          410  the task's request was deleted
    ├── ServingError             the platform could not do its part
    │   ├── ForwardFailed        500  the model failed on this task
    │   ├── WorkerLost           500  the worker died in every forward pass of the task
    │   ├── InputsLost           500  the task's inputs were deleted before it could run
    │   ├── Overloaded           429  the task could not start within its deadline
    │   ├── StateUnreadable      500  what Redis holds of it was not written by the platform
    │   ├── NotSupported         501  the chosen broker cannot do this
    │   ├── ModelUnavailable     503  no live worker serves the model
    │   ├── NotLoaded            503  the task's worker cannot load its version
    │   ├── ServerBusy           503  the web process holds too many large requests
    │   ├── BrokerUnavailable    503  Redis does not answer
    │   │   └── FateUnknown      503  the task may or may not have been accepted
    │   ├── PlatformUnreachable  503  the client cannot connect to the platform
    │   ├── DeadlineExceeded     504  the forward pass did not start in time
    │   └── NotInTime            504  the workers did not finish an operation in time
    └── ConfigurationError       the operator must change something
        └── PackageError         a model package is broken

The status belongs to the class. Workers store ``{exc_module, exc_type, exc_message}`` in Celery's
own result format, so class names must not change; `AsyncResult.get()` and the web tier rebuild the
class from it.
"""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, NotRequired, TypedDict

from msgspec import Meta

#: Maximum number of characters of a text for callers.
MAX_FOR_CALLERS = 2000

#: An absolute path of at least two parts. What comes before excludes URLs, dates and fractions.
_PATH = re.compile(r"(?<![\w:/.~-])~?/(?:[^\s/:'\"<>,;()]+/)+([^\s/:'\"<>,;()]*)")


class Problem(TypedDict):
    """An error as a client sees it (RFC 9457)."""

    type: Annotated[str, Meta(examples=["about:blank"])]
    title: str
    status: Annotated[int, Meta(description="HTTP status.")]
    detail: Annotated[str, Meta(description="What was expected and what was received, for people.")]
    code: Annotated[str, Meta(description="Stable name of the error, for programs.")]
    field: NotRequired[Annotated[str, Meta(description="Field of the request that is wrong.")]]
    task_id: NotRequired[Annotated[str, Meta(description="Id of the task that has the error.")]]


class InfernoError(Exception):
    """Base of all errors; `status` is the HTTP status, `code` a stable name for programs."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    #: Whether the same task may succeed later.
    transient: bool = False

    def __init__(self, detail: str, field: str | None = None) -> None:
        """Store what went wrong.

        Args:
          detail: one sentence for people: what was expected and what was received.
          field: field of the request that is wrong, such as ``inputs.text`` or ``timeout_ms``.
        """
        super().__init__(*((detail,) if field is None else (detail, field)))
        self.detail = detail
        self.field = field

    def __str__(self) -> str:
        return self.detail if self.field is None else f"{self.field}: {self.detail}"

    def problem(self) -> Problem:
        """Return the error as an RFC 9457 problem object."""
        body: Problem = {
            "type": "about:blank",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
        }
        if self.field is not None:
            body["field"] = self.field
        return body


class RequestError(InfernoError):
    """The client must change its request before it tries again."""

    status = 400
    code = "bad_request"
    title = "Bad request"

    #: Maximum characters of a detail. It quotes the client's input, which may be megabytes.
    MAX_DETAIL = 1000

    def __init__(self, detail: str, field: str | None = None) -> None:
        """Store what went wrong; see `InfernoError`."""
        super().__init__(_shortened(detail, self.MAX_DETAIL), field and _shortened(field, 200))


class InvalidRequest(RequestError):
    """The body or a header is malformed."""

    code = "invalid_request"
    title = "Invalid request"


class InvalidField(InvalidRequest):
    """A field of the body is wrong, missing or unknown."""

    status = 422
    code = "invalid_field"
    title = "Invalid field"


class UpgradeRequired(InvalidRequest):
    """The path is a WebSocket, and the request asks for none or for another version of it."""

    status = 426
    code = "upgrade_required"
    title = "Upgrade required"


class InvalidInput(RequestError):
    """An input does not match what the model's signature declares."""

    status = 422
    code = "invalid_input"
    title = "Invalid input"


class ForeignOrigin(RequestError):
    """A page of another site made the call, and its origin is not allowed."""

    status = 403
    code = "foreign_origin"
    title = "Foreign origin"


class Misdirected(RequestError):
    """The call names a host that is not one of the platform's names."""

    status = 421
    code = "misdirected"
    title = "Misdirected request"


class PayloadTooLarge(RequestError):
    """The body, or one input in it, exceeds its limit."""

    status = 413
    code = "payload_too_large"
    title = "Payload too large"


class ModelNotFound(RequestError):
    """The model, or this version of it, does not exist."""

    status = 404
    code = "model_not_found"
    title = "Model not found"


class TaskNotFound(RequestError):
    """No task has this id."""

    status = 404
    code = "task_not_found"
    title = "Task not found"


class TaskCancelled(RequestError):
    """A client cancelled the task."""

    status = 409
    code = "task_cancelled"
    title = "Task cancelled"


class WrongState(RequestError):
    """The task's state does not allow this."""

    status = 409
    code = "wrong_state"
    title = "Wrong state"


class NotConfirmed(RequestError):
    """The number of items that the caller confirmed is not the actual number."""

    status = 409
    code = "not_confirmed"
    title = "Not confirmed"


class LoadFailed(RequestError):
    """A worker could not load the requested version; nothing has changed."""

    status = 409
    code = "load_failed"
    title = "Load failed"


class KeyReused(RequestError):
    """The Idempotency-Key belongs to another request."""

    status = 422
    code = "idempotency_key_reused"
    title = "Idempotency-Key reused"


class RequestInProgress(RequestError):
    """The first request with this Idempotency-Key has not been answered yet."""

    status = 409
    code = "request_in_progress"
    title = "Request in progress"


class PayloadGone(RequestError):
    """The task's request was deleted, so the task cannot run again."""

    status = 410
    code = "payload_gone"
    title = "Payload gone"


class ResultExpired(RequestError):
    """The task has finished and is known, but its result was deleted."""

    status = 410
    code = "result_expired"
    title = "Result expired"


class ServingError(InfernoError):
    """The platform could not do its part; the request itself was valid."""


class ForwardFailed(ServingError):
    """The model failed on this task, even when the task was alone in its batch."""

    code = "forward_failed"
    title = "Forward pass failed"


class WorkerLost(ServingError):
    """The worker died during the task's forward pass, in every attempt."""

    code = "worker_lost"
    title = "Worker lost"


class InputsLost(ServingError):
    """The task's inputs disappeared from Redis before the task finished."""

    code = "inputs_lost"
    title = "Inputs lost"


class StateUnreadable(ServingError):
    """What Redis holds of a task or model is not what the platform has written."""

    code = "state_unreadable"
    title = "State unreadable"


class NotSupported(ServingError):
    """The chosen broker cannot do this."""

    status = 501
    code = "not_supported"
    title = "Not supported by this broker"


class Overloaded(ServingError):
    """Too many tasks are waiting for this one to start within its deadline.

    `retry_after_s` is the time in seconds after which a retry may succeed.
    """

    status = 429
    code = "overloaded"
    title = "Overloaded"
    retry_after_s: int = 1
    #: Number of tasks ahead of this one.
    waiting: int = 0


class ModelUnavailable(ServingError):
    """No live worker serves the model."""

    status = 503
    code = "model_unavailable"
    title = "Model unavailable"


class NotLoaded(ServingError):
    """The task's worker cannot load its version; another worker may."""

    status = 503
    code = "not_loaded"
    title = "Version not loaded"
    transient = True


class ServerBusy(ServingError):
    """The web process holds too many large requests and answers to take one more."""

    status = 503
    code = "server_busy"
    title = "Server busy"


class BrokerUnavailable(ServingError):
    """Redis does not answer, so no task can be accepted."""

    status = 503
    code = "broker_unavailable"
    title = "Broker unavailable"


class FateUnknown(BrokerUnavailable):
    """The connection to Redis was lost while it was unknown whether the task was accepted."""

    code = "fate_unknown"
    title = "Fate unknown"


class PlatformUnreachable(ServingError):
    """Nothing answers at the platform's URL. Only raised by clients."""

    status = 503
    code = "platform_unreachable"
    title = "Platform unreachable"


class DeadlineExceeded(ServingError):
    """The forward pass did not start within the task's `timeout_ms`."""

    status = 504
    code = "deadline_exceeded"
    title = "Deadline exceeded"


class NotInTime(ServingError):
    """The workers did not finish an operation in time."""

    status = 504
    code = "not_in_time"
    title = "Not in time"


class ConfigurationError(InfernoError):
    """A setting, a file or the machine does not meet the platform's needs."""

    code = "configuration_error"
    title = "Configuration error"


class PackageError(ConfigurationError):
    """A model package is broken."""

    code = "package_error"
    title = "Broken model package"


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


def for_callers(text: str) -> str:
    """Return a text of the platform, a model or a library as callers of the platform may read it.

    Absolute paths lose their folders, tracebacks are left out, and long texts are cut. The log of
    the process has the full text.
    """
    text = text.partition("Traceback (most recent call last)")[0].rstrip() or "an error"
    return _PATH.sub(r"\1", _shortened(text, MAX_FOR_CALLERS))
