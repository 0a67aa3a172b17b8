"""What `model.yaml` says of one version of a model."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from inferno import names
from inferno.protocol.signature import Signature
from inferno.protocol.tensors import NUMERIC
from inferno.repository import graph as ensemble
from inferno.repository.graph import Stage

MANIFEST = "model.yaml"

#: Batches of an ensemble that one worker has under way, by default: they do nothing but wait.
ENSEMBLE_EXECUTORS = 16


class TaskType(StrEnum):
    """What a model is for; it decides how results are shown."""

    CLASSIFICATION = "classification"
    DETECTION = "detection"
    TRANSCRIPTION = "transcription"
    SEARCH = "search"
    GENERATION = "generation"
    EMBEDDING = "embedding"
    OTHER = "other"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Batching(_Section):
    """How tasks of a model share forward passes. Unset values come from the settings."""

    max_batch_size: int | None = Field(
        default=None, ge=1, description="Rows of one forward pass, at most."
    )
    max_batch_delay_ms: float | None = Field(
        default=None,
        ge=0,
        validation_alias=AliasChoices(
            "max_batch_delay_ms", "max_batch_latency_ms", "max_batch_wait_ms"
        ),
        description="How long the oldest waiting task may be held back, while an executor is free, "
        "in ms.",
    )
    slo_p95_ms: float | None = Field(
        default=None,
        gt=0,
        description="What 95 of 100 tasks shall take at most, in ms: steers batch size and window, "
        "and replaces max_batch_delay_ms.",
    )
    pad: dict[str, float | str] = Field(
        default_factory=dict,
        description="Tensors whose free dimensions are padded to the longest of the batch, and the "
        "value to pad with.",
    )
    mask: dict[str, str] = Field(
        default_factory=dict,
        description="Padded sequences that the artifact gets a mask with, and the mask's name: "
        "int64 of rows and length, 1 where the sequence was given.",
    )
    buckets: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(),
        description="Sizes of padded dimensions, ascending: each is padded to the next one listed.",
    )
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(),
        description="Rows of forward passes, ascending, for models that are compiled for these: "
        "passes are padded to the next one. The last is the default of max_batch_size.",
    )
    oversized: Literal["split", "refuse"] = Field(
        default="split", description="What happens to a task of more rows than max_batch_size."
    )
    tolerance: float | None = Field(
        default=None,
        ge=0,
        description="How far outputs of a row may differ with what else is in its pass, relative "
        "to the largest value, before `inferno models validate` finds fault; default by dtype.",
    )

    @field_validator("buckets", "batch_sizes")
    @classmethod
    def _ascend(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if list(sizes) != sorted(set(sizes)):
            raise ValueError(f"{list(sizes)}: expected ascending sizes")
        return sizes

    @model_validator(mode="after")
    def _cover(self) -> Batching:
        if self.buckets and not self.pad:
            raise ValueError("buckets: expected `pad`, which says what to fill them up with")
        if missing := self.mask.keys() - self.pad.keys():
            raise ValueError(f"mask: {min(missing)}: expected it in `pad`, too")
        if self.batch_sizes and (self.max_batch_size or 1) > self.batch_sizes[-1]:
            raise ValueError(
                f"max_batch_size: {self.max_batch_size}: expected at most the last of batch_sizes"
            )
        return self


class Concurrency(_Section):
    """How many forward passes of a model run at the same time in one worker."""

    max_concurrency: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Executors of the model in one worker. Default: 1, and 16 for an ensemble.",
    )


class Codecs(_Section):
    """How numbers are written in results."""

    default: Literal["json", "base64"] = Field(
        default="json", description="For requests that do not say."
    )


class Inference(_Section):
    """How the engine runs. Unset values come from the settings."""

    device: Literal["auto", "cpu", "cuda"] | None = Field(
        default=None, description="Device of the engine."
    )
    quantize: Literal["none", "int8", "fp16", "bf16"] | None = Field(
        default=None,
        description="Precision that the artifact is loaded in; an error where that cannot be.",
    )
    compile: bool | None = Field(
        default=None, description="Whether a torch module is compiled with torch.compile."
    )
    threads: int | None = Field(default=None, ge=1, description="Threads of one forward pass.")


class WarmUp(_Section):
    """The sample that the engine is warmed up with."""

    inputs: dict[str, Any] | None = Field(
        default=None,
        description="Inputs as a client would send them. Default: made from the signature.",
    )


class Retries(_Section):
    """What happens after a transient error. Unset values come from the settings."""

    max_retries: int | None = Field(
        default=None, ge=0, description="Further attempts after the first."
    )
    backoff_s: float | None = Field(
        default=None, gt=0, description="Delay before the first retry; doubles with each."
    )
    max_backoff_s: float | None = Field(default=None, gt=0, description="Longest delay.")
    jitter: bool | None = Field(
        default=None, description="Draw each delay evenly from zero to its full length."
    )


class Cache(_Section):
    """Which work is done once for equal inputs. Unset: if the package is `deterministic`."""

    results: bool | None = Field(
        default=None, description="Whether results are kept, to answer later tasks with them."
    )
    ttl_s: float | None = Field(
        default=None, gt=0, description="How long a result is kept, in seconds."
    )
    coalesce: bool | None = Field(
        default=None, description="Whether equal tasks in flight share one computation."
    )
    deduplicate: bool | None = Field(
        default=None, description="Whether equal tasks in one batch are computed once."
    )


class Manifest(_Section):
    """The fields of `model.yaml`."""

    name: str = Field(
        pattern=f"^{names.MODEL_NAME.pattern}$", description="As the folder is called."
    )
    version: int = Field(ge=1, description="As the folder is called.")
    format: str = Field(
        description="The runtime: onnx, torchscript, python or transformers; or ensemble, of "
        "other models."
    )
    artifact: str | None = Field(
        default=None, description="File, or folder for transformers, that the runtime loads."
    )
    entrypoint: str | None = Field(
        default=None, description="`module:function` that builds a python model."
    )
    processor: str | None = Field(
        default=None,
        description="`module:function` that builds the pre- and post-processing of an artifact.",
    )
    task: TaskType = Field(default=TaskType.OTHER, description="What the model is for.")
    description: str = Field(default="", description="One line for people.")
    signature: Signature = Field(description="Inputs and outputs.")
    labels: tuple[str, ...] = Field(
        default=(), description="Class names, in the order of the scores."
    )
    batching: Batching = Field(default_factory=Batching, description="Sharing of forward passes.")
    concurrency: Concurrency = Field(default_factory=Concurrency, description="Parallel passes.")
    inference: Inference = Field(
        default_factory=Inference, description="Device, precision and threads."
    )
    codecs: Codecs = Field(default_factory=Codecs, description="Writing of numbers.")
    warm_up: WarmUp = Field(default_factory=WarmUp, description="The warm-up sample.")
    retries: Retries = Field(default_factory=Retries, description="After transient errors.")
    deterministic: bool = Field(
        default=False,
        description="Whether equal inputs give equally good outputs, and a pass has no other "
        "effects.",
    )
    cache: Cache = Field(default_factory=Cache, description="Work that is done once.")
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        le=86_400,
        description="Limit of one forward pass, in seconds; a worker whose pass takes longer ends "
        "and is restarted.",
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Handed to the model's own code."
    )
    ensemble: tuple[Stage, ...] = Field(
        default=(), description="The stages of an ensemble, in any order."
    )

    @model_validator(mode="after")
    def _batchable(self) -> Manifest:
        size = self.batching.max_batch_size or max(self.batching.batch_sizes, default=1)
        if not self.signature.batched and size > 1:
            raise ValueError(
                f"batching.max_batch_size: {size}: expected 1, because no "
                "tensor has `batch` as its first dimension"
            )
        return self

    @model_validator(mode="after")
    def _paddable(self) -> Manifest:
        for spec in self.signature.inputs:
            value = self.batching.pad.get(spec.name)
            wanted, kind = ("a number", str) if spec.dtype in NUMERIC else ("a text", float)
            if isinstance(value, kind):
                raise ValueError(f"batching.pad.{spec.name}: {value!r}: expected {wanted}")
        return self

    @model_validator(mode="after")
    def _composed(self) -> Manifest:
        if (self.format == ensemble.FORMAT) != bool(self.ensemble):
            raise ValueError("ensemble: expected stages if `format` is ensemble, else nothing")
        if self.ensemble:
            try:
                self._check_ensemble()
            except ValueError as exc:
                raise ValueError(f"ensemble: {exc}") from None
        return self

    def _check_ensemble(self) -> None:
        for name in ("artifact", "entrypoint", "processor"):
            if getattr(self, name) is not None:
                raise ValueError(f"expected no {name}: an ensemble runs nothing itself")
        if self.deterministic or self.cache != Cache():
            raise ValueError("expected no deterministic and no cache: its stages have their own")
        ensemble.check_graph(self.ensemble, self.signature)


def explain(error: ErrorDetails) -> str:
    """Return one line on what is wrong with a field: its place, its value and the expectation."""
    message = error["msg"].removeprefix("Value error, ")
    parts = [".".join(map(str, error["loc"])), message[:1].lower() + message[1:]]
    value = error["input"]
    if error["type"] not in ("missing", "extra_forbidden") and not isinstance(value, dict | list):
        shown = repr(value)
        parts.insert(1, shown if len(shown) <= 80 else shown[:77] + "...")
    return ": ".join(filter(None, parts))
