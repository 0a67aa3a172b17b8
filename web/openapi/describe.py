"""What a view declares about itself, beside its route, for the OpenAPI document.

    @blueprint.get("/lanes/<model>")
    @describe({200: Lane}, errors=(ModelNotFound, NotSupported, BrokerUnavailable))
    def show(model: str) -> Response:
        \"\"\"Show how much is in one lane.\"\"\"

The first line of the docstring is the summary. Bodies, parameters and answers are the types by
which msgspec reads them and mypy checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

from inferno.errors import InfernoError, PayloadTooLarge, Problem
from inferno.repository.package import Package


@dataclass(frozen=True)
class Header:
    """A header of requests or answers."""

    name: str
    description: str
    kind: Any = str
    example: Any = None


RETRY_AFTER = Header("Retry-After", "When to try or ask again, in seconds.", int, 1)


@dataclass(frozen=True)
class Success:
    """A documented answer that is not a problem."""

    #: Type of the JSON document, or a tuple of types; None for other media types.
    kind: Any
    description: str = ""
    headers: tuple[Header, ...] = ()
    media_type: str = "application/json"
    #: Further content types, whose bodies are bytes.
    binary: tuple[str, ...] = ()


@dataclass(frozen=True)
class ErrorForm:
    """The form in which a family of routes answers errors."""

    kind: Any = Problem
    media_type: str = "application/problem+json"
    #: Status in place of 422.
    invalid: int = 422
    #: Returns the document of an error.
    write: Callable[[InfernoError], Mapping[str, Any]] = InfernoError.problem

    def status(self, error: type[InfernoError]) -> int:
        """Return the HTTP status of an error."""
        return self.invalid if error.status == 422 else error.status


class ModelSchemas(TypedDict):
    """JSON Schemas of one version of a model."""

    request: dict[str, Any]
    response: dict[str, Any]


@dataclass(frozen=True)
class Operation:
    """What a view declares; see `describe`."""

    answers: Mapping[int, Success]
    errors: tuple[type[InfernoError], ...]
    body: Any
    #: Further content types of the request's body, which are bytes.
    binary: tuple[str, ...]
    #: Structs of the parameters in the URL.
    query: tuple[type, ...]
    headers: tuple[Header, ...]
    problems: ErrorForm
    #: Headers that every answer may have, problems included.
    always: tuple[Header, ...]
    #: Prefix of the path in the document, for a route that exists under several.
    prefix: str
    #: Returns example bodies by title.
    examples: Callable[[Iterable[Package]], Mapping[str, Any]] | None
    #: Returns the schemas of one model, for a route that has a path for each model.
    of_model: Callable[[Package], ModelSchemas] | None


#: Declarations by view.
OPERATIONS: dict[Callable[..., Any], Operation] = {}

View = TypeVar("View", bound=Callable[..., Any])


def describe(
    answers: Mapping[int, Any],
    *,
    errors: Iterable[type[InfernoError]] = (),
    body: Any = None,
    binary: Iterable[str] = (),
    query: Iterable[type] = (),
    headers: Iterable[Header] = (),
    problems: ErrorForm = ErrorForm(),
    always: Iterable[Header] = (),
    prefix: str = "",
    examples: Callable[[Iterable[Package]], Mapping[str, Any]] | None = None,
    of_model: Callable[[Package], ModelSchemas] | None = None,
) -> Callable[[View], View]:
    """Declare what a view takes and answers.

    Args:
      answers: by status, the type of the JSON document, or a `Success` with more detail.
      errors: errors that the view may answer; 500 is added, and 413 for views with a body.
      body: type of the JSON body.
      binary: further content types of the body.
      query: structs of the URL's parameters.
      headers: headers of the request.
      problems: form in which errors are answered.
      always: headers that every answer may have, problems included.
      prefix: the prefix under which clients expect the route, if there is one.
      examples: returns example bodies for the served models, by title.
      of_model: returns the schemas of a model, if the document has a path for each model.
    """

    def declared(view: View) -> View:
        successes = {
            status: one if isinstance(one, Success) else Success(one)
            for status, one in answers.items()
        }
        also = (InfernoError, *((PayloadTooLarge,) if body is not None else ()))
        OPERATIONS[view] = Operation(
            answers=successes,
            errors=(*errors, *also),
            body=body,
            binary=tuple(binary),
            query=tuple(query),
            headers=tuple(headers),
            problems=problems,
            always=tuple(always),
            prefix=prefix,
            examples=examples,
            of_model=of_model,
        )
        return view

    return declared
