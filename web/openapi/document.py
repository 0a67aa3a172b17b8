"""What the OpenAPI document says of each route, declared beside its view, and the document.

    @blueprint.get("/lanes/<model>")
    @describe({200: Lane}, errors=(ModelNotFound, NotSupported, BrokerUnavailable))
    def show(model: str) -> Response:
        \"\"\"Say how much is in one lane.\"\"\"

The docstring is the summary, the module's is that of its routes. Bodies, parameters and answers are
the types by which msgspec reads and mypy checks them. A route that is found at several places is
described once, at the uppermost of them.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NamedTuple, TypedDict, TypeVar

import msgspec
from flask import Flask
from werkzeug.routing import Rule

from inferno.errors import InfernoError, PayloadTooLarge, Problem, RequestInProgress
from inferno.protocol.schema import schema_of
from inferno.repository.package import Package
from inferno.version import inferno_version

#: The media type object of a body that is no JSON.
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_REF = "#/components/schemas/{name}"

#: Of the parts of a path.
PATH_PARAMETERS = {
    "model": "The model's name.",
    "name": "The model's name.",
    "task_id": "The task's id.",
    "version": "Of the model.",
}

DESCRIPTION = """\
Every call is a durable job, and every job rides in a well-formed batch.

Every route is found at the root, under `/v1` and under `/api/v1`; each is described once here.
Bodies need no `Content-Type`. Errors are problems (RFC 9457) whose `code` is for programs.
WebSockets (`/ws`, `/ws/{task_id}`) are described in the documentation of the API."""


@dataclass(frozen=True)
class Header:
    """A header of requests or answers."""

    name: str
    description: str
    kind: Any = str
    example: Any = None


RETRY_AFTER = Header("Retry-After", "When to try or ask again, in seconds.", int, 1)


@dataclass(frozen=True)
class Answer:
    """An answer that is no problem."""

    #: Type of its JSON document, or several; for other media types, None.
    kind: Any
    description: str = ""
    headers: tuple[Header, ...] = ()
    media_type: str = "application/json"
    #: Other content types, which are bytes.
    binary: tuple[str, ...] = ()


@dataclass(frozen=True)
class ErrorForm:
    """How errors are answered."""

    kind: Any = Problem
    media_type: str = "application/problem+json"
    #: Status of errors that would be a 422.
    invalid: int = 422
    #: Returns an error's document.
    write: Callable[[InfernoError], Mapping[str, Any]] = InfernoError.problem

    def status(self, error: type[InfernoError]) -> int:
        """Return the status by which an error is answered."""
        return self.invalid if error.status == 422 else error.status


class ModelSchemas(TypedDict):
    """JSON Schemas of one version of a model."""

    request: dict[str, Any]
    response: dict[str, Any]


@dataclass(frozen=True)
class Operation:
    """What a view says of itself."""

    answers: Mapping[int, Answer]
    errors: tuple[type[InfernoError], ...]
    body: Any
    #: Other content types of the body, which are bytes.
    binary: tuple[str, ...]
    #: Structs of the parameters in the URL.
    query: tuple[type, ...]
    headers: tuple[Header, ...]
    problems: ErrorForm
    #: Of every answer, also of problems.
    always: tuple[Header, ...]
    #: In front of the path in the document, where the route is found under several.
    prefix: str
    #: Returns bodies by what they show.
    examples: Callable[[Iterable[Package]], Mapping[str, Any]] | None
    #: Returns the schemas by which one model is asked and answers.
    of_model: Callable[[Package], ModelSchemas] | None


#: By their view.
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
      answers: by status, the type of the JSON document, or an `Answer` that says more.
      errors: what it may be answered with besides; 500 is added, and 413 to what has a body.
      body: type of the JSON body.
      binary: other content types of the body.
      query: structs of the URL's parameters.
      headers: of the request.
      problems: how errors are answered.
      always: headers that every answer may have, also problems.
      prefix: one of the prefixes, if clients expect the route there.
      examples: returns, for the served models, bodies by what they show.
      of_model: if each model has a path of its own in the document, its schemas.
    """

    def declared(view: View) -> View:
        said = {
            status: one if isinstance(one, Answer) else Answer(one)
            for status, one in answers.items()
        }
        also = (InfernoError, *((PayloadTooLarge,) if body is not None else ()))
        OPERATIONS[view] = Operation(
            answers=said,
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


class Route(NamedTuple):
    """One operation of the document, and all the rules by which its view is found."""

    path: str
    method: str
    view: Callable[..., Any]
    rules: list[Rule]


def routes(app: Flask, prefixes: Iterable[str]) -> Iterator[Route]:
    """Yield every route of an app, described or not, but for WebSockets."""
    found: dict[tuple[Any, ...], list[Rule]] = {}
    for rule in app.url_map.iter_rules():
        view = app.view_functions[rule.endpoint]
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}:
            if not rule.websocket:
                found.setdefault((view, method, frozenset(rule.arguments)), []).append(rule)
    for (view, method, _), rules in found.items():
        operation = OPERATIONS.get(view)
        # Decorators are applied from below.
        uppermost = _at_root(rules, prefixes)[-1]
        prefix = "" if operation is None else operation.prefix
        yield Route(prefix + _path(uppermost), method.lower(), view, rules)


