"""A model that counts what it computes. It is copied into a package, and wraps its `model.py`.

Each forward pass appends its number of rows to the file that the parameter `ledger` names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from inferno.runtimes import ModelContext

#: Takes and returns arrays by name; their first dimension is the rows.
Model = Callable[[dict[str, Any]], dict[str, Any]]


def build(context: ModelContext) -> Model:
    """Build the wrapped model from the other parameters."""
    parameters = dict(context.parameters)
    ledger = Path(parameters.pop("ledger"))
    # `model.py` exists only in the package.
    build_model = import_module(".model", __package__).build
    model: Model = build_model(replace(context, parameters=parameters))

    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        with ledger.open("a") as file:
            file.write(f"{len(inputs['text'])}\n")
        return model(inputs)

    return run
