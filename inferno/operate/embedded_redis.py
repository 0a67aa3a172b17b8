"""The platform's own Redis server: its configuration, its address and who may reach it.

`inferno up` without INFERNO_REDIS__URL needs a Redis server. This module writes its configuration
into the data directory and waits until it answers. The supervisor starts and stops the process.

The server listens on a Unix socket in a folder that only this user can enter. It listens on TCP
only if the settings ask for it, and then every client needs a password.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shlex
import stat
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

from inferno.errors import ConfigurationError
from inferno.operate.machine_memory import machine_memory_bytes
from inferno.operate.redis_program import ServerProgram, find_program, refuse_older_program
from inferno.operate.redis_status import connect
from inferno.settings import RedisSettings

#: Longest path of a Unix socket, in bytes: 107 on Linux, 103 on macOS.
LONGEST_SOCKET_PATH = 103

#: What clients may do. Left out is what reads or runs files, empties or stops the server, or
#: changes its configuration: CONFIG SET, MODULE, DEBUG, SHUTDOWN, SAVE, REPLICAOF, MIGRATE,
#: FLUSHALL, KEYS, ACL, FUNCTION and others. Redis 6.2 to 8 and Valkey know all these names.
RIGHTS = (
    "~* &* -@all +@read +@write +@pubsub +@transaction +@connection -@dangerous -@scripting "
    "+eval +evalsha +script|load +script|exists +info +time +select "
    "+client|setname +client|list +config|get"
)

State = Literal["absent", "loading", "ready"]


@dataclass(frozen=True)
class EmbeddedRedis:
    """A configured server that the supervisor can start."""

    program: ServerProgram
    config_path: Path
    socket_path: Path
    #: Host and port of the server on the network; None if it has its Unix socket only.
    address: tuple[str, int] | None
    #: Needed by every client if the server is on the network.
    password: str | None = field(repr=False)

    @property
    def url(self) -> str:
        """URL of the server for processes of this user on this machine."""
        user = f":{self.password}@" if self.password else ""
        return f"unix://{user}{quote(str(self.socket_path))}?db=0"

    @property
    def command(self) -> str:
        """Shell command that runs the server in the foreground."""
        return shlex.join([str(self.program.path), str(self.config_path)])

    def wait_until_ready(self, alive: Callable[[], bool], timeout_s: float = 10.0) -> bool:
        """Wait until the server answers.

        Args:
          alive: tells whether the server's process is running.
          timeout_s: time limit for a server that does not answer, in seconds. There is no limit
            while the server answers that it is loading its data.

        Returns:
          False when the process ended or did not answer.
        """
        deadline = time.monotonic() + timeout_s
        while alive() and time.monotonic() < deadline:
            state = _state(self.url, self.config_path)
            if state == "ready":
                return True
            if state == "loading":
                deadline = time.monotonic() + timeout_s
            time.sleep(0.02)
        return False


def prepare(data_dir: Path, settings: RedisSettings | None = None) -> EmbeddedRedis:
    """Write the configuration of a server that keeps its data in ``<data_dir>/redis``.

    Take the data directory's lock first (``Supervisor.lock``): this overwrites the configuration
    that a running platform's server reads at its next start.

    Args:
      data_dir: the platform's data directory.
      settings: the server's address, password, memory and durability; None for the defaults.

    Raises:
      ConfigurationError: there is no server program, or it is older than the data.
    """
    settings = settings or RedisSettings()
    program = find_program()
    directory = data_dir.resolve() / "redis"
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    refuse_older_program(program, directory)
    password = _password(directory, settings) if settings.address else None
    redis = EmbeddedRedis(
        program, directory / "redis.conf", _socket_path(directory), settings.address, password
    )
    _write_private(redis.config_path, _configuration(redis, settings))
    _write_private(directory / "written-by.txt", f"{program}\n")
    _write_private(directory / "url.txt", f"{redis.url}\n")
    return redis


def running_url(data_dir: Path) -> str | None:
    """Return the URL of the server that runs on a data directory, or None if none answers.

    Commands in a second terminal need it, because socket and password are the server's own.
    """
    directory = data_dir.resolve() / "redis"
    url = _noted_url(directory)
    if url is None or _state(url, directory / "redis.conf") == "absent":
        return None
    return url


def password_path(data_dir: Path) -> Path:
    """Return the file that holds the password of a server on the network."""
    return data_dir.resolve() / "redis" / "password.txt"


def _noted_url(directory: Path) -> str | None:
    try:
        return (directory / "url.txt").read_text().strip()
    except OSError:
        return None


def _password(directory: Path, settings: RedisSettings) -> str:
    """Return the password of the settings, or a generated one that stays the same."""
    path = directory / "password.txt"
    if settings.password is not None:
        password = settings.password.get_secret_value()
    elif path.exists():
        return path.read_text().strip()
    else:
        password = secrets.token_urlsafe(32)
    _write_private(path, f"{password}\n")
    return password


def _socket_path(directory: Path) -> Path:
    """Return the path of the server's socket, in a folder that only this user can enter."""
    path = directory / "redis.sock"
    if _is_short(path):
        return path
    # The digest keeps a copy of the directory from using the original's socket. The folder is not
    # in $XDG_RUNTIME_DIR, which is deleted when its user logs out: the platform may run on.
    prefix = f"inferno-{hashlib.sha256(os.fsencode(directory)).hexdigest()[:12]}-"
    noted = Path(unquote(urlsplit(_noted_url(directory) or "").path))
    if noted.parent.name.startswith(prefix) and _is_private(noted.parent):
        return noted
    path = Path(tempfile.mkdtemp(prefix=prefix), path.name)
    if not _is_short(path):
        path.parent.rmdir()
        raise ConfigurationError(
            f"{directory} and {path.parent} are too long for the path of a Unix socket, which has "
            f"at most {LONGEST_SOCKET_PATH} bytes. Set INFERNO_DATA__DIR to a shorter one."
        )
    return path


