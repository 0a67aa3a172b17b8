"""Which version answers, by the repository and the desired state."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from inferno.engine.cores import Cores
from inferno.errors import InvalidRequest, ModelNotFound
from inferno.protocol.deployments import parse_activate, parse_load, parse_unload
from inferno.protocol.limits import UNLIMITED
from inferno.repository.repository import Model, Repository
from inferno.settings import RepositorySettings, Settings
from tasks.state.deployments import Deployment
from workers.hosting.loading import Loader, NoRoom
from workers.hosting.model import HostedModel
from workers.hosting.reconcile import Reconciler

CODE = """
def build(context):
    return lambda inputs: {"y": inputs["x"]}
"""
X = {"name": "x", "dtype": "float32", "shape": ["batch"]}


def write(root: Path, *versions: int) -> None:
    for version in versions:
        folder = root / "m" / str(version)
        folder.mkdir(parents=True)
        manifest = {
            "name": "m",
            "version": version,
            "format": "python",
            "entrypoint": "model:build",
            "signature": {"inputs": [X], "outputs": [X | {"name": "y"}]},
        }
        (folder / "model.yaml").write_text(yaml.safe_dump(manifest))
        (folder / "model.py").write_text(CODE)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A model that has the versions 1, 2 and 3, and follows the newest."""
    write(tmp_path, 1, 2, 3)
    return Repository.read(RepositorySettings(root=tmp_path)).model("m")


@pytest.mark.parametrize(
    ("wanted", "active"),
    [
        (Deployment(), 3),
        # The newest version that all workers had; a newer one must be loaded everywhere first.
        (Deployment(weights={2: 1.0}), 2),
        # The version was removed.
        (Deployment(weights={9: 1.0}), 3),
        (Deployment(withdrawn=frozenset({3})), 2),
        (Deployment(weights={3: 1.0}, withdrawn=frozenset({3})), 2),
        (Deployment(withdrawn=frozenset({1, 2, 3})), None),
        (Deployment(weights={1: 1.0}, pinned=True), 1),
        (Deployment(weights={1: 1.0, 2: 3.0}, pinned=True), 2),
        # A chosen version is not replaced by another one.
        (Deployment(weights={9: 1.0}, pinned=True), None),
        (Deployment(pinned=True), None),
    ],
)
def test_what_is_wanted_decides_which_version_answers(model, wanted, active):
    assert wanted.applied(model).active == active


def test_a_choice_at_run_time_goes_before_that_of_the_settings(tmp_path):
    write(tmp_path, 1, 2)
    model = Repository.read(RepositorySettings(root=tmp_path, active={"m": 1})).model("m")
    assert Deployment().applied(model).active == 1
    assert Deployment(weights={2: 1.0}).applied(model).active == 1
    assert Deployment(weights={2: 1.0}, pinned=True).applied(model).active == 2
    assert Deployment(withdrawn=frozenset({1})).applied(model).active is None


def test_versions_get_their_shares(model):
    shared = Deployment(weights={1: 1.0, 2: 2.0, 3: 1.0}, pinned=True).applied(model)
    versions = Counter(shared.served(None, n / 1000).version for n in range(1000))
    assert versions == {1: 250, 2: 500, 3: 250}
    assert shared.served(None, 1.0).version == 3
    assert shared.served(1, 0.9).version == 1


def test_what_is_out_of_service_answers_nobody(model):
    without = Deployment(withdrawn=frozenset({2})).applied(model)
    with pytest.raises(ModelNotFound, match="not found or not loaded: version 2 of m was unloaded"):
        without.served(2, 0.0)
    assert without.package(2).version == 2, "tasks that were accepted before are still answered"
    nothing = Deployment(withdrawn=frozenset({1, 2, 3})).applied(model)
    with pytest.raises(ModelNotFound, match="no version of m is active"):
        nothing.served(None, 0.0)
    assert nothing.described.version == 3


def test_only_what_has_changed_is_read_again(tmp_path):
    write(tmp_path, 1, 2)
    (tmp_path / "m" / "1" / "weights").write_bytes(b"1")
    settings = RepositorySettings(root=tmp_path)
    first = Repository.read(settings)
    digest = first.model("m").package(1).digest
    (tmp_path / "m" / "1" / "weights").write_bytes(b"12")
    write(tmp_path, 4)
    hidden = tmp_path / "m" / ".5"
    hidden.mkdir()
    (hidden / "model.yaml").write_text("version: half written")
    second = Repository.read(settings, first)
    assert second.model("m").versions.keys() == {1, 2, 4}
    assert second.model("m").package(2) is first.model("m").package(2)
    assert second.model("m").package(1).digest != digest
    assert second.model("m").active == 4