def _at_root(rules: list[Rule], prefixes: Iterable[str]) -> list[Rule]:
    """Leave out what is another rule with a prefix before it."""
    known = {rule.rule for rule in rules}
    return [
        rule
        for rule in rules
        if not any(p and rule.rule.removeprefix(p) in known - {rule.rule} for p in prefixes)
    ]


def _path(rule: Rule) -> str:
    return re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", rule.rule)


def document(app: Flask, prefixes: tuple[str, ...], models: Iterable[Package]) -> dict[str, Any]:
    """Return the OpenAPI document of an app.

    Args:
      app: whose routes are described.
      prefixes: under each of which its routes are found.
      models: the versions that answer those who name none.
    """
    described = [route for route in routes(app, prefixes) if route.view in OPERATIONS]
    schemas = _Schemas(described)
    components = dict(schemas.components)
    models = list(models)
    paths: dict[str, dict[str, Any]] = {}
    ids: set[str] = set()
    for route in described:
        operation = _operation(route, schemas, prefixes, models)
        if operation["operationId"] in ids:
            operation["operationId"] += f"_{route.method}"
        ids.add(operation["operationId"])
        paths.setdefault(route.path, {})[route.method] = operation
        of_model = OPERATIONS[route.view].of_model
        if of_model is None:
            continue
        for package in models:
            own = _of_model(operation, package)
            paths[route.path.replace("{model}", package.name)] = {route.method: own}
            schemas_of_model = of_model(package)
            components[f"{package.name}.request"] = schemas_of_model["request"]
            components[f"{package.name}.response"] = schemas_of_model["response"]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Inferno",
            "version": inferno_version(),
            "description": DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "tags": _tags(described),
        "paths": paths,
        "components": {"schemas": dict(sorted(components.items()))},
    }


def _of_model(general: Mapping[str, Any], package: Package) -> dict[str, Any]:
    """Return the operation of one model's own path."""
    name = package.name
    media: dict[str, Any] = {"schema": {"$ref": _REF.format(name=f"{name}.request")}}
    if sample := package.manifest.warm_up.inputs:
        media["example"] = {"inputs": sample}
    body, responses = general["requestBody"], general["responses"]
    answer = {"schema": {"$ref": _REF.format(name=f"{name}.response")}}
    return {
        **general,
        "operationId": f"{general['operationId']}_{re.sub('[^0-9A-Za-z]', '_', name)}",
        "summary": f"Run {name}.",
        "description": package.manifest.description,
        "parameters": [one for one in general["parameters"] if one["in"] != "path"],
        "requestBody": body | {"content": body["content"] | {"application/json": media}},
        "responses": responses
        | {"200": responses["200"] | {"content": {"application/json": answer}}},
    }


class _Schemas:
    """The JSON Schemas of every type that the described routes name."""

    def __init__(self, described: Iterable[Route]) -> None:
        kinds: list[Any] = [Problem]
        for operation in (OPERATIONS[route.view] for route in described):
            for answer in operation.answers.values():
                kinds += answer.kind if isinstance(answer.kind, tuple) else [answer.kind]
            kinds += [operation.body, operation.problems.kind]
        kinds = [kind for kind in kinds if kind is not None]
        schemas, self.components = msgspec.json.schema_components(kinds, ref_template=_REF)
        self._by_identity = {id(kind): one for kind, one in zip(kinds, schemas, strict=True)}

    def of(self, kind: Any) -> dict[str, Any]:
        """Return the schema of one of these types, which refers to the components."""
        if isinstance(kind, tuple):
            return {"anyOf": [self.of(one) for one in kind]}
        return self._by_identity[id(kind)]


