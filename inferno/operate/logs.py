"""Log files of the supervised processes: rotated at a start, and followed line by line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

#: A larger log file is moved to ``<name>.log.1`` when its process starts.
ROTATE_BYTES = 10 * 1024 * 1024
#: Bytes from the end of a log in which its last lines are looked for.
_TAIL_BYTES = 8192


class Logs:
    """The log files of one directory, one for each process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        #: The file and its unfinished last line, by name of the process.
        self._followed: dict[str, tuple[IO[bytes], bytes]] = {}

    def path(self, name: str) -> Path:
        """Return the file that holds a process's output."""
        return self._directory / f"{name}.log"

    def open(self, name: str) -> IO[bytes]:
        """Open a process's log to append to it; a large file is rotated first."""
        path = self.path(name)
        if path.exists() and path.stat().st_size > ROTATE_BYTES:
            path.replace(path.with_suffix(".log.1"))
        return path.open("ab")

    def last_lines(self, name: str, start: int, count: int = 8) -> tuple[str, ...]:
        """Return the last lines of a log that are not blank.

        Args:
          name: name of the process.
          start: offset in the file at which the process's last run starts, in bytes.
          count: maximum number of lines.
        """
        with self.path(name).open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(start, size - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return tuple(line for line in lines if line.strip())[-count:]

    def follows(self, name: str) -> bool:
        """Return whether a log is being followed."""
        return name in self._followed

    def new_lines(self, name: str, start: int) -> list[str]:
        """Return the lines that were added to a log since the last call.

        Args:
          name: name of the process.
          start: offset to read from at the first call, in bytes.
        """
        path = self.path(name)
        file, rest = self._followed.get(name, (None, b""))
        if file is None:
            file = path.open("rb")
            file.seek(start)
        *lines, rest = (rest + file.read()).split(b"\n")
        # Rotated: the old file was read to its end, the new one is read at the next call.
        if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
            file.close()
            file = path.open("rb")
        self._followed[name] = (file, rest)
        return [line.decode(errors="replace") for line in lines]

    def close(self) -> None:
        """Close the followed files."""
        for file, _ in self._followed.values():
            file.close()
        self._followed.clear()
