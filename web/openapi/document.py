"""The OpenAPI document, made of the routes of an app and what their views declare.

A route that exists under several paths is described once, at the uppermost of them. The tag of a
view is its module, or its package if that is not `web.routes`; their docstrings describe the tags.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
from flask import Flask
from werkzeug.routing import Rule

from inferno.errors import ForeignOrigin, InfernoError, Misdirected, Problem, RequestInProgress
from inferno.protocol.schema import schema_of
from inferno.repository.package import Package
from inferno.version import inferno_version
from web.openapi.describe import OPERATIONS, RETRY_AFTER, Header, Operation

#: Media type object of a body that is not JSON.
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_REF = "#/components/schemas/{name}"

#: Descriptions of the variable parts of paths.
PATH_PARAMETERS = {
    "model": "Name of the model.",
    "name": "Name of the model.",
    "task_id": "Id of the task.",
    "version": "Version of the model.",
}

DESCRIPTION = """\
Every call is a durable job, and every job runs in a well-formed batch.

Every route exists at the root, under `/v1` and under `/api/v1`; each is described once here.
Bodies need no `Content-Type`. Errors are problems (RFC 9457); programs read their `code`.
WebSockets (`/ws`, `/ws/{task_id}`) are described in the documentation of the API."""


class Route(NamedTuple):
    """One operation of the document, and every rule that leads to its view."""

    path: str
    method: str
    view: Callable[..., Any]
    rules: list[Rule]


def routes(app: Flask, prefixes: Iterable[str]) -> Iterator[Route]:
    """Yield every route of an app except WebSockets, described or not."""
    found: dict[tuple[Any, ...], list[Rule]] = {}
    for rule in app.url_map.iter_rules():
        view = app.view_functions[rule.endpoint]
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            if not rule.websocket:
                found.setdefault((view, method, frozenset(rule.arguments)), []).append(rule)
    for (view, method, _), rules in found.items():
        operation = OPERATIONS.get(view)
        # Decorators apply from the bottom up, so the last rule is the uppermost one.
        uppermost = _at_root(rules, prefixes)[-1]
        prefix = "" if operation is None else operation.prefix
        yield Route(prefix + _path(uppermost), method.lower(), view, rules)


def _at_root(rules: list[Rule], prefixes: Iterable[str]) -> list[Rule]:
    """Leave out the rules that repeat another rule under a prefix."""
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
      app: the app whose routes are described.
      prefixes: prefixes under which its routes exist.
      models: versions that answer requests without a version.
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
    """Return the operation of the path that one model has for itself."""
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
    """JSON Schemas of every type that the described routes name."""

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
        """Return the schema of one of these types; it refers to the components."""
        if isinstance(kind, tuple):
            return {"anyOf": [self.of(one) for one in kind]}
        return self._by_identity[id(kind)]


def _operation(
    route: Route, schemas: _Schemas, prefixes: Iterable[str], models: Iterable[Package]
) -> dict[str, Any]:
    declared = OPERATIONS[route.view]
    summary, _, more = inspect.cleandoc(route.view.__doc__ or "").partition("\n")
    tag = _tag(_family(route.view))
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
        "responses": _responses(declared, _errors(route), schemas),
    }
    if declared.body is not None:
        operation["requestBody"] = _request_body(declared, schemas, models)
    return operation


def _request_body(
    declared: Operation, schemas: _Schemas, models: Iterable[Package]
) -> dict[str, Any]:
    media: dict[str, Any] = {"schema": schemas.of(declared.body)}
    if declared.examples is not None:
        examples = declared.examples(models)
        media["examples"] = {name: {"value": value} for name, value in examples.items()}
    content = {"application/json": media} | {kind: _BYTES for kind in declared.binary}
    return {"required": True, "content": content}


def _errors(route: Route) -> Iterator[type[InfernoError]]:
    """Yield the errors that a view declares, and those of calls that never reach it."""
    yield from OPERATIONS[route.view].errors
    yield from (ForeignOrigin, Misdirected)


def _responses(
    declared: Operation, errors: Iterable[type[InfernoError]], schemas: _Schemas
) -> dict[str, Any]:
    responses = {}
    for status, answer in declared.answers.items():
        schema = {} if answer.kind is None else {"schema": schemas.of(answer.kind)}
        responses[str(status)] = {
            "description": answer.description or HTTPStatus(status).phrase,
            **_headers((*answer.headers, *declared.always)),
            "content": {answer.media_type: schema} | {kind: _BYTES for kind in answer.binary},
        }
    problems: dict[int, list[type[InfernoError]]] = {}
    for error in dict.fromkeys(errors):
        problems.setdefault(declared.problems.status(error), []).append(error)
    for status, shared in sorted(problems.items()):
        response = _problem(declared, status, shared, schemas)
        if known := responses.get(str(status)):
            response["content"] |= known["content"]
            response["description"] = f"{known['description']}\n{response['description']}"
        responses[str(status)] = response
    return responses


def _problem(
    declared: Operation, status: int, errors: list[type[InfernoError]], schemas: _Schemas
) -> dict[str, Any]:
    """Return the response object of the errors that share a status."""
    form = declared.problems
    waits = status in (429, 503) or RequestInProgress in errors
    return {
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


def _meaning(error: type[InfernoError]) -> str:
    if error is InfernoError:
        return "An unexpected error; the log of the server has the details."
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
            + (" Only with a body that is not JSON." if of_bytes else ""),
        }
        if of_bytes:
            parameter["required"] = False
            # Swagger UI sends defaults, and with a JSON body every parameter is refused.
            one.pop("default", None)
        yield parameter | {"schema": one}


def _such_as(description: str, *examples: Any) -> str:
    """Add examples in words: a field for them would prefill the forms of Swagger UI."""
    shown = "".join(f" Such as `{one}`." for one in examples if one is not None)
    return description + shown


def _without_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a parameter without null: such a parameter is left out."""
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


def _family(view: Callable[..., Any]) -> ModuleType:
    """Return the module or package whose views share a tag with this one."""
    package = view.__module__.rpartition(".")[0]
    return sys.modules[view.__module__ if package == "web.routes" else package]


def _tag(family: ModuleType) -> str:
    return family.__name__.rpartition(".")[2]


def _tags(described: Iterable[Route]) -> list[dict[str, str]]:
    families = dict.fromkeys(_family(route.view) for route in described)
    return [
        {
            "name": _tag(family),
            "description": (family.__doc__ or "").strip().splitlines()[0],
        }
        for family in families
    ]
