"""A model of MLflow's flavor python_function, called as MLflow calls it.

`inferno models new` copies this file into packages as `model.py`, beside the folder `mlflow`.
Therefore it imports nothing from Inferno.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np


def build(context: Any) -> Any:
    """Load the model with its loader module.

    Args:
      context: its parameters come from MLmodel: `loader_module`, `data`, `code`, and how inputs are
        passed.
    """
    parameters = context.parameters
    folder = context.path / "mlflow"
    if parameters["code"]:
        # As MLflow does, so that the model's code can import its modules by name.
        sys.path.insert(0, str(folder / parameters["code"]))
    loader = importlib.import_module(parameters["loader_module"])
    model = loader._load_pyfunc(str(folder / parameters["data"]))

    def predict(inputs: dict[str, Any]) -> dict[str, Any]:
        given: Any = dict(inputs)
        if parameters["columns"]:
            import pandas as pd

            given = pd.DataFrame(given)
        elif not parameters["named"]:
            (given,) = inputs.values()
        return _named(model.predict(given), parameters["outputs"])

    return predict


def _named(made: Any, names: list[str]) -> dict[str, Any]:
    if isinstance(made, dict):
        return {str(name): np.asarray(value) for name, value in made.items()}
    if hasattr(made, "columns") and len(names) == len(made.columns):
        return {name: made.iloc[:, place].to_numpy() for place, name in enumerate(names)}
    if isinstance(made, tuple) and len(made) == len(names):
        return {name: np.asarray(value) for name, value in zip(names, made, strict=True)}
    return {names[0] if names else "output": np.asarray(made)}
