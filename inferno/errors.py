"""Every error that a client or an operator can meet.

    InfernoError
    ├── RequestError             the client must change something
    │   ├── InvalidRequest       400  the body or a header cannot be understood
    │   │   └── InvalidField     422  a field of the body is not as expected
    │   ├── InvalidInput         422  an input does not match the model's signature
    │   ├── PayloadTooLarge      413  the body or one input is over its limit
    │   ├── ModelNotFound        404  no such model or version
    │   ├── TaskNotFound         404  no such task
    │   ├── TaskCancelled        409  its client took the task back
    │   ├── WrongState           409  the task is not in a state that allows this
    │   ├── NotConfirmed         409  it would happen to more or fewer than the caller thinks
    │   ├── LoadFailed           409  a worker could not load a version
    │   ├── KeyReused            422  another request was made with this Idempotency-Key
    │   ├── RequestInProgress    409  the first request with this Idempotency-Key still runs
    │   ├── ResultExpired        410  the task is known, its result is gone
    │   └── PayloadGone          410  what the task was asked is no longer known
    ├── ServingError             the platform could not do its part
    │   ├── ForwardFailed        500  the model failed on this task
    │   ├── WorkerLost           500  the worker ended during the forward pass, again and again
    │   ├── InputsLost           500  the task's inputs were deleted before it could run
    │   ├── Overloaded           429  the task could not start within its deadline
    │   ├── NotSupported         501  the broker in use cannot do this
    │   ├── ModelUnavailable     503  no live worker serves the model
    │   ├── NotLoaded            503  the worker that got the task cannot load its version
    │   ├── BrokerUnavailable    503  Redis does not answer
    │   │   └── FateUnknown      503  the task may have been accepted, or not
    │   ├── PlatformUnreachable  503  the client cannot connect to the platform
    │   ├── DeadlineExceeded     504  the forward pass did not start in time
    │   └── NotInTime            504  the workers have not done in time what they were asked to
    └── ConfigurationError       the operator must change something
        └── PackageError         a model package is wrong

The status travels with the class: workers store ``{exc_module, exc_type, exc_message}`` in Celery's
own result format, and both `AsyncResult.get()` and the web tier rebuild the same class from it.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, NotRequired, TypedDict

from msgspec import Meta


class Problem(TypedDict):
    """What went wrong (RFC 9457)."""

    type: Annotated[str, Meta(examples=["about:blank"])]
    title: str
    status: Annotated[int, Meta(description="The HTTP status, or what it would be.")]
    detail: Annotated[str, Meta(description="For people: what was expected, and what came.")]
    code: Annotated[str, Meta(description="For programs; it does not change.")]
    field: NotRequired[Annotated[str, Meta(description="Where in the request it was found.")]]
    task_id: NotRequired[Annotated[str, Meta(description="Of the task whose error it is.")]]


class InfernoError(Exception):
    """Base of all errors; `status` is the HTTP status and `code` a stable machine-readable name."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    #: Whether the same task may succeed later.
    transient: bool = False

    def __init__(self, detail: str, field: str | None = None) -> None:
        """Store what went wrong.

        Args:
          detail: one sentence for people: what was expected and what came.
          field: where in the request it was found, such as ``inputs.text`` or ``timeout_ms``.
        """
        super().__init__(*((detail,) if field is None else (detail, field)))
        self.detail = detail
        self.field = field

    def __str__(self) -> str:
        return self.detail

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
    """The client must change something before it tries again."""

    status = 400
    code = "bad_request"
    title = "Bad request"

    #: Most characters of a detail: what a client sent is named in it, and may be megabytes.
    MAX_DETAIL = 1000

    def __init__(self, detail: str, field: str | None = None) -> None:
        """Store what went wrong; see `InfernoError`."""
        super().__init__(_shortened(detail, self.MAX_DETAIL), field and _shortened(field, 200))


class InvalidRequest(RequestError):
    """The body or a header cannot be understood."""

    code = "invalid_request"
    title = "Invalid request"


