"""The project's directory and its Procfile, which names the platform's processes."""

from __future__ import annotations

import os
import re
from pathlib import Path

from inferno.errors import ConfigurationError


def enter_project() -> Path:
    """Change to the project's directory, from which relative paths in settings start.

    It is the nearest directory upwards that has a Procfile, else the one of this installation.

    Returns:
      The directory.
    """
    here = Path.cwd()
    home = Path(__file__).resolve().parents[2]
    root = next((path for path in (here, *here.parents, home) if _is_project(path)), here)
    os.chdir(root)
    return root


def _is_project(path: Path) -> bool:
    return (path / "Procfile").is_file() and (path / "celeryconfig.py").is_file()


def read_procfile(root: Path) -> dict[str, str]:
    """Return the commands of the platform's processes, by name.

    Raises:
      ConfigurationError: the Procfile is missing or wrong.
    """
    file = root / "Procfile"
    if not file.is_file():
        raise ConfigurationError(f"{root} has no Procfile; run this in Inferno's directory.")
    return parse_procfile(file.read_text())


def parse_procfile(text: str) -> dict[str, str]:
    """Return the commands of a Procfile by process name, in the file's order.

    Raises:
      ConfigurationError: a line is neither ``name: command``, a comment nor empty.
    """
    commands: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = re.fullmatch(r"([A-Za-z0-9_-]+):\s*(\S.*?)\s*", line)
        if found is None:
            raise ConfigurationError(f"Procfile, line {number}: expected `name: command`: {line}")
        if found[1] in commands:
            raise ConfigurationError(f"Procfile, line {number}: {found[1]} is defined twice.")
        commands[found[1]] = found[2]
    return commands
