"""Log files of the supervised processes: written by `log_writer`, and followed line by line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from inferno.operate.log_writer import TAKEN, WRITTEN

#: Bytes from the end of a log in which its last lines are looked for.
_TAIL_BYTES = 8192
#: Longest time that the last lines of a process may take to be written, in seconds.
_WRITTEN_S = 2.0


@dataclass
class _Followed:
    """A log that is followed: its open file, and its unfinished last line."""

    file: IO[bytes]
    rest: bytes = b""


class Logs:
    """The log files of one directory, one for each process."""

    def __init__(self, directory: Path, max_bytes: int, kept: int) -> None:
        """Store where the files are.

        Args:
          directory: folder of the files.
          max_bytes: size at which a new file is begun.
          kept: number of older files to keep for each process.
        """
        self._directory = directory
        self._limits = max_bytes, kept
        self._followed: dict[str, _Followed] = {}
        self._writer: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        #: Reports of the writer that nobody has waited for.
        self._told: list[str] = []
        #: Reading end of each process's socket, for a writer that replaces one that was killed.
        self._ends: dict[str, socket.socket] = {}

    def path(self, name: str) -> Path:
        """Return the file that holds a process's output."""
        return self._directory / f"{name}.log"

    # -- Writing ----------------------------------------------------------------------------------

    def start(self) -> None:
        """Create the folder, which only its owner can read, and start the writer."""
        self._directory.mkdir(parents=True, exist_ok=True)
        self._directory.chmod(0o700)
        for path in self._directory.glob("*.log*"):
            path.chmod(0o600)
        self._start_writer()

    def tend(self) -> bool:
        """Replace the writer if it was killed; return whether it was."""
        if self._writer is None or self._writer.poll() is None:
            return False
        self._start_writer()
        for name in self._ends:
            self._hand_over(name)
        return True

    def open(self, name: str) -> socket.socket:
        """Return what a new process writes its output to; the caller closes it."""
        reading, writing = socket.socketpair()
        if (before := self._ends.pop(name, None)) is not None:
            before.close()
        self._ends[name] = reading
        self._hand_over(name)
        return writing

    def finish(self, name: str) -> None:
        """Wait until all output of a process that has ended is in its file."""
        if (end := self._ends.pop(name, None)) is not None:
            self._wait_for(f"{WRITTEN}{name}")
            end.close()

    def stop(self) -> None:
        """End the writer once everything is written; no process may be running."""
        for name in list(self._ends):
            self.finish(name)
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._writer is not None:
            try:
                self._writer.wait(_WRITTEN_S)
            except subprocess.TimeoutExpired:
                self._writer.kill()
                self._writer.wait()
            self._writer = None

    def open_own(self) -> IO[bytes]:
        """Open the log of the supervisor's helpers to append to it; they write hardly anything."""
        path, (max_bytes, _) = self.path("supervisor"), self._limits
        if path.exists() and path.stat().st_size > max_bytes:
            path.replace(path.with_name(f"{path.name}.1"))
        return open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")

    def _start_writer(self) -> None:
        if self._control is not None:
            self._control.close()
        self._control, theirs = socket.socketpair()
        self._control.settimeout(_WRITTEN_S)
        root = str(Path(__file__).resolve().parents[2])
        limits = map(str, self._limits)
        module = "inferno.operate.log_writer"
        with theirs, self.open_own() as log:
            self._writer = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), self._directory, *limits],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": root},
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )

    def _hand_over(self, name: str) -> None:
        # A writer that was killed is replaced at the next `tend`.
        with suppress(OSError):
            assert self._control is not None
            socket.send_fds(self._control, [name.encode()], [self._ends[name].fileno()])
            self._wait_for(f"{TAKEN}{name}")

    def _wait_for(self, report: str) -> None:
        """Wait for a report of the writer, but not for long."""
        with suppress(OSError):
            while self._control is not None and report not in self._told:
                reports = self._control.recv(_TAIL_BYTES)
                if not reports:
                    return
                self._told += reports.decode().split()
        if report in self._told:
            self._told.remove(report)

    # -- Reading ----------------------------------------------------------------------------------

    def size(self, name: str) -> int:
        """Return the present size of a log, in bytes."""
        try:
            return self.path(name).stat().st_size
        except FileNotFoundError:
            return 0

    def last_lines(self, name: str, start: int, count: int = 8) -> tuple[str, ...]:
        """Return the last lines of a log that are not blank.

        Args:
          name: name of the process.
          start: offset in the file at which the process's last run starts, in bytes.
          count: maximum number of lines.
        """
        with self.path(name).open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            # The file may have been rotated since.
            log.seek(max(start if start <= size else 0, size - _TAIL_BYTES))
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
        followed = self._followed.get(name)
        if followed is None:
            followed = self._followed[name] = _Followed(path.open("rb"))
            followed.file.seek(start)
        content = followed.rest + followed.file.read()
        # While it is rotated, there is no file for a moment.
        with suppress(FileNotFoundError):
            if os.fstat(followed.file.fileno()).st_ino != path.stat().st_ino:
                newer = path.open("rb")
                # Nothing is added to the old file any more. The new one is read at the next call.
                content += followed.file.read()
                followed.file.close()
                followed.file = newer
        *lines, followed.rest = content.split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def close(self) -> None:
        """Close the followed files."""
        for followed in self._followed.values():
            followed.file.close()
        self._followed.clear()