class InvalidField(InvalidRequest):
    """The body is a JSON object, and a field of it is missing, unknown or not as expected."""

    status = 422
    code = "invalid_field"
    title = "Invalid field"


class InvalidInput(RequestError):
    """An input does not match what the model's signature declares."""

    status = 422
    code = "invalid_input"
    title = "Invalid input"


class PayloadTooLarge(RequestError):
    """The body, or one input in it, is over its limit."""

    status = 413
    code = "payload_too_large"
    title = "Payload too large"


class ModelNotFound(RequestError):
    """No such model, or no such version of it."""

    status = 404
    code = "model_not_found"
    title = "Model not found"


class TaskNotFound(RequestError):
    """No task has this id."""

    status = 404
    code = "task_not_found"
    title = "Task not found"


class TaskCancelled(RequestError):
    """The task's client took it back."""

    status = 409
    code = "task_cancelled"
    title = "Task cancelled"


class WrongState(RequestError):
    """The task is not in a state in which this can be done."""

    status = 409
    code = "wrong_state"
    title = "Wrong state"


class NotConfirmed(RequestError):
    """The caller must say to how many this happens, and there are more or fewer."""

    status = 409
    code = "not_confirmed"
    title = "Not confirmed"


class LoadFailed(RequestError):
    """A worker could not load the version that was asked for; nothing has changed."""

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
    """What the task was asked has been deleted, so that it cannot be run again."""

    status = 410
    code = "payload_gone"
    title = "Payload gone"


class ResultExpired(RequestError):
    """The task is known and over, and its result has been deleted."""

    status = 410
    code = "result_expired"
    title = "Result expired"


class ServingError(InfernoError):
    """The platform could not do its part; the request itself was fine."""


class ForwardFailed(ServingError):
    """The model failed on this task, also when it was alone in its batch."""

    code = "forward_failed"
    title = "Forward pass failed"


class WorkerLost(ServingError):
    """The task's worker ended during its forward pass, as often as it was tried."""

    code = "worker_lost"
    title = "Worker lost"


class InputsLost(ServingError):
    """The task's inputs are no longer in Redis, although it is not over."""

    code = "inputs_lost"
    title = "Inputs lost"


class NotSupported(ServingError):
    """The broker that was chosen cannot do this."""

    status = 501
    code = "not_supported"
    title = "Not supported by this broker"


class Overloaded(ServingError):
    """So much waits already that the task could not start within its deadline.

    `retry_after_s` says when it may be worth another try, in seconds.
    """

    status = 429
    code = "overloaded"
    title = "Overloaded"
    retry_after_s: int = 1
    #: Tasks that are ahead of it.
    waiting: int = 0


class ModelUnavailable(ServingError):
    """No live worker serves the model."""

    status = 503
    code = "model_unavailable"
    title = "Model unavailable"


class NotLoaded(ServingError):
    """The worker that got the task cannot load its version; another one may."""

    status = 503
    code = "not_loaded"
    title = "Version not loaded"
    transient = True


class BrokerUnavailable(ServingError):
    """Redis does not answer, so that nothing can be accepted."""

    status = 503
    code = "broker_unavailable"
    title = "Broker unavailable"


class FateUnknown(BrokerUnavailable):
    """The connection to Redis was lost before it was known whether the task was accepted."""

    code = "fate_unknown"
    title = "Fate unknown"


class PlatformUnreachable(ServingError):
    """Nothing answers where the client looks for the platform; only a client meets it."""

    status = 503
    code = "platform_unreachable"
    title = "Platform unreachable"


class DeadlineExceeded(ServingError):
    """The forward pass did not start within the task's `timeout_ms`."""

    status = 504
    code = "deadline_exceeded"
    title = "Deadline exceeded"


class NotInTime(ServingError):
    """The workers have not done in time what they were asked to."""

    status = 504
    code = "not_in_time"
    title = "Not in time"


class ConfigurationError(InfernoError):
    """A setting, a file or the machine is not as the platform needs it."""

    code = "configuration_error"
    title = "Configuration error"


class PackageError(ConfigurationError):
    """A model package is broken."""

    code = "package_error"
    title = "Broken model package"


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
