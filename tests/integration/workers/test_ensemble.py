"""Ensembles with real workers: each stage is a task in its own lane, whatever happens meanwhile."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from celery import Celery
from celery.result import AsyncResult

from inferno.errors import DeadlineExceeded, ForwardFailed, InvalidInput, TaskCancelled
from inferno.names import stage_task_id
from inferno.protocol.tasks import TaskState
from inferno.testing.processes import wait_until, worker
from tasks.control.tasks import Control
from tasks.results import views as documents
from tasks.state.records import Record, Records
from tests.integration.conftest import Repository

#: Writes its name around its inputs, and follows instructions in them.
CODE = """
import pathlib, re, time
import numpy as np

def build(context):
    name, ledger = context.parameters["name"], pathlib.Path(context.parameters["ledger"])
    def call(*texts):
        said = f"{name}({','.join(texts)})"
        for what, argument in re.findall(rf"\\[(\\w+) {name} ?([^]]*)\\]", said):
            if what == "hold":
                while not pathlib.Path(argument).exists():
                    time.sleep(0.01)
            if what == "poison":
                raise RuntimeError("poisonous")
            if what == "empty":
                return ""
        return said
    def model(inputs):
        rows = list(zip(*(inputs[name].tolist() for name in sorted(inputs))))
        with ledger.open("a") as file:
            file.write("".join(f"{name} {row[0]}\\n" for row in rows))
        return {"out": np.array([call(*row) for row in rows], dtype=object)}
    return model
"""


def text(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "dtype": "string", "shape": ["batch"], **more}


STAGES = ("first", "left", "right", "join")
DIAMOND = [
    {"model": "join", "inputs": {"a": "l", "b": "r"}, "outputs": {"out": "out"}},
    {"model": "left", "inputs": {"a": "f"}, "outputs": {"out": "l"}},
    {"model": "right", "inputs": {"a": "f"}, "outputs": {"out": "r"}},
    {"model": "first", "inputs": {"a": "x"}, "outputs": {"out": "f"}},
]


#: Names of random ensembles.
GRAPHS = tuple(f"graph{n}" for n in range(8))


def graph(name: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return stages in any order, and their values that no other stage takes."""
    draw = random.Random(name)
    values, unused, stages = ["x"], {"x"}, []
    for n in range(draw.randint(1, 7)):
        taken = draw.sample(values, min(len(values), draw.randint(1, 2)))
        stages.append(
            {
                "name": f"stage{n}",
                "model": draw.choice(STAGES),
                "inputs": dict(zip("ab", taken, strict=False)),
                "outputs": {"out": f"v{n}"},
            }
        )
        unused = unused - set(taken) | {f"v{n}"}
        values.append(f"v{n}")
    draw.shuffle(stages)
    return stages, sorted(unused)


def composition(stages: list[dict[str, Any]], value: str, x: str) -> str:
    """Return the expected content of a value for an input."""
    if value == "x":
        return x
    (stage,) = [stage for stage in stages if value in stage["outputs"].values()]
    inner = [composition(stages, taken, x) for taken in stage["inputs"].values()]
    return f"{stage['model']}({','.join(inner)})"


def add_ensemble(
    repository: Repository, name: str, stages: list[dict[str, Any]], outputs: list[str]
) -> None:
    signature = {"inputs": [text("x")], "outputs": [text(output) for output in outputs]}
    repository.add(
        name,
        format="ensemble",
        entrypoint=None,
        warm_up=None,
        signature=signature,
        ensemble=stages,
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """Four models, and ensembles of them."""
    root = tmp_path_factory.mktemp("ensembles") / "models"
    root.mkdir()
    repository = Repository(root)
    for name in (*STAGES, "ghost"):
        signature = {"inputs": [text("a"), text("b", optional=True)], "outputs": [text("out")]}
        parameters = {"name": name, "ledger": str(repository.ledger)}
        repository.add(
            name, code=CODE, signature=signature, parameters=parameters,
            warm_up={"inputs": {"a": "warm"}}, batching={"max_batch_delay_ms": 5},
        )  # fmt: skip
    add_ensemble(repository, "diamond", DIAMOND, ["out", "r"])
    add_ensemble(repository, "mortal", DIAMOND, ["out"])
    add_ensemble(
        repository,
        "outer",
        [{"model": "diamond", "inputs": {"x": "x"}, "outputs": {"out": "out"}}],
        ["out"],
    )
    ghostly = [*DIAMOND[3:], {"model": "ghost", "inputs": {"a": "f"}, "outputs": {"out": "out"}}]
    add_ensemble(repository, "haunted", ghostly, ["out"])
    for name in GRAPHS:
        add_ensemble(repository, name, *graph(name))
    return repository


@pytest.fixture(scope="module")
def module_env(repository: Repository, redis_url: str) -> dict[str, str]:
    """The environment of the workers."""
    return {
        "INFERNO_REDIS__URL": redis_url,
        "INFERNO_REPOSITORY__ROOT": str(repository.root),
        "INFERNO_WORKER__HEARTBEAT_INTERVAL_S": "0.2",
        "INFERNO_WORKER__HEARTBEAT_TTL_S": "2",
    }


@pytest.fixture(scope="module")
def stage_worker(repository: Repository, module_env: dict[str, str]) -> Iterator[None]:
    """A worker of the models."""
    log = repository.root.parent / "stages.log"
    log.touch()
    with worker(",".join(STAGES), module_env, log):
        yield


@pytest.fixture(scope="module")
def running(
    repository: Repository, module_env: dict[str, str], stage_worker: None
) -> Iterator[None]:
    """Workers of the models and of the ensembles."""
    log = repository.root.parent / "ensembles.log"
    log.touch()
    with worker(",".join(("diamond", "outer", "haunted", *GRAPHS)), module_env, log):
        yield


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Path]:
    """Return a path; stages that hold continue once it exists."""
    yield tmp_path / "gate"
    (tmp_path / "gate").touch()


