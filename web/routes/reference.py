"""The description of this API: a document for programs, and a page that shows it to people."""

from __future__ import annotations

import importlib.resources
from contextlib import suppress
from typing import Any

from flask import Blueprint, Response, current_app, make_response, render_template

from inferno.errors import BrokerUnavailable
from web.calls import documents
from web.openapi import document as openapi
from web.openapi.document import describe
from web.routes.pages import SECURITY_HEADERS
from web.services import services

#: Swagger UI, whose files come with a package: the page needs no other host.
_SWAGGER_UI = importlib.resources.files("flask_swagger_ui") / "dist"

blueprint = Blueprint(
    "reference", __name__, static_folder=str(_SWAGGER_UI), static_url_path="/docs/swagger-ui"
)


@blueprint.get("/openapi.json")
@describe({200: dict[str, Any]})
def document() -> Response:
    """Describe every route, and the predict of every model that is served (OpenAPI 3.1)."""
    app = current_app._get_current_object()  # type: ignore[attr-defined]
    catalog = services().catalog
    # Without Redis, the models are those that were known last.
    with suppress(BrokerUnavailable):
        catalog.refresh()
    models = [model.described for model in catalog.repository.models.values()]
    return documents.respond(openapi.document(app, app.extensions["prefixes"], models))


@blueprint.get("/docs")
def page() -> Response:
    """Show the document to people, with a form to try each route."""
    response = make_response(render_template("docs.html"))
    response.headers.update(SECURITY_HEADERS)
    return response
