"""The checks of `inferno doctor`: this machine, the installation and a running platform."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from inferno.errors import ConfigurationError, PackageError, ServingError
from inferno.operate.addresses import local_client, local_url, reach_broker
from inferno.operate.embedded_redis import running_url
from inferno.operate.misspelled import misspelled
from inferno.operate.ports import check_port
from inferno.operate.redis_program import OLDEST_VERSION, find_program
from inferno.operate.redis_status import RedisStatus, StatusHidden, ask
from inferno.repository.repository import Repository
from inferno.settings import Settings, variable

State = Literal["ok", "warning", "failure"]

#: Loss at a power cut, by `appendfsync`.
LOSSES: dict[str, tuple[State, str]] = {
    "always": ("ok", "nothing: each write is on disk before it is answered"),
    "everysec": (
        "ok",
        "up to two seconds of accepted tasks; `always` loses none and is slower",
    ),
    "no": ("warning", "up to half a minute of accepted tasks; set `everysec` or `always`"),
}


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    state: State
    subject: str
    detail: str


def examine(settings: Settings) -> Iterator[Finding]:
    """Run the checks, and yield their findings as they arrive; changes nothing."""
    for check in CHECKS:
        yield from check(settings)


def _check_python(_: Settings) -> Iterator[Finding]:
    version = ".".join(map(str, sys.version_info[:3]))
    state: Literal["ok", "failure"] = "ok" if sys.version_info >= (3, 11) else "failure"
    yield Finding(state, "Python", f"{version}, {sys.executable}")


def _check_packages(_: Settings) -> Iterator[Finding]:
    try:
        lines = importlib.metadata.requires("inferno") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("warning", "Packages", "Inferno is not installed; run `make setup`")
        return
    checked, wrong = 0, []
    for requirement in map(Requirement, lines):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        checked += 1
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed == "missing" or not requirement.specifier.contains(
            installed, prereleases=True
        ):
            wrong.append(f"{requirement.name} is {installed}, expected {requirement.specifier}")
    if wrong:
        yield Finding("warning", "Packages", f"{'; '.join(wrong)}; `make setup` installs them")
    else:
        yield Finding("ok", "Packages", f"all {checked} as pinned in requirements.txt")


def _check_settings(settings: Settings) -> Iterator[Finding]:
    for sentence in misspelled(os.environ):
        yield Finding("warning", "Settings", sentence)
    redis = settings.redis
    if redis.url is not None and redis.address is not None:
        yield Finding(
            "warning",
            "Settings",
            f"{variable('redis', 'url')} names a Redis, so {variable('redis', 'listen')} and "
            f"{variable('redis', 'port')} have no effect: they are for the embedded server",
        )


def _check_redis(settings: Settings) -> Iterator[Finding]:
    if settings.redis.url is None:
        try:
            program = find_program()
        except ConfigurationError as exc:
            yield Finding("failure", "Redis", str(exc))
            return
        yield Finding("ok", "Redis", f"{program}, {program.path}, started by `inferno up`")
    if settings.redis.risk is not None:
        yield Finding("warning", "Redis", settings.redis.risk)
    url = settings.redis.url or running_url(settings.data.dir)
    if url is None:
        return
    try:
        status = ask(url, settings.redis.connect_timeout_s)
    except StatusHidden as exc:
        advice = "version, memory and persistence are not checked"
        yield Finding("warning", "Redis", f"{exc}: {advice}")
        return
    except ConfigurationError as exc:
        yield Finding("failure", "Redis", f"{variable('redis', 'url')}: {exc}")
        return
    for check in REDIS_CHECKS:
        for state, detail in check(status):
            yield Finding(state, "Redis", detail)


def _judge_version(redis: RedisStatus) -> Iterator[tuple[State, str]]:
    version = f"{redis.address} is version {redis.info['redis_version']}"
    if redis.version < OLDEST_VERSION:
        yield "failure", f"{version}; 6.2 is needed, 7 or newer recommended"
    elif redis.version < (7, 0):
        yield "warning", f"{version}; 7 or newer is recommended"
    else:
        yield "ok", version


def _judge_memory(redis: RedisStatus) -> Iterator[tuple[State, str]]:
    policy = redis.info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield (
            "failure",
            f"maxmemory-policy is {policy}: tasks are dropped when the memory is full. Run "
            "`redis-cli CONFIG SET maxmemory-policy noeviction`, and add "
            "`maxmemory-policy noeviction` to redis.conf for the next start",
        )
    used, most = redis.number("used_memory"), redis.number("maxmemory")
    limit = most or redis.number("total_system_memory")
    shown = f"{used / 1e6:.0f} MB of memory used"
    if limit:
        kind = "maxmemory" if most else "in the machine"
        shown += f" of {limit / 1e6:.0f} MB {kind}"
    if not limit or used < 0.8 * limit:
        yield "ok", shown
    else:
        yield (
            "warning",
            f"{shown}; tasks are refused when it is nearly full: give Redis more memory",
        )


def _judge_persistence(redis: RedisStatus) -> Iterator[tuple[State, str]]:
    if redis.info.get("loading") == "1":
        yield "warning", "Redis is still loading its data"
    if redis.info.get("aof_enabled") != "1":
        yield (
            "warning",
            "appendonly is no: a restart loses the tasks since the last snapshot, or all tasks. "
            "Run `redis-cli CONFIG SET appendonly yes`, and add `appendonly yes` to redis.conf for "
            "the next start",
        )
    elif fsync := redis.config.get("appendfsync"):
        state, loss = LOSSES[fsync]
        yield state, f"appendonly is yes, appendfsync is {fsync}: a power cut loses {loss}"
    else:
        yield "ok", "appendonly is yes; the server does not report its appendfsync"
    for field, what in (
        ("aof_last_write_status", "write to the append-only file"),
        ("aof_last_bgrewrite_status", "rewrite of the append-only file"),
        ("rdb_last_bgsave_status", "snapshot"),
    ):
        if redis.info.get(field, "ok") != "ok":
            yield (
                "failure",
                f"the last {what} failed ({field}), and Redis may refuse tasks until one succeeds; "
                "its log tells why, most often a full disk",
            )


def _judge_disk(redis: RedisStatus) -> Iterator[tuple[State, str]]:
    folder = Path(redis.config.get("dir", ""))
    on_this_machine = redis.address.startswith(("/", "127.", "localhost:", "::1:"))
    if on_this_machine and folder.is_absolute() and folder.is_dir():
        state, free = _free_space(folder)
        yield state, f"data directory {folder}, {free}"


#: First the server itself, then its configuration.
REDIS_CHECKS: tuple[Callable[[RedisStatus], Iterator[tuple[State, str]]], ...] = (
    _judge_version,
    _judge_memory,
    _judge_persistence,
    _judge_disk,
)


def _free_space(folder: Path) -> tuple[State, str]:
    status = os.statvfs(folder)
    free_gb = status.f_bavail * status.f_frsize / 1e9
    return "ok" if free_gb >= 1 else "warning", f"{free_gb:.0f} GB free"


def _check_broker(settings: Settings) -> Iterator[Finding]:
    if settings.broker.url is None:
        return  # The broker is Redis, which has been checked.
    try:
        address = reach_broker(settings)
    except ConfigurationError as exc:
        yield Finding("failure", "Broker", str(exc))
        return
    detail = f"{address} is reachable" if address else f"{settings.broker.scheme} is not checked"
    if settings.broker.scheme in ("amqp", "amqps"):
        yield Finding("ok", "Broker", f"{detail}; lanes on RabbitMQ cannot be paused or counted")
    else:
        yield Finding(
            "warning",
            "Broker",
            f"{detail}; a killed worker can lose a task, and its other tasks come back after an "
            f"hour: leave {variable('broker', 'url')} unset for lanes that lose none",
        )


def _check_data(settings: Settings) -> Iterator[Finding]:
    folder = settings.data.dir.resolve()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        yield Finding("failure", "Data directory", f"{folder} is not writable")
        return
    state, free = _free_space(existing)
    yield Finding(state, "Data directory", f"{folder}, {free}")


def _check_models(settings: Settings) -> Iterator[Finding]:
    try:
        repository = Repository.read(settings.repository)
    except PackageError as exc:
        yield Finding("failure", "Models", str(exc))
        return
    for name, reason in repository.errors.items():
        yield Finding("failure", "Models", f"{name}: {reason}")
    for name, model in repository.models.items():
        for version, reason in model.errors.items():
            yield Finding("warning", "Models", f"{name} version {version}: {reason}")
        for package in model.versions.values():
            if missing := package.missing_artifact:
                advice = f"run `inferno models prepare {name}` to make it"
                yield Finding("failure", "Models", f"{missing} is missing; {advice}")
    yield Finding("ok", "Models", ", ".join(repository.models) or "the repository is empty")


def _check_device(settings: Settings) -> Iterator[Finding]:
    # No other command needs the engine, and with a GPU it brings torch.
    from inferno.engine.device import choose_device

    try:
        device = choose_device(settings.inference.device)
    except PackageError as exc:
        yield Finding("failure", "Device", str(exc))
        return
    yield Finding("ok", "Device", f"{device}, {os.cpu_count()} CPU cores")


def _check_certificate(settings: Settings) -> Iterator[Finding]:
    if settings.server.certfile is None:
        return
    try:
        settings.server.check_certificate()
    except ConfigurationError as exc:
        yield Finding("failure", "Certificate", str(exc))
    else:
        yield Finding("ok", "Certificate", f"{settings.server.certfile}")


def _check_platform(settings: Settings) -> Iterator[Finding]:
    url = local_url(settings)
    with local_client(settings) as client:
        try:
            health = client.health()
        except ServingError:
            yield from _check_ports(settings)
            return
    detail = f"{url} is {health.get('status')}"
    unserved = [name for name, served in health.get("models", {}).items() if not served]
    if unserved:
        detail += f"; no live worker serves {', '.join(unserved)}"
    if health.get("redis") != "ok":
        yield Finding("failure", "Platform", f"{detail}; it cannot reach Redis")
        return
    workers = health.get("workers_active", 0)
    yield Finding("warning" if unserved else "ok", "Platform", f"{detail}; {workers} workers")


def _check_ports(settings: Settings) -> Iterator[Finding]:
    for name, place in (("server", settings.server), ("flower", settings.flower)):
        try:
            check_port(place.host, place.port, variable(name, "port"))
        except ConfigurationError as exc:
            yield Finding("failure", "Ports", str(exc))
        else:
            yield Finding(
                "ok",
                "Ports",
                f"{place.port} is free for {'the web tier' if name == 'server' else name}",
            )


#: In order of dependency.
CHECKS: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
    _check_python,
    _check_packages,
    _check_settings,
    _check_redis,
    _check_broker,
    _check_data,
    _check_models,
    _check_device,
    _check_certificate,
    _check_platform,
)
