"""Writes the output of the supervised processes into their log files, which rotate by size.

    process -> socket -> this process -> <name>.log, then <name>.log.1 to <name>.log.<kept>

A process that wrote its file itself would go on writing to a renamed file. So this process is the
only one that writes log files, and renames them between two lines. The supervisor starts it and
hands it the reading end of each process's socket. It outlives a killed supervisor and ends when no
process can write any more.

Each process has a socket and not a pipe: a pipe mixes long writes of the processes that share it,
such as gunicorn's.
"""

from __future__ import annotations

import os
import re
import selectors
import socket
import sys
from contextlib import suppress
from pathlib import Path

#: Reports to the supervisor, before the name of a process: its output has been taken over, or has
#: been written to its end.
TAKEN, WRITTEN = "+", "-"

#: Bytes that are read from one process at a time.
_CHUNK = 65_536
#: A longer line is broken, so that a process that never ends a line takes no memory.
_LONGEST_LINE = 65_536
#: Longest name of a process, in bytes.
_LONGEST_NAME = 1024
#: Control characters other than tab and newline; they could rewrite the operator's terminal.
_CONTROLS = re.compile(rb"[\x00-\x08\x0b-\x1f\x7f]|\xc2[\x80-\x9f]")


class LogFile:
    """A log file with a maximum size, and the older files beside it."""

    def __init__(self, path: Path, max_bytes: int, kept: int) -> None:
        """Open the file to append to it; only its owner may read it.

        Args:
          path: the file.
          max_bytes: size at which the next line goes to a new file.
          kept: number of older files to keep.
        """
        self._path = path
        self._max_bytes = max_bytes
        self._kept = kept
        #: Bytes that the disk did not take since the last success.
        self._lost = 0
        self._open()

    def write(self, lines: bytes) -> None:
        """Append whole lines; what a full disk does not take is counted, and later reported."""
        if self._size and self._size + len(lines) > self._max_bytes:
            self._rotate()
        if self._lost:
            lines = b"(%d bytes of the log could not be written)\n" % self._lost + lines
        written = 0
        try:
            while written < len(lines):
                written += os.write(self._file, lines[written:])
            self._lost = 0
        except OSError:
            self._lost += len(lines) - written
        self._size += written

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(self._path, flags, 0o600)
        # The file may be older than this rule.
        os.fchmod(self._file, 0o600)
        self._size = os.fstat(self._file).st_size

    def _rotate(self) -> None:
        older = [self._path.with_name(f"{self._path.name}.{n}") for n in range(1, self._kept + 1)]
        for source, target in zip([*older[-2::-1], self._path], older[::-1], strict=True):
            if source.exists():
                source.replace(target)
        self.close()
        self._open()


class _Source:
    """The output of one process: what it writes, line by line."""

    def __init__(self, name: str, end: socket.socket, log: LogFile) -> None:
        self.name = name
        self.end = end
        self._log = log
        self._rest = b""

    def read(self) -> bool:
        """Write what has arrived; return False once the process has closed its end."""
        try:
            data = self.end.recv(_CHUNK)
        except ConnectionError:
            data = b""
        lines, newline, rest = (self._rest + data).rpartition(b"\n")
        if rest and (not data or len(rest) > _LONGEST_LINE):
            lines, newline, rest = lines + newline + rest, b"\n", b""
        self._rest = rest
        if newline:
            self._log.write(_CONTROLS.sub(_escaped, lines) + newline)
        return bool(data)

    def close(self) -> None:
        """Close the socket and the file."""
        self.end.close()
        self._log.close()


def _escaped(found: re.Match[bytes]) -> bytes:
    return b"\\x%02x" % found[0][-1]


class _Writer:
    """Reads the sockets of all processes."""

    def __init__(self, control: socket.socket, folder: Path, max_bytes: int, kept: int) -> None:
        self._control = control
        self._folder = folder
        self._max_bytes = max_bytes
        self._kept = kept
        self._selector = selectors.DefaultSelector()

    def run(self) -> None:
        """Write until the supervisor has gone and no process can write any more."""
        self._selector.register(self._control, selectors.EVENT_READ)
        while self._selector.get_map():
            for key, _ in self._selector.select():
                source: _Source | None = key.data
                if source is None:
                    self._accept()
                elif not source.read():
                    self._selector.unregister(source.end)
                    source.close()
                    self._tell(f"{WRITTEN}{source.name}")

    def _accept(self) -> None:
        """Take over the reading end of a process's socket."""
        try:
            message, ends, _, _ = socket.recv_fds(self._control, _LONGEST_NAME, 1)
        except ConnectionError:
            message, ends = b"", []
        if not message:
            self._selector.unregister(self._control)
            return
        name = message.decode()
        log = LogFile(self._folder / f"{name}.log", self._max_bytes, self._kept)
        source = _Source(name, socket.socket(fileno=ends[0]), log)
        self._selector.register(source.end, selectors.EVENT_READ, source)
        self._tell(f"{TAKEN}{name}")

    def _tell(self, report: str) -> None:
        # Nobody needs it once the supervisor was killed.
        with suppress(OSError):
            self._control.sendall(report.encode() + b"\n")


if __name__ == "__main__":
    # The supervisor stops this process by closing the sockets; Ctrl-C must lose no line.
    _Writer(
        socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]), *map(int, sys.argv[3:])
    ).run()