def _is_short(path: Path) -> bool:
    return len(os.fsencode(path)) <= LONGEST_SOCKET_PATH


def _is_private(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except OSError:
        return False
    is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()
    return is_own and status.st_mode & 0o077 == 0


def _configuration(redis: EmbeddedRedis, settings: RedisSettings) -> str:
    if settings.maxmemory_bytes is None:
        # The other half is for the models, and for the copy that rewriting the file may need.
        maxmemory = machine_memory_bytes() // 2
    else:
        maxmemory = settings.maxmemory_bytes
    host, port = redis.address or ("127.0.0.1", 0)
    secret = (
        f"#{hashlib.sha256(redis.password.encode()).hexdigest()}" if redis.password else "nopass"
    )
    return f"""\
# Inferno writes this file at every start; changes are lost.
unixsocket {_quoted(redis.socket_path)}
unixsocketperm 700
# Port 0 means no TCP.
bind {host}
port {port}
protected-mode yes
user default on {secret} {RIGHTS}
daemonize no
dir {_quoted(redis.config_path.parent)}
# The append-only file keeps the data; snapshots would only cost forks.
appendonly yes
appendfsync {settings.fsync}
save ""
# Rewriting that file took a fifth of the server's CPU time under load. Compression would save a
# fifteenth of the space and take half as long again. One late rewrite replaces several early ones.
rdbcompression no
auto-aof-rewrite-percentage 200
auto-aof-rewrite-min-size 256mb
# A record with a field longer than this takes twice the memory. The default is 64 bytes; the key
# that lets equal tasks share a result is longer for models with long names. (All versions know this
# option; since Redis 7 it is called hash-max-listpack-value.)
hash-max-ziplist-value 256
# A full server refuses writes; eviction would silently lose tasks.
maxmemory {maxmemory}
maxmemory-policy noeviction
"""


def _quoted(path: Path) -> str:
    escaped = str(path).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _write_private(path: Path, text: str) -> None:
    """Replace a file atomically; only its owner can read it."""
    fresh = path.with_suffix(".new")
    # A file that an ended process left may have been made with another mode.
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    fresh.replace(path)


def _state(url: str, config_path: Path) -> State:
    """Return the state of the server of this configuration at a URL."""
    from redis import RedisError

    try:
        with connect(url, timeout_s=1) as client:
            info = client.info()
    except (RedisError, ValueError):
        return "absent"
    # A server of other data may have the socket.
    if info.get("config_file") != str(config_path):
        return "absent"
    return "loading" if info.get("loading") == "1" else "ready"