def _operation(
    route: Route, schemas: _Schemas, prefixes: Iterable[str], models: Iterable[Package]
) -> dict[str, Any]:
    declared = OPERATIONS[route.view]
    summary, _, more = inspect.cleandoc(route.view.__doc__ or "").partition("\n")
    tag = _tag(route.view)
    others = sorted({_path(rule) for rule in _at_root(route.rules, prefixes)} - {route.path})
    others = [other for other in others if declared.prefix + other != route.path]
    also = f"Also `{'`, `'.join(others)}`." if others else ""
    operation: dict[str, Any] = {
        "operationId": f"{tag}_{route.view.__name__}",
        "tags": [tag],
        "summary": summary.strip(),
        "description": "\n\n".join(part for part in (more.strip(), also) if part),
        "parameters": [
            *_path_parameters(route),
            *(
                one
                for kind in declared.query
                for one in _query_parameters(kind, of_bytes=bool(declared.binary))
            ),
            *map(_header_parameter, declared.headers),
        ],
        "responses": _responses(declared, schemas),
    }
    if declared.body is not None:
        media: dict[str, Any] = {"schema": schemas.of(declared.body)}
        if declared.examples is not None:
            examples = declared.examples(models)
            media["examples"] = {name: {"value": value} for name, value in examples.items()}
        content = {"application/json": media}
        content |= {kind: _BYTES for kind in declared.binary}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _responses(declared: Operation, schemas: _Schemas) -> dict[str, Any]:
    responses = {}
    for status, answer in declared.answers.items():
        schema = {} if answer.kind is None else {"schema": schemas.of(answer.kind)}
        responses[str(status)] = {
            "description": answer.description or HTTPStatus(status).phrase,
            **_headers((*answer.headers, *declared.always)),
            "content": {answer.media_type: schema} | {kind: _BYTES for kind in answer.binary},
        }
    form = declared.problems
    problems: dict[int, list[type[InfernoError]]] = {}
    for error in dict.fromkeys(declared.errors):
        problems.setdefault(declared.problems.status(error), []).append(error)
    for status, errors in sorted(problems.items()):
        waits = status in (429, 503) or RequestInProgress in errors
        response = {
            "description": "\n".join(f"- `{one.code}`: {_meaning(one)}" for one in errors),
            **_headers((*((RETRY_AFTER,) if waits else ()), *declared.always)),
            "content": {
                form.media_type: {
                    "schema": schemas.of(form.kind)
                    | {"properties": {"code": {"enum": [one.code for one in errors]}}},
                    "example": form.write(errors[0]("What was expected, and what came.")),
                }
            },
        }
        if known := responses.get(str(status)):
            response["content"] |= known["content"]
            response["description"] = f"{known['description']}\n{response['description']}"
        responses[str(status)] = response
    return responses


def _meaning(error: type[InfernoError]) -> str:
    if error is InfernoError:
        return "Something went wrong that nobody foresaw."
    return inspect.cleandoc(error.__doc__ or "").splitlines()[0]


def _headers(headers: Iterable[Header]) -> dict[str, Any]:
    said = {
        one.name: {"description": one.description, "schema": schema_of(one.kind)} for one in headers
    }
    return {"headers": said} if said else {}


def _path_parameters(route: Route) -> Iterator[dict[str, Any]]:
    for name in re.findall(r"{(\w+)}", route.path):
        yield {
            "name": name,
            "in": "path",
            "required": True,
            "description": PATH_PARAMETERS[name],
            "schema": {"type": "string", "pattern": "^[^/]+$"},
        }


def _query_parameters(kind: type, of_bytes: bool) -> Iterator[dict[str, Any]]:
    schema = schema_of(kind)
    for name, one in schema["properties"].items():
        one = _without_null(one)
        parameter = {
            "name": name,
            "in": "query",
            "required": name in schema.get("required", ()),
            "description": _such_as(one.pop("description", ""), *one.pop("examples", ()))
            + (" Only with a body that is no JSON." if of_bytes else ""),
        }
        if of_bytes:
            parameter["required"] = False
        yield parameter | {"schema": one}


def _such_as(description: str, *examples: Any) -> str:
    """Add examples in words: forms would be filled in with those of the document."""
    shown = "".join(f" Such as `{one}`." for one in examples if one is not None)
    return description + shown


def _without_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a parameter may be, which is left out rather than null."""
    choices = [one for one in schema.get("anyOf", ()) if one != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key != "anyOf"}
    if rest.get("default", ...) is None:
        del rest["default"]
    if len(choices) == 1:
        return {**choices[0], **rest}
    return rest | ({"anyOf": choices} if choices else {})


def _header_parameter(header: Header) -> dict[str, Any]:
    return {
        "name": header.name,
        "in": "header",
        "required": False,
        "description": _such_as(header.description, header.example),
        "schema": schema_of(header.kind),
    }


def _tag(view: Callable[..., Any]) -> str:
    return view.__module__.rpartition(".")[2]


def _tags(described: Iterable[Route]) -> list[dict[str, str]]:
    modules = dict.fromkeys(route.view.__module__ for route in described)
    return [
        {
            "name": module.rpartition(".")[2],
            "description": (sys.modules[module].__doc__ or "").strip().splitlines()[0],
        }
        for module in modules
    ]
