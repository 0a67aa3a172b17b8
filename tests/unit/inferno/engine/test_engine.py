"""Engines of small real packages: batched is the same as alone, and outputs are checked."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferno.batching.latency import LatencyCurve
from inferno.engine.collation import chunks, count_rows
from inferno.engine.device import choose_device
from inferno.engine.engine import Engine
from inferno.errors import ForwardFailed, InvalidInput, PackageError
from inferno.protocol.tensors import Tensors
from inferno.repository.package import Package
from inferno.settings import BatchingSettings, InferenceSettings
from tests.unit.inferno.conftest import WritePackage

Build = Callable[..., Engine]

#: A sum over the free dimension: padding with another value than 0 would change it.
SUM = """
def build(context):
    def model(inputs):
        model.batches.append({name: array.shape for name, array in inputs.items()})
        return {"y": inputs["x"].sum(axis=1)}
    model.batches = []
    return model
"""

SUM_SIGNATURE = {
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", "n"]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"]}],
}

TEXT_SIGNATURE = {
    "inputs": [{"name": "text", "dtype": "string", "shape": ["batch"]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"]}],
}


def load(package: Package, max_batch_size: int = 8) -> Engine:
    return Engine(
        package,
        BatchingSettings(max_batch_size=max_batch_size),
        InferenceSettings(device="cpu", threads=1),
    )


@pytest.fixture
def engine(package: Callable[..., Package]) -> Build:
    """Return a function that loads a model from the source of its `model.py`."""

    def build(source: str, *, max_batch_size: int = 8, **fields: Any) -> Engine:
        return load(package(files={"model.py": source}, **fields), max_batch_size)

    return build


def answering(expression: str) -> str:
    """Return the source of a model that answers with an expression of its input `x`."""
    return f"""
import numpy as np

def build(context):
    def model(inputs):
        x = next(iter(inputs.values()))
        return {expression}
    return model
