"""Ensembles: models whose package declares a graph of other models.

Named *values* pass through the graph: first the ensemble's own inputs, then the outputs of its
stages. A stage can start once every value that it takes exists, so stages may be declared in any
order.

    check_graph    checks the manifest alone
    check_types    also checks the signatures of the stages' models
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from inferno import names
from inferno.protocol.signature import Signature, TensorSpec

#: The `format` of a package that is an ensemble.
FORMAT = "ensemble"


class Stage(BaseModel):
    """One model of an ensemble, and the values that it takes and gives."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        pattern=f"^{names.MODEL_NAME.pattern}$",
        description="Model that the stage runs; it may be an ensemble.",
    )
    version: int | None = Field(
        default=None, ge=1, description="Model version. Default: the active version."
    )
    name: str = Field(default="", description="Name of the stage. Default: the model's name.")
    inputs: dict[str, str] = Field(min_length=1, description="Value for each input of the model.")
    outputs: dict[str, str] = Field(
        min_length=1, description="Value that each output of the model becomes."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, given: Any) -> Any:
        if isinstance(given, Mapping) and not given.get("name"):
            return {**given, "name": given.get("model")}
        return given

    @property
    def takes(self) -> frozenset[str]:
        """The values that the stage needs before it can start."""
        return frozenset(self.inputs.values())

    @property
    def gives(self) -> frozenset[str]:
        """The values that exist once the stage has finished."""
        return frozenset(self.outputs.values())


def check_graph(stages: Sequence[Stage], signature: Signature) -> None:
    """Check that each value is made once, and that each stage is needed and can start.

    Args:
      stages: the stages in any order.
      signature: signature of the ensemble.
    Raises:
      ValueError: the graph is wrong; names the stage and the value.
    """
    inputs = [spec.name for spec in signature.inputs]
    makers: dict[str, str] = dict.fromkeys(inputs, "an input of the ensemble")
    known: set[str] = set()
    for stage in stages:
        if stage.name in known:
            raise ValueError(f"two stages are named {stage.name!r}; give each its own `name`")
        known.add(stage.name)
        for value in stage.outputs.values():
            if value in makers:
                raise ValueError(
                    f"stage {stage.name}: outputs: the value {value!r} is made twice: "
                    f"it is also {makers[value]}"
                )
            makers[value] = f"an output of stage {stage.name}"
    for stage in stages:
        for name, value in stage.inputs.items():
            if value not in makers:
                raise ValueError(
                    f"stage {stage.name}: inputs.{name}: nothing makes the value {value!r}; "
                    f"the values are: {', '.join(makers)}"
                )
    if stuck := _stuck(stages, inputs):
        raise ValueError(f"stages wait for each other: {' -> '.join(_circle(stuck))}")
    outputs = [spec.name for spec in signature.outputs]
    for name in outputs:
        if name not in makers:
            raise ValueError(f"signature.outputs: nothing makes the value {name!r}")
    used = needed(stages, outputs)
    for stage in stages:
        if stage not in used:
            raise ValueError(f"stage {stage.name}: no output of the ensemble needs it")
    taken = set(outputs).union(*(stage.takes for stage in stages))
    for name in inputs:
        if name not in taken:
            raise ValueError(f"signature.inputs: no stage takes the value {name!r}")


def needed(stages: Sequence[Stage], values: Sequence[str]) -> list[Stage]:
    """Return the stages on which values depend, directly or through other stages."""
    sought, found = set(values), set[str]()
    growing = True
    while growing:
        growing = False
        for stage in stages:
            if stage.name not in found and stage.gives & sought:
                found.add(stage.name)
                sought |= stage.takes
                growing = True
    return [stage for stage in stages if stage.name in found]


def ordered(stages: Sequence[Stage], inputs: Sequence[str]) -> Iterator[Stage]:
    """Yield the stages that can start, each after the stages whose values it takes."""
    available, left = set(inputs), list(stages)
    while ready := [stage for stage in left if stage.takes <= available]:
        yield from ready
        available.update(*(stage.gives for stage in ready))
        left = [stage for stage in left if stage not in ready]


def _stuck(stages: Sequence[Stage], inputs: Sequence[str]) -> list[Stage]:
    startable = {stage.name for stage in ordered(stages, inputs)}
    return [stage for stage in stages if stage.name not in startable]


def _circle(stuck: Sequence[Stage]) -> list[str]:
    """Return the names of stages that wait for each other, ending with the first name again."""
    path = [stuck[0]]
    while True:
        # A stuck stage always waits for another stuck stage.
        following = next(stage for stage in stuck if stage.gives & path[-1].takes)
        if following in path:
            return [stage.name for stage in [*path[path.index(following) :], following]]
        path.append(following)


def check_types(
    stages: Sequence[Stage], signature: Signature, signatures: Mapping[str, Signature]
) -> None:
    """Check that each value has the dtype and shape that its takers declare.

    Args:
      stages: stages that `check_graph` has accepted.
      signature: signature of the ensemble.
      signatures: signatures of the stages' models, by stage name.
    Raises:
      ValueError: a value does not fit; names the stage and the field.
    """
    values = {spec.name: spec for spec in signature.inputs}
    for stage in ordered(stages, list(values)):
        model, place = signatures[stage.name], f"stage {stage.name}"
        if model.batched != signature.batched:
            raise ValueError(
                f"{place}: either both the ensemble and {stage.model} must have `batch` as the "
                "first dimension of their tensors, or neither"
            )
        declared = {spec.name: spec for spec in model.inputs}
        for name, value in stage.inputs.items():
            spec = _declared(declared, name, f"{place}: inputs.{name}", stage.model)
            _check_fit(values[value], spec, value, f"{place}: inputs.{name}")
        _check_required(stage, model, values)
        declared = {spec.name: spec for spec in model.outputs}
        for name, value in stage.outputs.items():
            values[value] = _declared(declared, name, f"{place}: outputs.{name}", stage.model)
    for spec in signature.outputs:
        _check_fit(values[spec.name], spec, spec.name, f"signature.outputs.{spec.name}")


def _declared(specs: Mapping[str, TensorSpec], name: str, place: str, model: str) -> TensorSpec:
    if name not in specs:
        raise ValueError(f"{place}: {model} has no such tensor; it has: {', '.join(specs)}")
    return specs[name]


def _check_required(stage: Stage, model: Signature, values: Mapping[str, TensorSpec]) -> None:
    for spec in model.inputs:
        if not spec.optional and spec.name not in stage.inputs:
            raise ValueError(f"stage {stage.name}: inputs.{spec.name}: missing; it is required")
    given = [name for name in model.one_of if name in stage.inputs]
    certain = [name for name in given if not values[stage.inputs[name]].optional]
    if model.one_of and (not given or len(certain) > 1):
        raise ValueError(
            f"stage {stage.name}: inputs: expected exactly one of {', '.join(model.one_of)}"
        )


def _check_fit(value: TensorSpec, spec: TensorSpec, name: str, place: str) -> None:
    """Check that a value fits a declared tensor."""
    sizes = zip(value.shape, spec.shape, strict=False)
    if (
        value.dtype != spec.dtype
        or len(value.shape) != len(spec.shape)
        or any(a != b for a, b in sizes if isinstance(a, int) and isinstance(b, int))
    ):
        raise ValueError(
            f"{place}: expected {_described(spec)}, but the value {name!r} is {_described(value)}"
        )
    if value.optional and not spec.optional:
        raise ValueError(f"{place}: is required, but the value {name!r} may be missing")


def _described(spec: TensorSpec) -> str:
    return f"{spec.dtype} [{', '.join(map(str, spec.shape))}]"
