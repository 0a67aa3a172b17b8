"""The front page: the served models, each with a form to try it."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, render_template

from inferno.errors import BrokerUnavailable, for_callers
from inferno.protocol.signature import TensorSpec
from inferno.repository.manifest import Manifest
from inferno.repository.repository import Model
from web.routes.models import batching
from web.services import Services, services

blueprint = Blueprint("pages", __name__)

#: Labels of a model whose images can be drawn by hand.
DIGITS = tuple("0123456789")

#: Size of a free dimension in a sample, and the most numbers that a sample may have.
FREE_SIZE, LARGEST_SAMPLE = 3, 256


@dataclass(frozen=True)
class Field:
    """One input of a form."""

    name: str
    #: `text`, `image` or `json`.
    kind: str
    description: str
    sample: str
    #: Whether the page offers to draw the image.
    drawable: bool


@dataclass(frozen=True)
class Card:
    """One model on the page."""

    model: Model
    manifest: Manifest
    fields: list[Field]
    batching: dict[str, Any]
    loaded: list[int]
    ready: bool


@blueprint.get("/")
def front() -> str:
    """Show the platform to people."""
    here = services()
    workers, loaded, outage = 0, {}, ""
    try:
        workers, loaded = len(here.cluster.workers()), here.loaded()
    except BrokerUnavailable as exc:
        outage = exc.detail
    served = here.repository.ready(loaded.__contains__)
    return render_template(
        "front.html",
        cards=[card(model, here, loaded, served) for model in here.repository.models.values()],
        broken={name: for_callers(why) for name, why in here.repository.errors.items()},
        workers=workers,
        ready=len(served),
        outage=outage,
        flower_url=here.settings.flower_url,
    )


def card(model: Model, here: Services, loaded: dict[str, set[int]], served: Set[str]) -> Card:
    """Return the card of a model."""
    package = model.described
    return Card(
        model=model,
        manifest=package.manifest,
        fields=[field(spec, package.manifest) for spec in package.signature.inputs],
        batching=batching(package, here.settings.batching),
        loaded=sorted(loaded.get(model.name, ())),
        ready=model.name in served,
    )


def field(spec: TensorSpec, manifest: Manifest) -> Field:
    """Return the form field of an input, filled in with the warm-up sample if there is one."""
    given = (manifest.warm_up.inputs or {}).get(spec.name)
    kind = {"string": "text", "bytes": "image"}.get(spec.dtype, "json")
    if kind == "text":
        sample = given if isinstance(given, str) else ""
    elif kind == "json":
        sample = _rows(given if given is not None else _zeros(spec))
    else:
        sample = ""
    drawable = spec.content == "image" and manifest.labels == DIGITS
    return Field(spec.name, kind, spec.description or "", sample, drawable)


def _zeros(spec: TensorSpec) -> Any:
    # The sample is one row, without the batch dimension.
    sizes = spec.shape[1:] if spec.batched else spec.shape
    value: Any = 0
    count = 1
    for size in reversed(sizes):
        length = size if isinstance(size, int) else FREE_SIZE
        count *= length
        value = [value] * length
        if count > LARGEST_SAMPLE:
            return None
    return value


def _rows(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[" + ",\n ".join(json.dumps(row) for row in value) + "]"
    return json.dumps(value)
