"""Request bodies of the calls that load, unload and activate versions of models."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from inferno.errors import InvalidField
from inferno.protocol.decoding import decode
from inferno.protocol.limits import Limits

Version = Annotated[int, Meta(ge=1, description="Version number.")]
Share = Annotated[
    float, Meta(gt=0, description="Weight in sharing requests, relative to the other versions'.")
]


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Load a version."""

    #: Name of the model.
    name: str
    #: Version to load. `latest` also lets each newer version take over when it appears.
    version: Version | Literal["latest"] = "latest"
    #: Whether the version becomes the active one once it is loaded.
    activate: bool = True


class Unload(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Stop serving a version."""

    #: Name of the model.
    name: str
    #: Version to unload; None for every version.
    version: Version | None = None


class Activate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Choose the active versions, with exactly one of the fields."""

    #: Version that answers all requests that name none.
    version: Version | Literal["latest"] | None = None
    #: Weights of the versions that share the requests that name none.
    weights: dict[Version, Share] | None = None

    @property
    def shares(self) -> dict[int, float]:
        """Weight of each chosen version."""
        assert not isinstance(self.version, str)
        return {self.version: 1.0} if self.version is not None else dict(self.weights or {})


def parse_load(body: bytes, limits: Limits) -> Load:
    """Read the body of a load.

    Raises:
      InvalidRequest: the body does not have the documented form; names the field.
    """
    return decode(body, Load, limits)


def parse_unload(body: bytes, limits: Limits) -> Unload:
    """Read the body of an unload.

    Raises:
      InvalidRequest: the body does not have the documented form; names the field.
    """
    return decode(body, Unload, limits)


def parse_activate(body: bytes, limits: Limits) -> Activate:
    """Read the body of an activation.

    Raises:
      InvalidRequest: the body does not have the documented form; names the field.
    """
    given = decode(body, Activate, limits)
    if (given.version is None) == (not given.weights):
        raise InvalidField("expected either a version or weights", "version")
    return given
