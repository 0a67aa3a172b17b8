"""JSON Schemas of a model's predict; used by the routes of models and by the OpenAPI document."""

from __future__ import annotations

import dataclasses

from inferno.protocol.schema import request_schema, response_schema
from inferno.repository.package import Package
from web.openapi.describe import ModelSchemas
from web.services import services


def predict_schemas(package: Package) -> ModelSchemas:
    """Return the JSON Schemas of a model's predict, under the limits of the running app."""
    here = services()
    limits = here.gateway.limits
    if package.manifest.batching.oversized == "refuse" and package.signature.batched:
        most = package.max_batch_size(here.settings.batching.max_batch_size)
        limits = dataclasses.replace(limits, rows=min(limits.rows, most))
    return {
        "request": request_schema(package.signature, limits),
        "response": response_schema(package.signature),
    }