"""


def rows(*shape: int) -> Tensors:
    return {"x": np.arange(np.prod(shape), dtype="<f4").reshape(shape)}


# Forward passes


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=6),
    seed=st.integers(0, 999),
)
def test_members_of_any_size_are_answered_in_a_batch_as_alone(
    summing: Engine, sizes: list[tuple[int, int]], seed: int
) -> None:
    # Given members of different rows and lengths, which are padded to the longest
    source = np.random.default_rng(seed)
    members: list[Tensors] = [{"x": source.random(size, dtype=np.float32)} for size in sizes]
    together = summing.forward(members)
    alone = [summing.forward([member])[0] for member in members]
    assert [len(answer["y"]) for answer in together] == [n for n, _ in sizes]
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a["y"], b["y"], rtol=1e-5)


@pytest.fixture(scope="module")
def summing(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("models") / "sum" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(SUM)
    (folder / "model.yaml").write_text(
        """
        {name: sum, version: 1, format: python, entrypoint: "model:build",
         batching: {pad: {x: 0}},
         signature: {inputs: [{name: x, dtype: float32, shape: [batch, n]}],
                     outputs: [{name: y, dtype: float32, shape: [batch]}]}}
        """
    )
    return load(Package.read(folder))


def test_the_members_of_a_batch_share_one_pass(engine: Build) -> None:
    summing = engine(SUM, signature=SUM_SIGNATURE)
    answers = summing.forward([rows(2, 3), rows(1, 3)])
    assert [answer["y"].tolist() for answer in answers] == [[3, 12], [3]]
    assert summing._runtime._model.batches == [{"x": (3, 3)}]  # type: ignore[attr-defined]


def test_members_are_padded_with_the_value_of_the_manifest(engine: Build) -> None:
    padded = engine(
        answering('{"y": x.sum(axis=1)}'), signature=SUM_SIGNATURE, batching={"pad": {"x": -1}}
    )
    first, second = padded.forward([rows(1, 2), rows(1, 4)])
    assert first["y"].tolist() == [0 + 1 - 1 - 1]
    assert second["y"].tolist() == [0 + 1 + 2 + 3]


# Lengths and sizes


def lengths_of_passes(model: Engine) -> list[tuple[int, ...]]:
    return [batch["x"] for batch in model._runtime._model.batches]  # type: ignore[attr-defined]


def padding(engine: Build, seconds: dict[int, float], **batching: Any) -> Engine:
    """Return a model that pads, with a known latency curve."""
    model = engine(
        SUM, signature=SUM_SIGNATURE, batching={"pad": {"x": 0}, **batching}, max_batch_size=64
    )
    model.latency = LatencyCurve(seconds)
    return model


def test_members_of_very_different_lengths_are_answered_in_several_passes(engine: Build) -> None:
    # Given passes of 5 ms plus 1 ms per element
    model = padding(engine, {1: 0.006, 1000: 1.005})
    members = [rows(1, 20), rows(1, 2), rows(2, 19), rows(1, 3)]
    answers = model.forward(members)
    # Then the long members share one pass, and the short members another
    assert sorted(lengths_of_passes(model)) == [(2, 3), (3, 20)]
    assert [a["y"].tolist() for a in answers] == [m["x"].sum(axis=1).tolist() for m in members]


def test_members_share_a_pass_where_another_one_costs_more_than_padding(engine: Build) -> None:
    model = padding(engine, {1: 1.0, 1000: 1.1})
    model.forward([rows(1, 20), rows(1, 2)])
    assert lengths_of_passes(model) == [(2, 20)]


def test_passes_of_a_known_latency_correct_it(engine: Build) -> None:
    model = padding(engine, {1: 10.0, 1000: 11.0})
    before = model.latency.predict(40)
    model.forward([rows(2, 20)])
    assert model.latency.predict(40) < before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), min_size=1, max_size=8),
    fixed=st.floats(1e-4, 1.0),
    seed=st.integers(0, 999),
)
def test_however_members_are_grouped_they_are_answered_as_alone(
    bucketed: Engine, sizes: list[tuple[int, int]], fixed: float, seed: int
) -> None:
    bucketed.latency = LatencyCurve({1: fixed, 1000: fixed + 1.0})
    source = np.random.default_rng(seed)
    members: list[Tensors] = [{"x": source.random(size, dtype=np.float32)} for size in sizes]
    bucketed._runtime._model.batches.clear()  # type: ignore[attr-defined]
    for member, answer in zip(members, bucketed.forward(members), strict=True):
        np.testing.assert_allclose(answer["y"], member["x"].sum(axis=1), rtol=1e-5)
    for size, length in lengths_of_passes(bucketed):
        assert size in (1, 2, 5, 24)
        assert length in (8, 32) or 32 < length <= 40


@pytest.fixture(scope="module")
def bucketed(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("models") / "sum" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(SUM)
    (folder / "model.yaml").write_text(
        """
        {name: sum, version: 1, format: python, entrypoint: "model:build",
         batching: {pad: {x: 0}, buckets: [8, 32], batch_sizes: [1, 2, 5, 24]},
         signature: {inputs: [{name: x, dtype: float32, shape: [batch, n]}],
                     outputs: [{name: y, dtype: float32, shape: [batch]}]}}
        """
    )
    return load(Package.read(folder))


def test_the_largest_declared_batch_is_the_limit_unless_another_is_given(engine: Build) -> None:
    assert padding(engine, {}, batch_sizes=[1, 8]).max_batch_size == 8


def test_texts_are_batched_as_objects(engine: Build) -> None:
    lengths = engine(answering('{"y": [len(text) for text in x]}'), signature=TEXT_SIGNATURE)
    members = [{"text": np.array(texts, dtype=object)} for texts in (["a", "bcd"], ["ef"])]
    assert [a["y"].tolist() for a in lengths.forward(members)] == [[1, 3], [2]]


def test_a_model_without_batch_answers_one_member_at_a_time(engine: Build) -> None:
    scalar = engine(
        answering('{"y": x * 2}'),
        signature={
            "inputs": [{"name": "x", "dtype": "float32", "shape": []}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": []}],
        },
    )
    assert scalar.max_batch_size == 1
    scalar.warm_up()
    assert scalar.forward([{"x": np.array(2.5, "<f4")}])[0]["y"].tolist() == 5.0


def test_the_batch_size_of_the_package_goes_before_that_of_the_settings(engine: Build) -> None:
    own = engine(SUM, signature=SUM_SIGNATURE, batching={"max_batch_size": 4}, max_batch_size=8)
    assert own.max_batch_size == 4


@pytest.mark.parametrize(
    ("values", "shape", "dtype", "expected"),
    [
        ('{"y": x.astype("f8")}', ["batch", 2], "float32", [[0.0, 1.0]]),
        ('{"y": x.astype("i8"), "more": 1}', ["batch", 2], "float32", [[0.0, 1.0]]),
        ('{"y": x}', ["batch", 2], "int32", [[0, 1]]),
        ('{"y": x > 0}', ["batch", 2], "bool", [[False, True]]),
        ('{"y": x.tolist()}', ["batch", "any"], "float16", [[0.0, 1.0]]),
        ('{"y": np.array(["a"] * len(x))}', ["batch"], "string", ["a"]),
        ('{"y": np.array([b"a"] * len(x))}', ["batch"], "bytes", [b"a"]),
        ('{"y": np.array(["a"] * len(x), dtype=object)}', ["batch"], "string", ["a"]),
        ('{"y": x[:, :0]}', ["batch", "found"], "float32", [[]]),
    ],
)
def test_outputs_get_their_declared_dtype(
    engine: Build, values: str, shape: list[int | str], dtype: str, expected: Any
) -> None:
    outputs = [{"name": "y", "dtype": dtype, "shape": shape}]
    model = engine(answering(values), signature=SUM_SIGNATURE | {"outputs": outputs})
    (answer,) = model.forward([rows(1, 2)])
    assert list(answer) == ["y"]
    assert answer["y"].tolist() == expected


@pytest.mark.parametrize(
    ("values", "shape", "dtype", "detail"),
    [
        ('{"y": x[:1]}', ["batch", 2], "float32", "output 'y' has 1 rows for 2 rows of input"),
        ('{"y": x.sum()}', ["batch"], "float32", "output 'y' has a scalar rows for 2 rows"),
        ('{"z": x}', ["batch", 2], "float32", "no output 'y'; it returned z"),
        ("{}", ["batch", 2], "float32", "no output 'y'; it returned none"),
        ("None", ["batch", 2], "float32", "the model returned NoneType, expected outputs by name"),
        ("x", ["batch", 2], "float32", "the model returned ndarray, expected outputs by name"),
        ('{"y": x}', ["batch", 3], "float32", "has shape [2, 2], declared is ['batch', 3]"),
        ('{"y": x}', ["batch"], "float32", "has shape [2, 2], declared is ['batch']"),
        ('{"y": x * np.nan}', ["batch", 2], "float32", "holds NaN or infinity"),
        ('{"y": x + 1e6}', ["batch", 2], "float16", "holds NaN or infinity"),
        ('{"y": x + 0.5}', ["batch", 2], "int64", "has float32 values that do not fit int64"),
        ('{"y": x + 300}', ["batch", 2], "uint8", "has float32 values that do not fit uint8"),
        ('{"y": x * np.nan}', ["batch", 2], "int64", "has float32 values that do not fit int64"),
        ('{"y": [["a", "b"]] * 2}', ["batch", 2], "float32", "has dtype <U1, declared is float32"),
        ('{"y": x}', ["batch", 2], "string", "holds float32, declared is string"),
        ('{"y": np.array([1, "a"], dtype=object)}', ["batch"], "string", "holds object, declared"),
        ('{"y": np.array(["a", "b"])}', ["batch"], "bytes", "holds <U1, declared is bytes"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_wrong_outputs_are_refused(
    engine: Build, values: str, shape: list[int | str], dtype: str, detail: str
) -> None:
    outputs = [{"name": "y", "dtype": dtype, "shape": shape}]
    model = engine(answering(values), signature=SUM_SIGNATURE | {"outputs": outputs})
    with pytest.raises(ForwardFailed) as raised:
        model.forward([rows(2, 2)])
    assert detail in raised.value.detail


def test_an_optional_output_may_be_missing(engine: Build) -> None:
    outputs = [
        {"name": "y", "dtype": "float32", "shape": ["batch", 2]},
        {"name": "z", "dtype": "float32", "shape": ["batch", 2], "optional": True},
    ]
    model = engine(answering('{"y": x}'), signature=SUM_SIGNATURE | {"outputs": outputs})
    assert [list(answer) for answer in model.forward([rows(1, 2)] * 2)] == [["y"], ["y"]]


# Preprocessing and postprocessing

PROCESSED = """
import numpy as np

