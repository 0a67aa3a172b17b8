"""What a client gets back: results and errors, read from the platform's answers.

The last step of a task's way, *deliver*, seen from outside: `read_result` turns an answer of the
HTTP API, or a message of the WebSocket, into a `Result`, and `rebuild` turns a problem object
(RFC 9457) into the class of `inferno.errors` that it describes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from inferno.client.encoding import Request
from inferno.errors import InfernoError, RequestError, ServingError
from inferno.protocol import tensors
from inferno.protocol.tasks import TaskState
from inferno.protocol.tensors import Tensors


@dataclass(frozen=True)
class Result:
    """How a task ended."""

    #: Empty when the platform refused a streamed request, so that no task exists.
    task_id: str
    model: str
    #: Model version; None when the task ended before one was chosen.
    version: int | None
    status: TaskState
    #: Arrays by name; text and bytes are object arrays. Empty unless the task succeeded.
    outputs: Tensors
    #: Why there are no outputs.
    error: InfernoError | None
    #: The answer as received; also has `timings`, `batch` and `worker`.
    raw: Mapping[str, Any]
    #: The request that `stream` was given for this result.
    request: Request | None = None

    def checked(self) -> Result:
        """Return the result itself.

        Raises:
          InfernoError: the error that the task ended with.
        """
        if self.error is not None:
            raise self.error
        return self


def read_result(view: Mapping[str, Any], request: Request | None = None) -> Result:
    """Read the view of a finished task.

    Args:
      view: the task as the platform describes it.
      request: the streamed request that made the task.
    """
    status = TaskState(view["status"])
    outputs = view.get("outputs") or {}
    return Result(
        task_id=view["task_id"],
        model=view.get("model", ""),
        version=view.get("version"),
        status=status,
        outputs={
            name: tensors.decode(value, value["dtype"], name) for name, value in outputs.items()
        },
        error=None if status is TaskState.SUCCEEDED else rebuild(view.get("error")),
        raw=view,
        request=request,
    )


def failed_result(problem: Any, task_id: str, request: Request | None) -> Result:
    """Make the result of a task that was refused, is unknown or has lost its result.

    Args:
      problem: the problem object that the platform sent.
      task_id: empty when the request was refused.
      request: the streamed request; None for a task that was submitted before.
    """
    return Result(
        task_id=task_id,
        model=request.model if request else "",
        version=request.version if request else None,
        status=TaskState.FAILED,
        outputs={},
        error=rebuild(problem),
        raw=problem,
        request=request,
    )


def rebuild(problem: Any, status: int = 500) -> InfernoError:
    """Make the error that a problem object describes.

    Args:
      problem: as `InfernoError.problem` returns it; anything else gives a general error.
      status: HTTP status of the answer; chooses the class when the problem has no known code.
    """
    body = problem if isinstance(problem, Mapping) else {}
    fallback = RequestError if status < 500 else ServingError
    kind = _KINDS.get(body.get("code"), fallback)
    detail = body.get("detail") or body.get("title") or f"status {status} without an explanation"
    return kind(str(detail), body.get("field"))


def _kinds(base: type[InfernoError]) -> Iterator[tuple[str, type[InfernoError]]]:
    for kind in base.__subclasses__():
        # A subclass without a code of its own looks like its parent on the wire.
        if "code" in vars(kind):
            yield kind.code, kind
        yield from _kinds(kind)


#: Error classes by their `code`.
_KINDS: dict[Any, type[InfernoError]] = dict(_kinds(InfernoError))
