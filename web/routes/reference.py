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
    return documents.respond(openapi.document(app, app.extensions["prefixes"], models))


@blueprint.get("/docs")
def page() -> str:
    """Show the document to people, with a form to try each route."""
    return render_template("docs.html")