class Model:
    def preprocess(self, inputs):
        if "bad" in inputs["text"]:
            raise ValueError("text: 'bad' is not allowed")
        if "bug" in inputs["text"]:
            raise KeyError("bug")
        return {"n": np.array([[len(text)] for text in inputs["text"]], "<f4")}

    def __call__(self, inputs):
        return {"raw": inputs["n"] * 10}

    def postprocess(self, outputs):
        return {"y": outputs["raw"][:, 0] + 1}

def build(context):
    return Model()
"""


def test_a_model_processes_what_goes_in_and_comes_out(engine: Build) -> None:
    model = engine(PROCESSED, signature=TEXT_SIGNATURE)
    prepared = model.prepare({"text": np.array(["ab", "c"], dtype=object)})
    assert prepared["n"].tolist() == [[2], [1]]
    assert [a["y"].tolist() for a in model.forward([prepared, prepared])] == [[21, 11]] * 2


def test_a_value_error_while_preprocessing_is_the_fault_of_the_input(engine: Build) -> None:
    model = engine(PROCESSED, signature=TEXT_SIGNATURE)
    with pytest.raises(InvalidInput, match="text: 'bad' is not allowed") as raised:
        model.prepare({"text": np.array(["bad"], dtype=object)})
    assert raised.value.field == "inputs"
    with pytest.raises(KeyError):
        model.prepare({"text": np.array(["bug"], dtype=object)})


# Warming up


def test_warming_up_runs_every_power_of_two_and_the_largest_batch(
    engine: Build, caplog: pytest.LogCaptureFixture
) -> None:
    model = engine(SUM, signature=SUM_SIGNATURE, max_batch_size=6)
    with caplog.at_level(logging.INFO):
        model.warm_up()
    batches = model._runtime._model.batches  # type: ignore[attr-defined]
    assert shapes(batches) == [(1, 8), (2, 8), (4, 8), (6, 8)]
    assert re.search(r"batches of 1 \(.* ms\), 2 \(.* ms\), 4 \(.* ms\), 6 \(.* ms\)", caplog.text)


def shapes(batches: list[dict[str, tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """Return the shapes of `x` without the repetitions of a measurement."""
    return list(dict.fromkeys(batch["x"] for batch in batches))


def test_warming_up_measures_the_latency_curve(engine: Build) -> None:
    source = """
