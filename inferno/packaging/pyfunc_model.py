"""A model of MLflow's flavour python_function, called as MLflow would call it.

`inferno models new` copies this file into packages as `model.py`, beside the folder `mlflow`; so it
imports nothing of Inferno's.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np


def build(context: Any) -> Any:
    """Load the model with the module that it names.

    Args:
      context: with what MLmodel says in its parameters: `loader_module`, `data`, `code`, and how
        inputs are handed over.
    """
    told = context.parameters
    folder = context.path / "mlflow"
    if told["code"]:
        # As MLflow does: its code imports its own modules by their names.
        sys.path.insert(0, str(folder / told["code"]))
    loader = importlib.import_module(told["loader_module"])
    model = loader._load_pyfunc(str(folder / told["data"]))

    def predict(inputs: dict[str, Any]) -> dict[str, Any]:
        given: Any = dict(inputs)
        if told["columns"]:
            import pandas as pd

            given = pd.DataFrame(given)
        elif not told["named"]:
            (given,) = inputs.values()
        return _named(model.predict(given), told["outputs"])

    return predict


def _named(made: Any, names: list[str]) -> dict[str, Any]:
    if isinstance(made, dict):
        return {str(name): np.asarray(value) for name, value in made.items()}
    if hasattr(made, "columns") and len(names) == len(made.columns):
        return {name: made.iloc[:, place].to_numpy() for place, name in enumerate(names)}
    if isinstance(made, tuple) and len(made) == len(names):
        return {name: np.asarray(value) for name, value in zip(names, made, strict=True)}
    return {names[0] if names else "output": np.asarray(made)}
