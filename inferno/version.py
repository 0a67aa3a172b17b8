"""The version of Inferno that is installed."""

from __future__ import annotations

import importlib.metadata


def inferno_version() -> str:
    """Return the installed version, or a note that there is none."""
    try:
        return importlib.metadata.version("inferno")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
