"""The whole platform, started as a user starts it: `inferno up`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import httpx

from inferno.operate.embedded_redis import running_url
from inferno.operate.ports import free_port
from inferno.testing.processes import command_path, process, wait_until


@dataclass(frozen=True)
class Platform:
    """A running platform."""

    #: URL of the web tier.
    url: str
    flower_url: str
    redis_url: str
    #: Environment of its processes, for starting more of them.
    env: dict[str, str]
    data: Path
    popen: Popen[bytes]


def platform_env(data: Path) -> dict[str, str]:
    """Return the environment variables of a platform on free ports."""
    return {
        "INFERNO_DATA__DIR": str(data),
        "INFERNO_SERVER__PORT": str(free_port()),
        "INFERNO_FLOWER__PORT": str(free_port()),
        # Flower's API needs a login unless this is set.
        "FLOWER_UNAUTHENTICATED_API": "true",
    }


@contextmanager
def running_platform(data: Path, env: dict[str, str], *options: str) -> Iterator[Platform]:
    """Run `inferno up` on a directory until the end of the block."""
    env = platform_env(data) | env
    url = f"http://127.0.0.1:{env['INFERNO_SERVER__PORT']}"
    log = data / "up.log"
    with process([command_path("inferno"), "up", *options], env, log) as popen:
        wait_until(lambda: popen.poll() is not None or is_ready(url), 120, "platform ready")
        assert popen.poll() is None, log.read_text()
        redis_url = running_url(data)
        assert redis_url is not None
        yield Platform(
            url=url,
            flower_url=f"http://127.0.0.1:{env['INFERNO_FLOWER__PORT']}",
            redis_url=redis_url,
            env=env | {"INFERNO_REDIS__URL": redis_url},
            data=data,
            popen=popen,
        )


def is_ready(url: str) -> bool:
    """Return whether a platform answers and all its models are warm."""
    try:
        return httpx.get(f"{url}/health/ready", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