import time

def build(context):
    def model(inputs):
        time.sleep(0.002 * len(inputs["x"]))
        return {"y": inputs["x"].sum(axis=1)}
    return model
"""
    model = engine(source, signature=SUM_SIGNATURE, max_batch_size=16)
    assert model.predict(16) == 0.0
    model.warm_up()
    assert list(model.latency.points) == [1, 2, 4, 8, 16]
    assert 0.016 <= model.predict(8) <= model.predict(12) <= model.predict(16)
    # More rows than one pass takes are answered in several
    assert model.predict(32) == pytest.approx(2 * model.predict(16))


def test_declared_shapes_are_all_warmed_up(engine: Build) -> None:
    batching = {"pad": {"x": 0}, "buckets": [4, 16], "batch_sizes": [1, 3]}
    sample = {"inputs": {"x": [[1.0] * 3]}}
    model = engine(SUM, signature=SUM_SIGNATURE, batching=batching, warm_up=sample)
    model.warm_up()
    batches = model._runtime._model.batches  # type: ignore[attr-defined]
    assert shapes(batches) == [(1, 4), (3, 4), (1, 16), (3, 16)]


def test_the_sample_of_the_manifest_is_used_and_counts_as_one_row(engine: Build) -> None:
    # Given a sample of three rows
    sample = {"inputs": {"x": [[1.0] * 5] * 3}}
    model = engine(SUM, signature=SUM_SIGNATURE, warm_up=sample, max_batch_size=2)
    model.warm_up()
    batches = model._runtime._model.batches  # type: ignore[attr-defined]
    assert shapes(batches) == [(1, 5), (2, 5)]


def test_a_made_up_sample_obeys_the_signature(engine: Build) -> None:
    # Given a required input, one of two optional ones, and another that may be left out
    optional = {"shape": ["batch"], "optional": True}
    signature = {
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": ["batch", "n"]},
            {"name": "extra", "dtype": "float32", **optional},
            {"name": "text", "dtype": "string", **optional},
            {"name": "raw", "dtype": "bytes", **optional},
        ],
        "outputs": SUM_SIGNATURE["outputs"],
        "one_of": ["raw", "text"],
    }
    model = engine(SUM, signature=signature, max_batch_size=1)
    model.warm_up()
    batches = model._runtime._model.batches  # type: ignore[attr-defined]
    assert {tuple(batch.items()) for batch in batches} == {(("x", (1, 8)), ("raw", (1,)))}


@pytest.mark.parametrize(
    ("source", "warm_up", "detail"),
    [
        (answering("1 / 0"), {}, "ZeroDivisionError: division by zero"),
        (answering("{}"), {}, "ForwardFailed: the model returned no output 'y'"),
        (
            SUM,
            {"inputs": {"x": "text"}},
            "InvalidInput: inputs.x: expected float32 values, got text",
        ),
        (SUM, {"inputs": {"z": 1}}, "InvalidInput: inputs: Missing required input(s): x"),
    ],
)
def test_a_failing_warm_up_names_the_package_and_the_error(
    engine: Build, source: str, warm_up: dict[str, Any], detail: str
) -> None:
    model = engine(source, signature=SUM_SIGNATURE, warm_up=warm_up)
    with pytest.raises(PackageError) as raised:
        model.warm_up()
    expected = f"{model.package.path}: fails on its warm-up sample: {detail}"
    assert raised.value.detail.startswith(expected)


# Rows


def test_a_large_task_is_cut_into_pieces() -> None:
    whole = rows(7, 2)
    pieces = list(chunks(whole, 3))
    assert [count_rows(piece) for piece in pieces] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([p["x"] for p in pieces]), whole["x"])


def test_a_scalar_is_one_row() -> None:
    assert count_rows({"x": np.array(1.0)}) == 1


# Devices


def test_the_cpu_is_taken_where_there_is_no_other() -> None:
    assert choose_device("cpu") == "cpu"
    if not Path("/dev/nvidiactl").exists():
        assert choose_device("auto") == "cpu"
        with pytest.raises(PackageError, match="INFERNO_INFERENCE__DEVICE=cuda"):
            choose_device("cuda")


def test_a_package_is_told_its_context(write_package: WritePackage) -> None:
    # Given a model that answers with its context
    source = """
def build(context):
    assert context.path.is_absolute()
    assert (context.device, context.threads) == ("cpu", 1)
    assert context.parameters == {"a": 1}
    assert context.labels == ("no", "yes")
    return lambda inputs: {"y": inputs["x"]}
"""
    folder = write_package(files={"model.py": source}, parameters={"a": 1}, labels=["no", "yes"])
    load(Package.read(folder)).warm_up()
