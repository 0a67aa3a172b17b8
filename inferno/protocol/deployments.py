"""The bodies of the calls that load, unload and activate versions of models."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from inferno.errors import InvalidField
from inferno.protocol.requests import decode

Version = Annotated[int, Meta(ge=1, description="A version's number.")]
Share = Annotated[float, Meta(gt=0, description="A part of the requests, relative to the others'.")]


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Load a version."""

    #: The model's.
    name: str
    #: By default the newest; then each newer one that appears takes over.
    version: Version | Literal["latest"] = "latest"
    #: Whether it answers all requests that name no version, once it is loaded.
    activate: bool = True


class Unload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Take a version out of service."""

    #: The model's.
    name: str
    #: By default all versions.
    version: Version | None = None


class Activate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Say which versions answer; one of both."""

    #: That answers all requests which name none.
    version: Version | Literal["latest"] | None = None
    #: Versions that share these requests.
    weights: dict[Version, Share] | None = None

    @property
    def shares(self) -> dict[int, float]:
        """The shares of all versions that are named."""
        assert not isinstance(self.version, str)
        return {self.version: 1.0} if self.version is not None else dict(self.weights or {})


def parse_load(body: bytes) -> Load:
    """Read the body of a load.

    Raises:
      InvalidRequest: it is not of the documented form; names the field.
    """
    return decode(body, Load)


def parse_unload(body: bytes) -> Unload:
    """Read the body of an unload.

    Raises:
      InvalidRequest: it is not of the documented form; names the field.
    """
    return decode(body, Unload)


def parse_activate(body: bytes) -> Activate:
    """Read the body of a call that says which versions answer.

    Raises:
      InvalidRequest: it is not of the documented form; names the field.
    """
    given = decode(body, Activate)
    if (given.version is None) == (not given.weights):
        raise InvalidField("expected either a version or weights", "version")
    return given
