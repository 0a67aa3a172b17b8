"""The reference of this API: the OpenAPI document, and a page that shows it."""

from __future__ import annotations

import importlib.resources
from contextlib import suppress
from typing import Any

from flask import Blueprint, Response, current_app, render_template

from inferno.errors import BrokerUnavailable
from web.calls import documents
from web.openapi import document as openapi
from web.openapi.describe import describe
from web.services import services

#: Files of Swagger UI, from a package: the page loads nothing from other hosts.
_SWAGGER_UI = importlib.resources.files("flask_swagger_ui") / "dist"

#: Extension of the app that holds the document as JSON, and what it was made of.
_BUILT = "openapi-document"

blueprint = Blueprint(
    "reference", __name__, static_folder=str(_SWAGGER_UI), static_url_path="/docs/swagger-ui"
)


@blueprint.get("/openapi.json")
@describe({200: dict[str, Any]})
def document() -> Response:
    """Describe every route, and the predict of every served model (OpenAPI 3.1)."""
    app = current_app._get_current_object()  # type: ignore[attr-defined]
    catalog = services().catalog
    # Without Redis, the document shows the models that were read last.
    with suppress(BrokerUnavailable):
        catalog.refresh()
    models = [model.described for model in catalog.repository.models.values()]
    # Building takes 45 ms of the event loop, so it is done once for each change of the models.
    seen = [(package.path, package.seen) for package in models]
    known, body = app.extensions.get(_BUILT, (None, b""))
    if known != seen:
        body = documents.encode(openapi.document(app, app.extensions["prefixes"], models))
        app.extensions[_BUILT] = seen, body
    return Response(body, mimetype="application/json")


@blueprint.get("/docs")
def page() -> str:
    """Show the document to people, with a form to try each route."""
    return render_template("docs.html")
