"""A web process and a worker with a few models, for real clients of other servers' protocols."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferno.testing.processes import redis_server, web, worker

CODE = """
import time
import numpy as np

def add(inputs):
    total = inputs["a"] + inputs["b"]
    return {"sum": total, "total": total.sum(axis=1, dtype=np.float64)}

def types(inputs):
    texts = np.array([text.upper() for text in inputs["text"]], object)
    return {
        "text": texts,
        "blob": np.array([blob[::-1] for blob in inputs["blob"]], object),
        "half": inputs["half"] * 2,
        "flag": ~inputs["flag"],
    }

def slow(inputs):
    time.sleep(0.02)
    return {"x": inputs["x"]}

def say(inputs):
    return {"answer": np.array([f"You said {text}." for text in inputs["text"]], object)}

def classes(inputs):
    return {"scores": inputs["scores"]}

def build(context):
    return globals()[context.parameters["function"]]
"""


def tensor(name: str, dtype: str, *shape: str | int) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": ["batch", *shape]}


MODELS: dict[str, dict[str, Any]] = {
    "add": {
        "signature": {
            "inputs": [tensor("a", "float32", "n"), tensor("b", "float32", "n")],
            "outputs": [tensor("sum", "float32", "n"), tensor("total", "float64")],
        },
        "batching": {"max_batch_size": 16, "max_batch_delay_ms": 5},
    },
    "types": {
        "signature": {
            "inputs": [
                tensor("text", "string"),
                tensor("blob", "bytes"),
                tensor("half", "float16", 2),
                tensor("flag", "bool"),
            ],
            "outputs": [
                tensor("text", "string"),
                tensor("blob", "bytes"),
                tensor("half", "float16", 2),
                tensor("flag", "bool"),
            ],
        }
    },
    "slow": {
        "signature": {
            "inputs": [tensor("x", "float32", 1)],
            "outputs": [tensor("x", "float32", 1)],
        },
        "batching": {"max_batch_size": 8},
    },
    "say": {
        "task": "generation",
        "signature": {
            "inputs": [tensor("text", "string")],
            "outputs": [tensor("answer", "string")],
        },
    },
    "classes": {
        "labels": ["cat", "dog", "fish"],
        "signature": {
            "inputs": [tensor("scores", "float32", 3)],
            "outputs": [tensor("scores", "float32", 3)],
        },
    },
}


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Host and port of a platform that serves `MODELS`, `add` in two versions."""
    folder = tmp_path_factory.mktemp("conformance")
    for name, fields in MODELS.items():
        for version in (1, 2) if name == "add" else (1,):
            package = folder / "models" / name / str(version)
            package.mkdir(parents=True)
            (package / "model.py").write_text(CODE)
            manifest = {
                "name": name,
                "version": version,
                "format": "python",
                "entrypoint": "model:build",
                "parameters": {"function": name},
                **fields,
            }
            (package / "model.yaml").write_text(yaml.safe_dump(manifest))
    broken = folder / "models" / "broken" / "1"
    broken.mkdir(parents=True)
    (broken / "model.yaml").write_text("name: broken\nversion: 1\n")
    with redis_server(folder) as redis_url:
        env = {
            "INFERNO_REDIS__URL": redis_url,
            "INFERNO_REPOSITORY__ROOT": str(folder / "models"),
            "INFERNO_LIMITS__MAX_BODY_BYTES": "200000",
        }
        with (
            worker(",".join(MODELS), env, folder / "worker.log"),
            web(env, folder / "web.log") as place,
        ):
            yield place


@pytest.fixture(scope="session")
def kserve_client() -> Any:
    """The client module of kserve, without the server that `import kserve` loads as well."""
    package = types.ModuleType("kserve")
    package.__path__ = [str(Path(str(metadata.distribution("kserve").locate_file("kserve"))))]
    sys.modules.setdefault("kserve", package)
    from kserve import inference_client

    return inference_client
