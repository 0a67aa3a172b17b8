"""Whether answers are those of the OpenAPI document."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import jsonschema_rs
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException
from werkzeug.test import TestResponse

from web.openapi import document as openapi
from web.openapi.describe import OPERATIONS

#: Nobody receives this one: its client has left.
UNSEEN = {499}


class Conformance:
    """Compares answers with the document of an app."""

    def __init__(self, app: Flask, document: dict[str, Any], of_models: bool = False) -> None:
        """Read the document.

        Args:
          app: whose answers are compared.
          document: of the app.
          of_models: whether predicts are answered with the outputs that the models declare.
        """
        self._app = app
        self._document = strict(document)
        self._operations = {
            (route.view, route.method): self._document["paths"][route.path][route.method]
            for route in openapi.routes(app, app.extensions["prefixes"])
            if route.view in OPERATIONS
        }
        self._of_models = of_models
        self._validators: dict[int, Any] = {}

    def check(
        self, method: str, path: str, status: int, headers: Mapping[str, str] | Headers, body: bytes
    ) -> None:
        """Fail unless the document has this answer to a request.

        Raises:
          AssertionError: it is not documented.
        """
        asked = f"{method} {path}"
        media_type = headers.get("Content-Type", "").partition(";")[0]
        try:
            endpoint, _ = self._app.url_map.bind("").match(path, method)
        except HTTPException:
            if path == "/v2" or path.startswith("/v2/"):
                self._validate(self._document["components"]["schemas"]["OipError"], body)
                return
            # A WebSocket was expected there, or nothing is.
            assert status in (400, 403, 404, 405, 421, 426), asked
            assert media_type == "application/problem+json", asked
            self._validate(self._document["components"]["schemas"]["Problem"], body)
            return
        operation = self._operations.get((self._app.view_functions[endpoint], method.lower()))
        if self._of_models:
            own = self._document["paths"].get(path, {})
            operation = own.get(method.lower(), operation)
        if operation is None or status in UNSEEN:
            return
        documented = operation["responses"].get(str(status))
        assert documented, f"{asked}: {status} is not documented: {body!r}"
        content = documented["content"].get(media_type)
        assert content, f"{asked}: {media_type} is not documented"
        if media_type.endswith("json"):
            self._validate(content["schema"], body)
        given = {name for name in NAMED if name in headers}
        assert given <= set(documented.get("headers", ())), f"{asked}: {given}"

    def _validate(self, schema: dict[str, Any], body: bytes) -> None:
        validator = self._validators.get(id(schema))
        if validator is None:
            whole = {"components": self._document["components"]} | schema
            validator = self._validators[id(schema)] = jsonschema_rs.Draft202012Validator(whole)
        error = next(validator.iter_errors(json.loads(body)), None)
        assert error is None, f"{error}\n{body!r}"


#: Headers that the document must name where they are given.
NAMED = ("Location", "Retry-After", "Preference-Applied", "Idempotency-Replayed")


def strict(document: dict[str, Any]) -> dict[str, Any]:
    """Return a document by which objects have no members but those that it names."""
    document = copy.deepcopy(document)
    pending: list[Any] = [document]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            if node.get("type") == "object" and "properties" in node:
                node.setdefault("additionalProperties", False)
            pending += node.values()
        elif isinstance(node, list):
            pending += node
    return document


class CheckedClient(FlaskClient):
    """A client that compares every answer with the document."""

    conformance: Conformance

    def open(self, *args: Any, **kwargs: Any) -> TestResponse:
        response = super().open(*args, **kwargs)
        asked = response.request
        if asked.method in ("HEAD", "OPTIONS"):
            return response
        self.conformance.check(
            asked.method, asked.path, response.status_code, response.headers, response.data
        )
        return response
