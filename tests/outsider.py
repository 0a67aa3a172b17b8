"""What another user of this machine, `nobody`, can reach; only root can find out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")

#: Gives up its rights, acts, and prints what came of it. Python itself may be out of nobody's
#: reach, so everything is imported before.
_SCRIPT = """
import os, pathlib, pwd, socket, sys

action, target = sys.argv[1:]
user = pwd.getpwnam("nobody")
os.setgroups([])
os.setgid(user.pw_gid)
os.setuid(user.pw_uid)
try:
    if action == "read":
        print(pathlib.Path(target).read_bytes())
    elif action == "list":
        print(os.listdir(target))
    else:
        family = socket.AF_INET if action == "ask" else socket.AF_UNIX
        with socket.socket(family) as peer:
            peer.settimeout(5)
            peer.connect(("127.0.0.1", int(target)) if action == "ask" else target)
            peer.sendall(b"PING\\r\\n")
            print(peer.recv(1000).decode())
except OSError as exc:
    print(type(exc).__name__)
"""

Action = Literal["ask", "connect", "list", "read"]


def as_nobody(action: Action, target: Path | int) -> str:
    """Try to reach something as the user `nobody`.

    Args:
      action: ``read`` a file, ``list`` a folder, ``connect`` to a Unix socket, or ``ask`` a port of
        127.0.0.1; the latter two send PING.
      target: a path or a port.

    Returns:
      The answer, or the name of the error.
    """
    command = [sys.executable, "-c", _SCRIPT, action, str(target)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