def send(celery: Celery, model: str, x: str | list[str], **options: Any) -> AsyncResult:
    kwargs = {"inputs": {"x": x}, **options.pop("kwargs", {})}
    return celery.send_task(f"infer.{model}", kwargs=kwargs, queue=model, **options)


def ran(repository: Repository, ending: str) -> Counter[str]:
    """Return how often each model ran for a text."""
    lines = repository.ledger.read_text().splitlines()
    return Counter(line.split()[0] for line in lines if ending in line)


def composed(x: str) -> str:
    return f"join(left(first({x})),right(first({x})))"


@pytest.mark.usefixtures("running")
def test_an_ensemble_is_the_composition_of_its_stages(celery: Celery, records: Records) -> None:
    task = send(celery, "diamond", ["one", "two"], priority=0)
    result = task.get(timeout=20)

    assert result["outputs"]["out"]["data"] == [composed("one"), composed("two")]
    assert result["outputs"]["r"]["data"] == ["right(first(one))", "right(first(two))"]
    stages = {stage["name"]: stage for stage in result["stages"]}
    assert next(iter(stages)) == "first"
    assert list(stages)[-1] == "join"
    assert set(stages) == set(STAGES)
    for name, stage in stages.items():
        assert stage["task_id"] == stage_task_id(task.id, name)
        assert stage["ms"] > 0
        record, outcome = records.fetch(stage["task_id"])
        assert record is not None
        assert (record.model, record.parent, record.attempts) == (name, task.id, 1)
        assert outcome is not None
        assert outcome.succeeded
    record, outcome = records.fetch(task.id)
    shown: Any = documents.task(task.id, record, outcome)["stages"]
    assert msgspec.json.decode(shown) == result["stages"]


@pytest.mark.usefixtures("running")
def test_any_graph_is_the_composition_of_its_stages(celery: Celery) -> None:
    texts = ["one", "two", "three"]
    tasks = {name: [send(celery, name, x) for x in texts] for name in GRAPHS}
    for name, sent in tasks.items():
        stages, outputs = graph(name)
        for task, x in zip(sent, texts, strict=True):
            given = task.get(timeout=30)["outputs"]
            assert {value: tensor["data"] for value, tensor in given.items()} == {
                value: [composition(stages, value, x)] for value in outputs
            }


@pytest.mark.usefixtures("running")
def test_only_the_stages_run_that_the_wanted_outputs_need(celery: Celery) -> None:
    result = send(celery, "diamond", "some", kwargs={"outputs": ["r"]}).get(timeout=20)

    assert result["outputs"].keys() == {"r"}
    assert [stage["name"] for stage in result["stages"]] == ["first", "right"]


@pytest.mark.usefixtures("running")
def test_stages_run_side_by_side_and_members_do_not_wait_for_each_other(
    celery: Celery, repository: Repository, gate: Path
) -> None:
    held = send(celery, "diamond", f"slow[hold left {gate}]")
    wait_until(lambda: ran(repository, "slow")["right"] == 1)
    quick = [send(celery, "outer", f"quick{n}") for n in range(3)]
    wait_until(lambda: ran(repository, "quick")["right"] == 3)
    assert not held.ready()
    assert ran(repository, "slow")["join"] == 0

    gate.touch()

    assert held.get(timeout=20)["outputs"]["out"]["data"] == [composed(f"slow[hold left {gate}]")]
    for n, task in enumerate(quick):
        assert task.get(timeout=20)["outputs"]["out"]["data"] == [composed(f"quick{n}")]


@pytest.mark.usefixtures("running")
def test_stages_of_several_calls_share_batches(
    celery: Celery, records: Records, repository: Repository, gate: Path
) -> None:
    busy = celery.send_task(
        "infer.first", kwargs={"inputs": {"a": f"busy[hold first {gate}]"}}, queue="first"
    )
    wait_until(lambda: ran(repository, "busy")["first"])
    tasks = [send(celery, "diamond", f"shared{n}") for n in range(6)]
    stages = [stage_task_id(task.id, "first") for task in tasks]
    wait_until(lambda: all(records.records(stages)))

    gate.touch()

    busy.get(timeout=20)
    for task in tasks:
        task.get(timeout=20)
    batches = {task_id: AsyncResult(task_id, app=celery).get()["batch"] for task_id in stages}
    assert max(batch["size"] for batch in batches.values()) > 1


