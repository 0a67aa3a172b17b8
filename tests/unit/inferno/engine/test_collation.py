"""Batched is the same as alone: generated models in every runtime, and the default models.

A member's answer may differ only by the rounding of arithmetic in another order: see
`TOLERANCE`. `INFERNO_TEST_EXAMPLES` is the number of examples of each test; few by default.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from inferno.engine.engine import Engine
from inferno.protocol.tensors import Array, Tensors
from inferno.repository.package import Package
from inferno.repository.repository import Repository
from inferno.settings import BatchingSettings, InferenceSettings, RepositorySettings
from inferno.testing.processes import ROOT

EXAMPLES = int(os.environ.get("INFERNO_TEST_EXAMPLES", "0"))
MODELS = ROOT / "models"
#: Features of one step of a sequence.
WIDTH = 6

#: Allowed difference of an output, relative to the largest value, by the precision of the artifact.
#: Integers, texts and bytes are equal. In int8, the scale of the activations is that of the whole
#: batch with its padding; the generated model is so small that nothing averages that out.
TOLERANCE = {"float64": 5e-15, "float32": 2e-6, "float16": 2e-2, "bf16": 0.05, "int8": 0.3}
#: Outputs that are not compared: they are the time of the pass.
TIMES = {"latency_ms"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    # A run with more examples needs no time limit.
    pytest.mark.timeout(0 if EXAMPLES else 120),
]


def examples(default: int) -> settings:
    return settings(
        max_examples=EXAMPLES or default,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def assert_as_alone(
    engine: Engine, members: Sequence[Tensors], tolerance: float | None = None
) -> None:
    """Answer members together and each alone, and compare."""
    prepared = [engine.prepare(member) for member in members]
    together = engine.forward(prepared)
    for member, answer in zip(members, together, strict=True):
        [alone] = engine.forward([engine.prepare(member)])
        assert answer.keys() == alone.keys()
        for name, got in answer.items():
            if name in TIMES:
                continue
            expected = alone[name]
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
            if got.dtype.kind != "f":
                np.testing.assert_array_equal(got, expected, err_msg=name)
                continue
            allowed = TOLERANCE[got.dtype.name] if tolerance is None else tolerance
            scale = max(float(abs(expected).max(initial=0)), 1.0)
            np.testing.assert_allclose(got, expected, rtol=0, atol=allowed * scale, err_msg=name)


# Generated models: attention-like pooling of sequences under a mask, and a value per step


class Pooling(torch.nn.Module):
    """Maps `steps` [rows, n, WIDTH] and `mask` [rows, n] to the masked mean and values per step."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.dense.weight = torch.nn.Parameter(weight)

    def forward(self, steps: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        product = torch.tanh(self.dense(steps))
        seen = mask.unsqueeze(2).to(product.dtype)
        return (product * seen).sum(1) / seen.sum(1), product


POOLING = """
from tests.unit.inferno.engine.test_collation import Pooling, weight

def build(context):
    return Pooling(weight())
"""
CALLABLE = """
import numpy as np
from tests.unit.inferno.engine.test_collation import weight

def build(context):
    w = weight().numpy().T

    def model(inputs):
        product = np.tanh(inputs["steps"] @ w)
        seen = inputs["mask"][:, :, None].astype(product.dtype)
        return {"mean": (product * seen).sum(1) / seen.sum(1), "product": product}

    return model
"""


def weight() -> torch.Tensor:
    return torch.empty(WIDTH, WIDTH).normal_(generator=torch.Generator().manual_seed(1))


def onnx_pooling() -> bytes:
    nodes = [
        helper.make_node("MatMul", ["steps", "w"], ["dense"]),
        helper.make_node("Tanh", ["dense"], ["product"]),
        helper.make_node("Cast", ["mask"], ["seen"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["seen", "two"], ["seen3"]),
        helper.make_node("Mul", ["product", "seen3"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "one"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["seen3", "one"], ["count"], keepdims=0),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
    ]
    floats = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes,
        "pooling",
        [
            floats("steps", shape=["batch", "n", WIDTH]),
            helper.make_tensor_value_info("mask", TensorProto.INT64, ["batch", "n"]),
        ],
        [floats("mean", shape=["batch", WIDTH]), floats("product", shape=["batch", "n", WIDTH])],
        [
            numpy_helper.from_array(weight().numpy().T.copy(), "w"),
            numpy_helper.from_array(np.array([1]), "one"),
            numpy_helper.from_array(np.array([2]), "two"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    raw: bytes = model.SerializeToString()
    return raw


@contextmanager
def written(manifest: dict[str, Any], files: dict[str, str | bytes]) -> Iterator[Package]:
    """Write a package into a folder of its own."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "model" / "1"
        folder.mkdir(parents=True)
        for name, content in files.items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        named = {"name": "model", "version": 1} | manifest
        (folder / "model.yaml").write_text(yaml.safe_dump(named))
        yield Package.read(folder)


def load(package: Package, **inference: Any) -> Engine:
    return Engine(
        package,
        BatchingSettings(max_batch_size=64),
        InferenceSettings(**({"device": "cpu", "threads": 1} | inference)),
    )


@functools.cache
def pooling(kind: str, quantize: str, buckets: tuple[int, ...], sizes: tuple[int, ...]) -> Engine:
    manifest: dict[str, Any] = {
        "format": kind,
        "signature": {
            "inputs": [{"name": "steps", "dtype": "float32", "shape": ["batch", "n", WIDTH]}],
            "outputs": [
                {"name": "mean", "dtype": "float32", "shape": ["batch", WIDTH]},
                {"name": "product", "dtype": "float32", "shape": ["batch", "n", WIDTH]},
            ],
        },
        "batching": {
            # Not 0, so that padding which leaks into a result shows.
            "pad": {"steps": 3},
            "mask": {"steps": "mask"},
            "buckets": list(buckets),
            "batch_sizes": list(sizes),
        },
    }
    if kind == "onnx":
        files: dict[str, str | bytes] = {"model.onnx": onnx_pooling()}
    elif kind == "torchscript":
        with tempfile.NamedTemporaryFile() as file:
            torch.jit.save(torch.jit.script(Pooling(weight())), file.name)
            files = {"model.ts": Path(file.name).read_bytes()}
    else:
        manifest |= {"format": "python", "entrypoint": "model:build"}
        files = {"model.py": POOLING if kind == "module" else CALLABLE}
    with written(manifest, files) as package:
        return load(package, quantize=quantize)


KINDS = [
    ("onnx", "none"), ("torchscript", "none"), ("module", "none"), ("callable", "none"),
    ("onnx", "int8"), ("module", "int8"), ("module", "bf16"), ("torchscript", "bf16"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "quantize"), KINDS)
@examples(25)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 20)), min_size=1, max_size=8),
    buckets=st.sampled_from([(), (4, 16)]),
    batch_sizes=st.sampled_from([(), (2, 8, 32)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sequences_of_any_length_are_answered_in_a_batch_as_alone(
    kind: str,
    quantize: str,
    sizes: list[tuple[int, int]],
    buckets: tuple[int, ...],
    batch_sizes: tuple[int, ...],
    seed: int,
) -> None:
    engine = pooling(kind, quantize, buckets, batch_sizes)
    source = np.random.default_rng(seed)
    members: list[Tensors] = [
        {"steps": source.standard_normal((rows, n, WIDTH), np.float32)} for rows, n in sizes
    ]
    assert_as_alone(engine, members, None if quantize == "none" else TOLERANCE[quantize])


# Generated signatures: any dtypes and shapes, returned by each runtime that supports them


@dataclass(frozen=True)
class Field:
    """One tensor of a generated signature."""

    dtype: str
    #: Sizes after the rows; None for a free dimension, which is padded.
    shape: tuple[int | None, ...]


NUMBERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "float16", "float32", "float64")
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
#: One package each, so that hypothesis does not create hundreds.
SHAPES: list[tuple[Field, ...]] = [
    tuple(Field(dtype, ()) for dtype in (*NUMBERS, "string", "bytes")),
    tuple(Field(dtype, (3,)) for dtype in (*NUMBERS, "string", "bytes")),
    tuple(Field(dtype, (None,)) for dtype in (*NUMBERS, "string", "bytes")),
    tuple(Field(dtype, (2, None)) for dtype in NUMBERS),
    tuple(Field(dtype, (None, 3, None)) for dtype in (*NUMBERS, "string")),
]


def onnx_identity(fields: Sequence[Field]) -> bytes:
    """Return a graph that returns its inputs."""
    inputs, outputs, nodes = [], [], []
    for n, field in enumerate(fields):
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(field.dtype))
        shape = ["batch", *(s or f"free{n}_{k}" for k, s in enumerate(field.shape))]
        inputs.append(helper.make_tensor_value_info(f"in{n}", dtype, shape))
        outputs.append(helper.make_tensor_value_info(f"out{n}", dtype, shape))
        nodes.append(helper.make_node("Identity", [f"in{n}"], [f"out{n}"]))
    graph = helper.make_graph(nodes, "identity", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    raw: bytes = model.SerializeToString()
    return raw


class Identity(torch.nn.Module):
    def forward(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name.replace("in", "out"): tensor for name, tensor in inputs.items()}


IDENTITIES = {
    "callable": """
def build(context):
    return lambda inputs: {name.replace("in", "out"): array for name, array in inputs.items()}
""",
    "module": """
from tests.unit.inferno.engine.test_collation import Identity

def build(context):
    return Identity()
""",
}


@functools.cache
def identity(kind: str, fields: tuple[Field, ...]) -> Engine:
    def tensors(prefix: str) -> list[dict[str, Any]]:
        return [
            {
                "name": f"{prefix}{n}",
                "dtype": field.dtype,
                "shape": ["batch", *(s or f"free{n}_{k}" for k, s in enumerate(field.shape))],
            }
            for n, field in enumerate(fields)
        ]

    pad = {
        f"in{n}": "" if field.dtype in ("string", "bytes") else 1
        for n, field in enumerate(fields)
        if None in field.shape
    }
    manifest: dict[str, Any] = {
        "format": "python",
        "entrypoint": "model:build",
        "signature": {"inputs": tensors("in"), "outputs": tensors("out")},
        "batching": {"pad": pad},
    }
    files: dict[str, str | bytes] = {}
    if kind == "onnx":
        manifest |= {"format": "onnx", "entrypoint": None}
        files = {"model.onnx": onnx_identity(fields)}
    else:
        files = {"model.py": IDENTITIES[kind]}
    with written({k: v for k, v in manifest.items() if v is not None}, files) as package:
        return load(package)


@st.composite
def tensors_of(draw: st.DrawFn, fields: Sequence[Field]) -> list[Tensors]:
    """Draw members of one to three rows, each with free dimensions of sizes of its own."""
    members = []
    for _ in range(draw(st.integers(1, 5))):
        rows = draw(st.integers(1, 3))
        source = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        word = draw(WORDS)
        member: Tensors = {}
        for n, field in enumerate(fields):
            shape = (rows, *(s or int(source.integers(1, 6)) for s in field.shape))
            member[f"in{n}"] = _drawn(source, field.dtype, shape, word)
        members.append(member)
    return members


def _drawn(source: np.random.Generator, dtype: str, shape: tuple[int, ...], word: str) -> Array:
    if dtype in ("string", "bytes"):
        array = np.empty(shape, object)
        for place in np.ndindex(shape):
            text = word * int(source.integers(0, 3))
            array[place] = text if dtype == "string" else text.encode()
        return array
    if dtype.startswith("float"):
        return source.standard_normal(shape).astype(dtype)
    return source.integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)


@pytest.mark.parametrize("kind", ["callable", "module", "onnx"])
@examples(20)
@given(data=st.data())
def test_tensors_of_any_dtype_and_shape_come_back_as_they_went_in(
    kind: str, data: st.DataObject
) -> None:
    # Given a signature, reduced to the types that the runtime supports
    drawn = data.draw(st.sampled_from(SHAPES))
    fields = tuple(f for f in drawn if kind == "callable" or f.dtype not in ("string", "bytes"))
    engine = identity(kind, fields)
    members = data.draw(tensors_of(fields))
    # When members of different sizes share a pass, then each gets its own back
    for member, answer in zip(members, engine.forward(members), strict=True):
        for n, field in enumerate(fields):
            np.testing.assert_array_equal(answer[f"out{n}"], member[f"in{n}"])
            if field.dtype in NUMBERS:
                assert answer[f"out{n}"].dtype == np.dtype(field.dtype)


# The default models

#: Allowed difference of their outputs, if larger than that of float32. Version 1 of `embed` takes
#: the range of its activations from the whole batch: in vectors of length 1, each component may
#: differ by 0.15, and the cosine is at least 0.95.
SHIPPED = {
    ("digits", 1): 1e-5, ("digits", 2): 1e-5, ("echo", 1): 0.0, ("mock", 1): 0.0,
    ("embed", 1): 0.15, ("embed", 2): 1e-5, ("sentiment", 1): 1e-4,
}  # fmt: skip
MIN_COSINE = 0.95

repository = Repository.read(RepositorySettings(root=MODELS))


@functools.cache
def shipped(model: str, version: int) -> Engine:
    return load(repository.model(model).package(version))


def inputs_of(model: str, source: np.random.Generator, words: Sequence[str]) -> Tensors:
    """Return random inputs for a default model."""
    rows = int(source.integers(1, 4))
    if model == "digits":
        ink = source.integers(0, 17, (rows, 8, 8)).astype(np.float32)
        return {"pixels": np.maximum(ink, np.float32(16) * np.eye(8, dtype=np.float32))}
    texts = np.empty(rows, object)
    for row in range(rows):
        texts[row] = " ".join(source.choice(words, int(source.integers(1, 30))))
    return {"text": texts}


def test_every_default_model_has_its_tolerance() -> None:
    assert repository.errors == {}
    # An ensemble collates nothing itself.
    found = {
        (name, version)
        for name, model in repository.models.items()
        for version, package in model.versions.items()
        if not package.is_ensemble
    }
    assert found == set(SHIPPED)


@pytest.mark.parametrize(("model", "version"), SHIPPED)
@examples(4)
@given(
    members=st.integers(2, 6),
    words=st.lists(WORDS.filter(str.strip), min_size=1, max_size=20),
    seed=st.integers(0, 2**32 - 1),
)
def test_default_models_answer_in_a_batch_as_alone(
    model: str, version: int, members: int, words: list[str], seed: int
) -> None:
    engine = shipped(model, version)
    source = np.random.default_rng(seed)
    asked = [inputs_of(model, source, words) for _ in range(members)]
    assert_as_alone(engine, asked, SHIPPED[model, version])
    if model == "embed":
        together = engine.forward([engine.prepare(member) for member in asked])
        for member, answer in zip(asked, together, strict=True):
            [alone] = engine.forward([engine.prepare(member)])
            cosine = (answer["embedding"] * alone["embedding"]).sum(axis=1)
            assert cosine.min() >= MIN_COSINE
