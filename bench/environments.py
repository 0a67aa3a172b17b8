"""The peers' virtual environments, one for each peer."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build"
PEERS = Path(__file__).with_name("peers")
#: Packages that draw the plots.
PLOT_REQUIREMENTS = Path(__file__).with_name("requirements.txt")


class NotInstalled(Exception):
    """An environment could not be created; the message says why."""


def peer_python(name: str, say: Callable[[str], None]) -> Path:
    """Return the Python of a peer's environment; create the environment if it is missing.

    Args:
      name: name of the peer; a peer without requirements runs in the project's environment.
      say: called with a message before anything slow.
    Raises:
      NotInstalled: the environment cannot be created.
    """
    requirements = PEERS / name / "requirements.txt"
    if not requirements.is_file():
        return Path(sys.executable)
    return _python(BUILD / "peers" / name, requirements, say)


def plot_python(say: Callable[[str], None]) -> Path:
    """Return a Python with matplotlib; create its environment if it is missing.

    Raises:
      NotInstalled: the environment cannot be created.
    """
    return _python(BUILD / "bench", PLOT_REQUIREMENTS, say)


def _python(folder: Path, requirements: Path, say: Callable[[str], None]) -> Path:
    python = folder / "bin" / "python"
    stamp = folder / "installed"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    say(f"Installing {folder.name} into {folder.relative_to(ROOT)}; this may take minutes.")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
        subprocess.run(
            [*pip, "--quiet", "--progress-bar", "on", "-r", str(requirements)],
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as exc:
        raise NotInstalled(f"{folder.name} cannot be installed: {exc}") from exc
    stamp.write_text(wanted)
    return python


def versions(python: Path, packages: list[str]) -> dict[str, str]:
    """Return the versions of packages in an environment, without missing packages."""
    code = (
        "import sys, importlib.metadata as m\n"
        "for name in sys.argv[1:]:\n"
        "    try: print(name, m.version(name))\n"
        "    except m.PackageNotFoundError: pass"
    )
    done = subprocess.run(
        [str(python), "-c", code, *packages], capture_output=True, text=True, check=True
    )
    return dict(line.split() for line in done.stdout.splitlines())