@pytest.mark.usefixtures("running")
def test_an_error_crosses_and_names_the_stage(celery: Celery, records: Records) -> None:
    bad = send(celery, "diamond", "bad[poison left]")
    worse = send(celery, "outer", "worse[poison right]")
    odd = send(celery, "diamond", "odd[empty left]")
    good = send(celery, "diamond", "good")

    with pytest.raises(ForwardFailed, match=r"^stage left: left failed: RuntimeError: poisonous$"):
        bad.get(timeout=20)
    with pytest.raises(ForwardFailed, match=r"^stage diamond: stage right: right failed"):
        worse.get(timeout=20)
    with pytest.raises(InvalidInput, match=r"stage join: expected text") as raised:
        odd.get(timeout=20)
    assert raised.value.field == "join.inputs.a"
    assert good.get(timeout=20)["outputs"]["out"]["data"] == [composed("good")]
    record, _ = records.fetch(bad.id)
    assert record is not None
    assert (record.state, record.retries) == (TaskState.FAILED, 0)
    assert records.fetch(stage_task_id(bad.id, "join")) == (None, None)


@pytest.mark.usefixtures("running")
def test_a_deadline_holds_for_the_stages(celery: Celery, records: Records) -> None:
    """The deadline holds even for a stage that no worker takes."""
    task = send(celery, "haunted", "late", expires=1)

    with pytest.raises(DeadlineExceeded, match=r"stage ghost: no worker took the task"):
        task.get(timeout=20)
    record, _ = records.fetch(task.id)
    stage, _ = records.fetch(stage_task_id(task.id, "ghost"))
    assert record is not None
    assert stage is not None
    assert (record.state, stage.state) == (TaskState.EXPIRED, TaskState.EXPIRED)
    assert stage.deadline is not None
    assert stage.deadline <= record.accepted_at + 1.5


@pytest.mark.usefixtures("running")
def test_a_cancelled_ensemble_cancels_its_stages(
    celery: Celery, records: Records, control: Control
) -> None:
    task = send(celery, "haunted", "unwanted", priority=7)
    ghost = stage_task_id(task.id, "ghost")
    wait_until(lambda: records.fetch(ghost)[0])

    control.cancel(task.id)

    wait_until(lambda: records.fetch(ghost)[1])
    record, outcome = records.fetch(ghost)
    assert record is not None
    assert outcome is not None
    assert (record.state, record.priority) == (TaskState.CANCELLED, 7)
    assert isinstance(outcome.error, TaskCancelled)


@pytest.mark.usefixtures("stage_worker")
def test_other_workers_go_on_where_one_has_ended(
    celery: Celery,
    records: Records,
    repository: Repository,
    module_env: dict[str, str],
    log: Path,
    gate: Path,
) -> None:
    """One worker is stopped, the next is killed; no stage runs twice."""
    texts = [f"resumed{n}[hold left {gate}]" for n in range(3)]
    with worker("mortal", module_env, log) as stopped:
        tasks = [send(celery, "mortal", x) for x in texts]
        left = [stage_task_id(task.id, "left") for task in tasks]
        wait_until(lambda: ran(repository, "resumed")["right"] == 3)
        stopped.terminate()
        stopped.wait(timeout=20)
    with worker("mortal", module_env, log) as killed:
        wait_until(lambda: all(record.attempts == 2 for record in known(records, tasks)))
        killed.kill()
        killed.wait()
    gate.touch()
    wait_until(lambda: len(records.outcomes(left)) == 3)
    with worker("mortal", module_env, log):
        answers = [task.get(timeout=30)["outputs"]["out"]["data"] for task in tasks]
    assert answers == [[composed(x)] for x in texts]
    assert ran(repository, "resumed") == dict.fromkeys(STAGES, 3)
    assert [record.attempts for record in known(records, tasks)] == [3, 3, 3]


def known(records: Records, tasks: list[AsyncResult]) -> list[Record]:
    return [record for record in records.records([task.id for task in tasks]) if record]


def test_a_killed_worker_of_a_stage_holds_up_the_ensemble_and_no_more(
    running: None,
    celery: Celery,
    records: Records,
    repository: Repository,
    module_env: dict[str, str],
    log: Path,
    gate: Path,
) -> None:
    whole = f"bereft[hold ghost {gate}]"
    with worker("ghost", module_env, log) as victim:
        task = send(celery, "haunted", whole)
        wait_until(lambda: ran(repository, "bereft")["ghost"])
        victim.kill()
        victim.wait()
    gate.touch()
    with worker("ghost", module_env, log):
        result = task.get(timeout=30)

    assert result["outputs"]["out"]["data"] == [f"ghost(first({whole}))"]
    assert ran(repository, "bereft") == {"first": 1, "ghost": 2}
    record, _ = records.fetch(task.id)
    assert record is not None
    assert record.attempts == 1