def hosted(model: Model, **repository: object) -> HostedModel:
    settings = Settings().model_copy(update={"repository": RepositorySettings(**repository)})
    return HostedModel(model, settings, Loader(settings, Cores(()), pytest.fail))


@pytest.mark.parametrize(
    ("preload", "wanted", "loaded"),
    [
        ("all", Deployment(), [1, 2, 3]),
        ("active", Deployment(), [3]),
        ("none", Deployment(), []),
        # The current version answers until all workers have the newest.
        ("active", Deployment(weights={1: 1.0}), [1, 3]),
        ("active", Deployment(weights={1: 1.0}, pinned=True), [1]),
        ("none", Deployment(weights={1: 1.0, 2: 1.0}, pinned=True), [1, 2]),
        ("active", Deployment(weights={1: 1.0}, pinned=True, loaded=frozenset({2})), [1, 2]),
        ("all", Deployment(withdrawn=frozenset({3})), [1, 2]),
        ("active", Deployment(withdrawn=frozenset({3})), [2]),
    ],
)
def test_a_worker_loads_what_is_wanted(model, preload, wanted, loaded):
    here = hosted(model, preload=preload)
    here.reconcile(wanted.applied(model), wanted)
    assert here.ready == loaded
    assert here.takes_tasks
    assert {version for version, held in here.held.items() if held.state == "ready"} == set(loaded)


def test_where_the_newest_version_is_broken_the_one_before_has_to_do(model):
    (model.package(3).path / "model.py").write_text("raise RuntimeError('broken')")
    here = hosted(model, preload="active")
    here.reconcile(model, Deployment())
    assert here.ready == [2]
    assert here.takes_tasks
    assert "broken" in (here.held[3].error or "")
    # If other workers have the version, this one must not take their tasks.
    wanted = Deployment(weights={3: 1.0})
    here.reconcile(wanted.applied(model), wanted)
    assert not here.takes_tasks


def test_a_version_that_has_lost_its_share_is_let_go(model):
    first = Deployment(weights={1: 1.0}, pinned=True)
    then = Deployment(weights={2: 1.0}, pinned=True)
    for preload, gone in (("active", [1]), ("all", [])):
        here = hosted(model, preload=preload)
        here.reconcile(first.applied(model), first)
        here.reconcile(then.applied(model), then)
        assert [version for version in here.ready if here.drains(version)] == gone
    assert [version for _, version in here.idle()] == [1, 3]
    pinned = hosted(model, preload="all", pinned=["m/1"])
    pinned.reconcile(then.applied(model), then)
    assert [version for _, version in pinned.idle()] == [3]


def test_what_was_not_used_for_longest_makes_room(model, monkeypatch):
    monkeypatch.setattr("workers.hosting.loading.Loaded.memory_bytes", 1000)
    settings = Settings().model_copy(
        update={
            "repository": RepositorySettings(
                root=model.package(1).path.parents[1], preload="none", memory_budget_bytes=2100
            )
        }
    )
    here = HostedModel(model, settings, Loader(settings, Cores(()), pytest.fail))
    Reconciler([here], settings, lambda: None)
    here.engine(3)
    here.engine(1)
    assert here.ready == [1, 3]
    here.engine(2)
    assert here.ready == [2, 3], "version 3 is active"
    wanted = Deployment(loaded=frozenset({2}))
    here.reconcile(wanted.applied(model), wanted)
    with pytest.raises(
        NoRoom, match="2000 of INFERNO_REPOSITORY__MEMORY_BUDGET_BYTES=2100 are taken"
    ):
        here.engine(1)


@pytest.mark.parametrize(
    ("parse", "body", "field"),
    [
        (parse_load, b"{}", "name"),
        (parse_load, b'{"name": "m", "version": 0}', "version"),
        (parse_load, b'{"name": "m", "version": "newest"}', "version"),
        (parse_unload, b'{"name": "m", "versions": [1]}', "versions"),
        (parse_activate, b"{}", "version"),
        (parse_activate, b'{"version": 1, "weights": {"1": 1}}', "version"),
        (parse_activate, b'{"weights": {"1": 0}}', "weights[...]"),
        (parse_activate, b'{"weights": {"one": 1}}', "weights"),
    ],
)
def test_a_body_that_is_wrong_says_where(parse, body, field):
    with pytest.raises(InvalidRequest) as raised:
        parse(body, UNLIMITED)
    assert raised.value.field == field
