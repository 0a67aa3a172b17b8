"""Ensembles as they are declared: what makes a sound graph, and what is said of others."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferno.errors import PackageError
from inferno.protocol.signature import Signature
from inferno.repository.graph import Stage, check_graph, needed, ordered
from inferno.repository.package import Package
from inferno.repository.repository import Repository
from inferno.settings import RepositorySettings
from tests.unit.inferno.conftest import WritePackage


def tensor(name: str, dtype: str = "float32", *shape: Any, **more: Any) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": ["batch", *shape], **more}


def signature(inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"inputs": inputs, "outputs": outputs}


def stage(model: str, inputs: dict[str, str], outputs: dict[str, str], **more: Any) -> Any:
    return {"model": model, "inputs": inputs, "outputs": outputs, **more}


EMBED = stage("embed", {"text": "text"}, {"vector": "meaning"})
RANK = stage("rank", {"query": "meaning"}, {"score": "score"})
SIGNATURE = signature([tensor("text", "string")], [tensor("score")])


@pytest.fixture
def write_ensemble(write_package: WritePackage) -> Callable[..., Path]:
    """Return a function that writes an ensemble of these stages."""

    def write(*stages: Any, name: str = "search", **fields: Any) -> Path:
        fields = {"signature": SIGNATURE, "format": "ensemble", "entrypoint": None} | fields
        return write_package(name, ensemble=list(stages), **fields)

    return write


@pytest.fixture
def with_models(write_package: WritePackage) -> None:
    """The models of the stages above."""
    text, vector = tensor("text", "string"), tensor("vector", "float32", 4)
    write_package("embed", signature=signature([text], [vector]))
    query = tensor("query", "float32", 4)
    write_package("rank", signature=signature([query], [tensor("score")]))


def read(root: Path, **active: int) -> Repository:
    return Repository.read(RepositorySettings(root=root, active=active))


@pytest.mark.usefixtures("with_models")
def test_an_ensemble_is_a_model_like_any(root: Path, write_ensemble: Callable[..., Path]) -> None:
    write_ensemble(RANK, EMBED)

    repository = read(root)

    assert repository.errors == {}
    package = repository.model("search").package()
    assert package.is_ensemble
    assert [stage.name for stage in package.manifest.ensemble] == ["rank", "embed"]
    assert package.executors > 1
    assert package.max_batch_delay_ms(10) == 0
    assert sorted(repository.missing(package, set().__contains__)) == ["embed", "rank", "search"]
    assert repository.missing(package, {"search", "rank"}.__contains__) == ["embed"]
    assert repository.ready({"search", "rank"}.__contains__) == {"rank"}
    assert repository.ready({"search", "rank", "embed"}.__contains__) >= {"search"}


@pytest.mark.parametrize(
    ("stages", "fields", "reason"),
    [
        ([], {}, "expected stages if `format` is ensemble"),
        ([EMBED, RANK], {"format": "python"}, "expected stages if `format` is ensemble"),
        (
            [EMBED, RANK],
            {"entrypoint": "a:b"},
            "expected no entrypoint: an ensemble runs nothing itself",
        ),
        ([EMBED, RANK], {"deterministic": True}, "its stages have their own"),
        ([EMBED, RANK], {"cache": {"results": True}}, "its stages have their own"),
        ([RANK], {}, "stage rank: inputs.query: nothing makes the value 'meaning'"),
        ([EMBED], {}, "signature.outputs: nothing makes the value 'score'"),
        ([EMBED, EMBED, RANK], {}, "two stages are named 'embed'"),
        (
            [EMBED, EMBED | {"name": "again"}, RANK],
            {},
            "stage again: outputs: the value 'meaning' is made twice",
        ),
        (
            [EMBED | {"outputs": {"vector": "text"}}, RANK],
            {},
            "the value 'text' is made twice: it is also an input of the ensemble",
        ),
        (
            [EMBED, RANK, stage("rank", {"query": "meaning"}, {"score": "other"}, name="idle")],
            {},
            "stage idle: no output of the ensemble needs it",
        ),
        (
            [EMBED, RANK],
            {"signature": signature([*SIGNATURE["inputs"], tensor("x")], SIGNATURE["outputs"])},
            "no stage takes the value 'x'",
        ),
        (
            [
                stage("a", {"x": "text", "y": "two"}, {"z": "one"}),
                stage("b", {"x": "one"}, {"z": "two", "score": "score"}),
            ],
            {},
            "stages wait for each other: a -> b -> a",
        ),
        ([EMBED | {"outputs": {}}, RANK], {}, "outputs: dictionary should have at least 1 item"),
        ([EMBED | {"typo": 1}, RANK], {}, "typo: extra inputs are not permitted"),
    ],
)
def test_what_is_wrong_with_a_graph_is_said_of_its_package(
    write_ensemble: Callable[..., Path], stages: list[Any], fields: dict[str, Any], reason: str
) -> None:
    folder = write_ensemble(*stages, **fields)

    with pytest.raises(PackageError) as raised:
        Package.read(folder)

    assert raised.value.detail.startswith(f"{folder / 'model.yaml'}: ensemble")
    assert reason in raised.value.detail


@pytest.mark.usefixtures("with_models")
@pytest.mark.parametrize(
    ("stages", "fields", "reason"),
    [
        ([EMBED | {"model": "no"}, RANK], {}, "stage no: model: 'no' does not exist or is broken"),
        ([EMBED | {"version": 7}, RANK], {}, "stage embed: version: embed has no version 7"),
        (
            [EMBED | {"inputs": {"texts": "text"}}, RANK],
            {},
            "stage embed: inputs.texts: embed has no such tensor; it has: text",
        ),
        (
            [EMBED | {"outputs": {"v": "meaning"}}, RANK],
            {},
            "stage embed: outputs.v: embed has no such tensor; it has: vector",
        ),
        (
            [EMBED, RANK],
            {"signature": signature([tensor("text")], [tensor("score")])},
            "stage embed: inputs.text: expected string [batch], but the value 'text' is float32",
        ),
        (
            [EMBED, RANK],
            {"signature": signature([tensor("text", "string")], [tensor("score", "int64")])},
            "signature.outputs.score: expected int64 [batch], but the value 'score' is float32",
        ),
        (
            [EMBED, stage("narrow", {"query": "meaning"}, {"score": "score"})],
            {},
            "stage narrow: inputs.query: expected float32 [batch, 3], but the value 'meaning' is",
        ),
        (
            [EMBED, stage("two", {"query": "meaning"}, {"score": "score"})],
            {},
            "stage two: inputs.weight: missing; it is required",
        ),
        (
            [EMBED, stage("either", {"query": "meaning"}, {"score": "score"})],
            {},
            "stage either: inputs: expected exactly one of a, b",
        ),
        (
            [EMBED, RANK],
            {
                "signature": signature(
                    [tensor("text", "string", optional=True)], SIGNATURE["outputs"]
                )
            },
            "stage embed: inputs.text: is required, but the value 'text' may be missing",
        ),
        (
            [EMBED, stage("single", {"query": "meaning"}, {"score": "score"})],
            {},
            "stage single: either both the ensemble and single must have `batch`",
        ),
        ([stage("search", {"text": "text"}, {"score": "score"})], {}, "search -> search"),
        (
            [stage("loop", {"text": "text"}, {"score": "score"})],
            {},
            "it contains its own model: search -> loop -> search",
        ),
        ([stage("odd", {"text": "text"}, {"score": "score"})], {}, "stage odd: model: odd is brok"),
    ],
)
def test_what_does_not_fit_breaks_the_ensemble_alone(
    root: Path,
    write_package: WritePackage,
    write_ensemble: Callable[..., Path],
    stages: list[Any],
    fields: dict[str, Any],
    reason: str,
) -> None:
    query, score = tensor("query", "float32", 4), tensor("score")
    write_package("narrow", signature=signature([tensor("query", "float32", 3)], [score]))
    write_package("two", signature=signature([query, tensor("weight")], [score]))
    options = [tensor("a", optional=True), tensor("b", optional=True)]
    either = signature([query, *options], [score]) | {"one_of": ["a", "b"]}
    write_package("either", signature=either)
    single = [{"name": name, "dtype": "float32", "shape": [4]} for name in ("query", "score")]
    write_package("single", signature=signature(single[:1], single[1:]))
    write_ensemble(stage("search", {"text": "text"}, {"score": "score"}), name="loop")
    write_ensemble(EMBED, RANK | {"version": 9}, name="odd")
    folder = write_ensemble(*stages, **fields)

    repository = read(root)

    assert repository.errors["search"].startswith(f"{folder / 'model.yaml'}: ensemble: ")
    assert reason in repository.errors["search"]
    assert {"embed", "rank", "narrow", "two", "either", "single"} == repository.models.keys()


@pytest.mark.usefixtures("with_models")
def test_a_broken_version_leaves_the_others(
    root: Path, write_package: WritePackage, write_ensemble: Callable[..., Path]
) -> None:
    write_ensemble(EMBED, RANK)
    write_package(
        "search", 2, format="ensemble", entrypoint=None, signature=SIGNATURE,
        ensemble=[EMBED, RANK | {"model": "gone"}],
    )  # fmt: skip

    model = read(root).model("search")

    assert model.active == 1
    assert "'gone' does not exist or is broken" in model.errors["2"]


@pytest.mark.usefixtures("with_models")
def test_ensembles_contain_ensembles_but_never_a_model_that_may_contain_them(
    root: Path, write_package: WritePackage, write_ensemble: Callable[..., Path]
) -> None:
    write_ensemble(EMBED, RANK)
    write_ensemble(stage("search", {"text": "text"}, {"score": "score"}), name="outer")
    repository = read(root)
    assert repository.errors == {}
    missing = repository.missing(repository.model("outer").package(), set().__contains__)
    assert sorted(missing) == ["embed", "outer", "rank", "search"]

    # It is not the active one, but could become it.
    write_package(
        "search", 2, format="ensemble", entrypoint=None, signature=SIGNATURE,
        ensemble=[stage("outer", {"text": "text"}, {"score": "score"})],
    )  # fmt: skip
    repository = read(root, search=1)

    assert "outer -> search -> outer" in repository.errors["outer"]
    assert repository.model("search").versions.keys() == {1}


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Stage], Signature]:
    """A sound graph, its stages in any order."""
    count = draw(st.integers(1, 8))
    values, stages = ["x"], []
    for n in range(count):
        taken = draw(st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True))
        inputs = {f"i{k}": value for k, value in enumerate(taken)}
        stages.append(Stage(model=f"m{n}", inputs=inputs, outputs={"y": f"v{n}"}))
        values.append(f"v{n}")
    draw(st.randoms(use_true_random=False)).shuffle(stages)
    taken_by_some = set[str]().union(*(stage.takes for stage in stages))
    outputs = [value for value in values[1:] if value not in taken_by_some]
    tensors = signature([tensor("x")], [tensor(name) for name in outputs])
    return stages, Signature.model_validate(tensors)


@given(graphs())
def test_every_sound_graph_is_accepted_and_has_an_order(
    graph: tuple[list[Stage], Signature],
) -> None:
    stages, declared = graph

    check_graph(stages, declared)

    there = {"x"}
    order = list(ordered(stages, ["x"]))
    for one in order:
        assert one.takes <= there
        there |= one.gives
    assert len(order) == len(stages)


@given(graphs(), st.data())
def test_every_circle_is_found(graph: tuple[list[Stage], Signature], data: st.DataObject) -> None:
    stages, declared = graph
    order = list(ordered(stages, ["x"]))
    first = data.draw(st.integers(0, len(order) - 1))
    # What comes later, of all that the first one has an influence on, itself included.
    downstream = [one for one in order if order[first] in needed(stages, sorted(one.gives))]
    last = data.draw(st.sampled_from(downstream))
    tied = order[first].model_copy(
        update={"inputs": order[first].inputs | {"back": next(iter(last.gives))}}
    )
    broken = [tied if one is order[first] else one for one in stages]
    random.Random(0).shuffle(broken)

    with pytest.raises(ValueError, match="stages wait for each other") as raised:
        check_graph(broken, declared)

    path = str(raised.value).partition(": ")[2].split(" -> ")
    by_name = {one.name: one for one in broken}
    assert path[0] == path[-1]
    for one, following in pairwise(path):
        assert by_name[one].takes & by_name[following].gives
