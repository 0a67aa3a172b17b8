"""What one version of a model takes and gives over HTTP."""

from __future__ import annotations

import dataclasses

from inferno.protocol.schema import request_schema, response_schema
from inferno.repository.package import Package
from web.openapi.document import ModelSchemas
from web.services import services


def predict_schemas(package: Package) -> ModelSchemas:
    """Return the JSON Schemas of a model's predict, under the limits of the running app."""
    here = services()
    limits = here.limits
    if package.manifest.batching.oversized == "refuse" and package.signature.batched:
        most = package.max_batch_size(here.settings.batching.max_batch_size)
        limits = dataclasses.replace(limits, rows=min(limits.rows, most))
    return {
        "request": request_schema(package.signature, limits),
        "response": response_schema(package.signature),
    }
