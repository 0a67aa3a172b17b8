"""How much memory this process may use: the machine's, or less in a container."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def machine_memory_bytes() -> int:
    """Return the memory of the machine or of the container, whichever is less."""
    total: int = psutil.virtual_memory().total
    return min([total, *_limits()])


def _limits() -> Iterator[int]:
    """Yield the limits of this process's control groups (version 1 or 2), in bytes."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return  # Not on Linux.
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            root, name = _CGROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = _CGROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        # A limit of an outer group holds too. In a container the path may be that of the host.
        group = PurePosixPath(own).relative_to("/")
        for folder in (group, *group.parents):
            # The text is "max" where there is no limit.
            with suppress(OSError, ValueError):
                yield int((root / folder / name).read_text())
