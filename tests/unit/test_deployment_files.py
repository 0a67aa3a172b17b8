"""The Procfile and its container counterparts say the same, in words that the programs know."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from inferno.operate.embedded_redis import prepare
from inferno.operate.procfile import parse_procfile
from inferno.settings import Settings

ROOT = Path(__file__).parents[2]
MODELS = ("digits", "echo", "embed", "insight", "mock", "sentiment")
#: What celeryconfig.py fills from the settings; an option would override it.
SET_BY_CELERYCONFIG = {"-P", "--pool", "-c", "--concurrency", "--prefetch-multiplier"}
#: Settings of an embedded server that a container decides for itself.
OF_ONE_MACHINE = {
    "bind",
    "port",
    "unixsocket",
    "unixsocketperm",
    "user",
    "protected-mode",
    "daemonize",
    "dir",
    "maxmemory",
}


@pytest.fixture(scope="module")
def procfile() -> dict[str, str]:
    return parse_procfile((ROOT / "Procfile").read_text())


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


def procfile_name(service: str) -> str:
    return "worker" if service.startswith("worker-") else service


def test_procfile_has_one_line_per_kind_of_process(procfile: dict[str, str]) -> None:
    assert list(procfile) == ["web", "worker", "webhooks", "flower"]


def test_compose_runs_the_procfile_with_a_redis_and_a_worker_per_model(
    services: dict[str, dict[str, Any]],
) -> None:
    workers = [f"worker-{model}" for model in MODELS]

    assert sorted(services) == sorted(["redis", "web", "webhooks", "flower", *workers])


def test_compose_runs_the_procfiles_commands(
    procfile: dict[str, str], services: dict[str, dict[str, Any]]
) -> None:
    for name, service in services.items():
        if name == "redis":
            continue
        shell, flag, script = service["command"]

        assert (shell, flag) == ("sh", "-c")
        assert script.replace("$$", "$") == f"exec {procfile[procfile_name(name)]}"


def test_image_runs_the_web_process_unless_told_otherwise(procfile: dict[str, str]) -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    (command,) = re.findall(r"^CMD (.+)$", dockerfile, re.MULTILINE)

    assert yaml.safe_load(command) == ["sh", "-c", f"exec {procfile['web']}"]


def test_each_compose_worker_serves_the_model_it_is_named_after(
    services: dict[str, dict[str, Any]],
) -> None:
    for model in MODELS:
        environment = services[f"worker-{model}"]["environment"]

        assert environment["INFERNO_WORKER__MODEL_NAME"] == model


def test_compose_containers_reach_redis_and_drain(services: dict[str, dict[str, Any]]) -> None:
    grace_s = Settings.model_fields["worker"].get_default(call_default_factory=True).grace_s

    for name, service in services.items():
        assert int(service["stop_grace_period"].removesuffix("s")) > grace_s
        if name != "redis":
            assert service["environment"]["INFERNO_REDIS__URL"] == "redis://redis:6379/0"
            assert service["depends_on"]["redis"]["condition"] == "service_healthy"


def test_compose_redis_is_configured_as_the_embedded_one(
    services: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    options = shlex.split(services["redis"]["command"])

    given = dict(zip(options[1::2], options[2::2], strict=True))
    lines = prepare(tmp_path).config_path.read_text().splitlines()
    pairs = (line.split(maxsplit=1) for line in lines if not line.startswith("#"))
    embedded = {name: value.strip('"') for name, value in pairs}
    assert given == {f"--{name}": embedded[name] for name in embedded.keys() - OF_ONE_MACHINE}
    assert "ports" not in services["redis"]


def test_users_of_redis_have_the_documented_keys_and_channels() -> None:
    users = (ROOT / "deploy" / "redis-users.acl").read_text().splitlines()
    rows = (ROOT / "docs" / "operations.md").read_text().splitlines()
    documented = {}
    for row in rows:
        if found := re.fullmatch(r"\| `(web|worker|webhooks|flower)` \| (`.*`) \| (`.*`) \|", row):
            documented[found[1]] = [re.findall(r"`(.*?)`", cell) for cell in found.groups()[1:]]

    granted = {}
    for line in users[1:]:
        _, name, *rules = line.split()
        granted[name] = [[r[1:] for r in rules if r.startswith(kind)] for kind in "~&"]

    assert users[0] == "user default off"
    assert granted == documented


def test_ports_are_published_to_this_machine_only(services: dict[str, dict[str, Any]]) -> None:
    published = [port for service in services.values() for port in service.get("ports", [])]

    assert published == ["127.0.0.1:8000:8000", "127.0.0.1:5555:5555"]


@pytest.mark.parametrize("path", ["Procfile", "docker-compose.yml", "deploy/Dockerfile"])
def test_every_variable_is_a_setting(path: str) -> None:
    for group, field in re.findall(r"INFERNO_([A-Z]+)__([A-Z_]+)", (ROOT / path).read_text()):
        assert group.lower() in Settings.model_fields
        settings_group = Settings.model_fields[group.lower()].annotation
        assert field.lower() in settings_group.model_fields  # type: ignore[union-attr]


def test_worker_line_leaves_the_pool_to_celeryconfig(procfile: dict[str, str]) -> None:
    assert SET_BY_CELERYCONFIG.isdisjoint(shlex.split(procfile["worker"]))


def test_workers_of_one_model_get_names_of_their_own(procfile: dict[str, str]) -> None:
    def expand() -> list[str]:
        shown = procfile["worker"].replace("celery", "echo celery", 1)
        return subprocess.run(
            ["sh", "-c", shown],
            env={"INFERNO_WORKER__MODEL_NAME": "echo", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()

    first, second = expand(), expand()

    assert first[first.index("-Q") + 1] == "echo"
    assert re.fullmatch(r"echo-\d+@%h", first[first.index("-n") + 1])
    assert first != second


def test_worker_line_without_a_model_says_what_is_missing(procfile: dict[str, str]) -> None:
    tried = subprocess.run(
        ["sh", "-c", procfile["worker"]],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert tried.returncode != 0
    assert "INFERNO_WORKER__MODEL_NAME: names the model to serve" in tried.stderr


def test_worker_options_are_known_to_celery(procfile: dict[str, str], tmp_path: Path) -> None:
    known = subprocess.run(
        [sys.executable, "-m", "celery", "worker", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    _, _, given = procfile["worker"].partition(" worker ")

    options = re.findall(r"(?<=\s)--?[a-zA-Z][\w-]*", f" {given}")
    assert options == ["-Q", "-n", "--loglevel", "--without-gossip", "--without-mingle"]
    assert [option for option in options if not re.search(rf"{option}\b", known)] == []


def test_files_that_the_image_copies_exist() -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?:--\S+ )?(.+) \S+$", dockerfile, re.MULTILINE)

    missing = [p for line in copied for p in line.split() if not (ROOT / p).exists()]
    assert missing == []
