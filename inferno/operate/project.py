"""The project's directory, as the commands see it: its processes, its models and its addresses.

Before anything runs, this says what could: `inferno up` starts it, `inferno doctor` checks it.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from inferno.errors import ConfigurationError, PackageError
from inferno.operate.supervisor import parse_procfile
from inferno.protocol.signature import BATCH, TensorSpec
from inferno.protocol.tensors import NUMERIC, Array
from inferno.repository.package import Package
from inferno.repository.repository import Repository
from inferno.settings import RedisSettings, Settings, variable

#: The sentence of the examples.
SAMPLE_TEXT = "What a lovely day!"
#: The picture of the examples, a grey pixel as PNG in base64.
_PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg=="
)
#: Examples list so many numbers of an input.
_LISTED = 64


def enter_project() -> Path:
    """Go to the project's directory, which relative paths of settings start from.

    It is the nearest one upwards with a Procfile, else the one that this file belongs to.
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
      ConfigurationError: there is no Procfile.
    """
    file = root / "Procfile"
    if not file.is_file():
        raise ConfigurationError(f"{root} has no Procfile; run this in Inferno's own directory.")
    return parse_procfile(file.read_text())


def local_url(settings: Settings) -> str:
    """Return where the platform of these settings is reached from this machine."""
    host = settings.server.host
    if host in ("0.0.0.0", "::", ""):
        host = "127.0.0.1"
    if ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{settings.server.port}"


#: Where brokers listen that name no port, by scheme.
_BROKER_PORTS = {"amqp": 5672, "amqps": 5671, "redis": 6379, "rediss": 6379}


def reach_redis(settings: RedisSettings) -> str:
    """Return the address of the Redis that the settings name.

    Raises:
      ConfigurationError: nothing listens there.
    """
    return _reach(settings.url or "", 6379, settings.connect_timeout_s, variable("redis", "url"))


def reach_broker(settings: Settings) -> str | None:
    """Return the address of the broker that the settings name; None for one we know nothing of.

    Raises:
      ConfigurationError: nothing listens there.
    """
    port = _BROKER_PORTS.get(settings.broker.scheme)
    if settings.broker.url is None or port is None:
        return None
    timeout_s = settings.redis.connect_timeout_s
    return _reach(settings.broker.url, port, timeout_s, variable("broker", "url"))


def _reach(url: str, default_port: int, timeout_s: float, name: str) -> str:
    parts = urlsplit(url)
    try:
        address = (parts.hostname or "127.0.0.1", parts.port or default_port)
        socket.create_connection(address, timeout=timeout_s).close()
    except (OSError, ValueError) as exc:
        # The whole URL may hold a password.
        raise ConfigurationError(f"{name}: {parts.hostname} cannot be reached: {exc}") from None
    return f"{address[0]}:{address[1]}"


def servable(repository: Repository, wanted: str | None) -> tuple[list[str], dict[str, str]]:
    """Choose the models to start workers for.

    Args:
      repository: the models that there are.
      wanted: names with commas; None for all.

    Returns:
      The names, and what is wrong with the other models.

    Raises:
      InfernoError: one that was asked for by name cannot be served.
    """
    broken = dict(repository.errors)
    for name, model in repository.models.items():
        path = missing_artifact(model.package())
        if path is not None:
            broken[name] = f"{path} is missing; make it with `inferno models prepare {name}`"
    if wanted is None:
        return [name for name in repository.models if name not in broken], broken
    names = list(dict.fromkeys(name.strip() for name in wanted.split(",") if name.strip()))
    for name in names:
        if name in broken:
            raise PackageError(broken[name])
        repository.model(name)
    return names, {}


def missing_artifact(package: Package) -> Path | None:
    """Return the file or folder that a package needs and does not have."""
    artifact = package.manifest.artifact
    if artifact is None or (package.path / artifact).exists():
        return None
    return package.path / artifact


def example_call(url: str, package: Package) -> str:
    """Return a shell command that asks a platform's model for something."""
    inputs = sample_inputs(package)
    target = f"{url}/v1/models/{package.name}:predict"
    if all(value.size <= _LISTED for value in inputs.values() if isinstance(value, np.ndarray)):
        plain = {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in inputs.items()
        }
        return f"curl {target} -d {shlex.quote(json.dumps({'inputs': plain}))}"
    # Nobody wants to see a picture's numbers.
    tensors = ", ".join(
        f"{name!r}: {_expression(value) if isinstance(value, np.ndarray) else repr(value)}"
        for name, value in inputs.items()
    )
    program = f"import json; print(json.dumps({{'inputs': {{{tensors}}}}}))"
    return f"python3 -c {shlex.quote(program)} | curl {target} -d @-"


def _expression(array: Array) -> str:
    """Write an array of equal numbers as a tensor of the wire, in Python."""
    return f"{{'shape': {list(array.shape)}, 'data': [{array.flat[0]!s}] * {array.size}}}"


def sample_inputs(package: Package) -> dict[str, Any]:
    """Return inputs for an example: a text where that will do, else those of the warm-up.

    Where there are none, they are made up: numbers are arrays of zeros.
    """
    signature = package.signature
    wanted = [spec for spec in signature.inputs if not spec.optional]
    for spec in signature.inputs:
        if spec.dtype == "string" and wanted in ([], [spec]):
            return {spec.name: SAMPLE_TEXT}
    given = package.manifest.warm_up.inputs
    if given is not None:
        return given
    wanted += map(signature.input, signature.one_of[:1])
    return {spec.name: _sample(spec) for spec in wanted or signature.inputs[:1]}


def _sample(spec: TensorSpec) -> Any:
    shape = [dim if isinstance(dim, int) else (1 if dim == BATCH else 4) for dim in spec.shape]
    if spec.dtype in NUMERIC:
        return np.zeros(shape, NUMERIC[spec.dtype])
    text = SAMPLE_TEXT if spec.dtype == "string" else _PICTURE
    return np.full(shape, text, dtype=object).tolist()
