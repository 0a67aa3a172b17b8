"""The fields of `model.yaml`, which describes one version of a model."""

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

#: Longest time that a result may be kept, in seconds: ten years.
MAX_TTL_S = 315_360_000
#: Default for the concurrent batches of an ensemble in one worker. High, because they only wait.
ENSEMBLE_EXECUTORS = 16


class TaskType(StrEnum):
    """What a model is for; decides how the front page shows its results."""

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
        default=None, ge=1, description="Maximum number of rows in one forward pass."
    )
    max_batch_delay_ms: float | None = Field(
        default=None,
        ge=0,
        validation_alias=AliasChoices(
            "max_batch_delay_ms", "max_batch_latency_ms", "max_batch_wait_ms"
        ),
        description="Longest time in ms that the oldest waiting task is held back for others while "
        "an executor is free.",
    )
    slo_p95_ms: float | None = Field(
        default=None,
        gt=0,
        description="Latency objective: the 95th percentile in ms, from acceptance to result. "
        "Steers batch size and window, and replaces max_batch_delay_ms.",
    )
    pad: dict[str, float | str] = Field(
        default_factory=dict,
        description="Padding value by tensor. The tensor's free dimensions are padded to the "
        "longest in the batch.",
    )
    mask: dict[str, str] = Field(
        default_factory=dict,
        description="Name of the attention mask by padded tensor. The mask is int64 "
        "[batch, length], 1 where the sequence has values.",
    )
    buckets: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(),
        description="Sizes that padded dimensions are rounded up to, ascending.",
    )
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(),
        description="Batch sizes that the model is compiled for, ascending. Each forward pass is "
        "padded to the next one. The last is the default of max_batch_size.",
    )
    oversized: Literal["split", "refuse"] = Field(
        default="split", description="What happens to a task with more rows than max_batch_size."
    )
    tolerance: float | None = Field(
        default=None,
        ge=0,
        description="How much a row's outputs may change with the other rows in its batch, "
        "relative to the largest value, before `inferno models validate` reports a failure. "
        "Default: depends on the dtype.",
    )

    @field_validator("buckets", "batch_sizes")
    @classmethod
    def _check_ascending(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if list(sizes) != sorted(set(sizes)):
            raise ValueError(f"{list(sizes)}: expected ascending sizes")
        return sizes

    @model_validator(mode="after")
    def _check_sections(self) -> Batching:
        if self.buckets and not self.pad:
            raise ValueError("buckets: needs `pad`, which names the tensors and padding values")
        if missing := self.mask.keys() - self.pad.keys():
            raise ValueError(f"mask: {min(missing)}: must also be in `pad`")
        if self.batch_sizes and (self.max_batch_size or 1) > self.batch_sizes[-1]:
            raise ValueError(
                f"max_batch_size: {self.max_batch_size}: expected at most the last of batch_sizes"
            )
        return self


class Concurrency(_Section):
    """How many forward passes of a model run concurrently in one worker."""

    max_concurrency: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Number of executors of the model in one worker. Default: 1; 16 for an "
        "ensemble.",
    )


class Codecs(_Section):
    """How numbers are encoded in results."""

    default: Literal["json", "base64"] = Field(
        default="json", description="Encoding for requests that do not choose one."
    )


class Inference(_Section):
    """How the engine runs. Unset values come from the settings."""

    device: Literal["auto", "cpu", "cuda"] | None = Field(
        default=None, description="Device of the engine."
    )
    quantize: Literal["none", "int8", "fp16", "bf16"] | None = Field(
        default=None,
        description="Precision that the artifact is loaded in; loading fails if that is not "
        "possible.",
    )
    compile: bool | None = Field(
        default=None, description="Whether a torch module is compiled with torch.compile."
    )
    threads: int | None = Field(default=None, ge=1, description="Threads of one forward pass.")


class WarmUp(_Section):
    """The sample inputs that the engine is warmed up with."""

    inputs: dict[str, Any] | None = Field(
        default=None,
        description="Inputs as a client sends them. Default: derived from the signature.",
    )


class Retries(_Section):
    """What happens after a transient error. Unset values come from the settings."""

    max_retries: int | None = Field(
        default=None, ge=0, description="Number of retries after the first attempt."
    )
    backoff_s: float | None = Field(
        default=None,
        gt=0,
        description="Delay before the first retry, in seconds; doubles each time.",
    )
    max_backoff_s: float | None = Field(
        default=None, gt=0, description="Longest delay, in seconds."
    )
    jitter: bool | None = Field(
        default=None, description="Randomize each delay between zero and its full length."
    )


class Cache(_Section):
    """Which work is shared by equal inputs. Unset values equal `deterministic`."""

    results: bool | None = Field(
        default=None, description="Whether results are kept to answer later tasks."
    )
    ttl_s: float | None = Field(
        default=None,
        gt=0,
        le=MAX_TTL_S,
        description="How long a result is kept, in seconds; at most ten years.",
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
        pattern=f"^{names.MODEL_NAME.pattern}$", description="Model name; equals the folder's name."
    )
    version: int = Field(ge=1, description="Version number; equals the folder's name.")
    format: str = Field(
        description="Runtime: onnx, torchscript, python or transformers. Or `ensemble`."
    )
    artifact: str | None = Field(
        default=None, description="File that the runtime loads; a folder for transformers."
    )
    entrypoint: str | None = Field(
        default=None, description="`module:function` that builds a python model."
    )
    processor: str | None = Field(
        default=None,
        description="`module:function` that builds the artifact's pre- and post-processing.",
    )
    task: TaskType = Field(default=TaskType.OTHER, description="What the model is for.")
    description: str = Field(default="", description="One line about the model.")
    signature: Signature = Field(description="Inputs and outputs.")
    labels: tuple[str, ...] = Field(
        default=(), description="Class names, in the order of the scores."
    )
    batching: Batching = Field(
        default_factory=Batching, description="How tasks share forward passes."
    )
    concurrency: Concurrency = Field(
        default_factory=Concurrency, description="Number of concurrent forward passes."
    )
    inference: Inference = Field(
        default_factory=Inference, description="Device, precision and threads."
    )
    codecs: Codecs = Field(default_factory=Codecs, description="Encoding of numbers in results.")
    warm_up: WarmUp = Field(default_factory=WarmUp, description="Warm-up sample.")
    retries: Retries = Field(default_factory=Retries, description="Retries after transient errors.")
    deterministic: bool = Field(
        default=False,
        description="Whether equal inputs give equally good outputs and a forward pass has no side "
        "effects.",
    )
    cache: Cache = Field(default_factory=Cache, description="Work shared by equal inputs.")
    timeout_s: float | None = Field(
        default=None,
        gt=0,
        le=86_400,
        description="Time limit of one forward pass, in seconds. A worker that exceeds it is "
        "restarted.",
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict, description="Values for the model's own code."
    )
    ensemble: tuple[Stage, ...] = Field(
        default=(), description="The stages of an ensemble, in any order."
    )

    @model_validator(mode="after")
    def _check_batch_size(self) -> Manifest:
        size = self.batching.max_batch_size or max(self.batching.batch_sizes, default=1)
        if not self.signature.batched and size > 1:
            raise ValueError(
                f"batching.max_batch_size: {size}: expected 1, because no "
                "tensor has `batch` as its first dimension"
            )
        return self

    @model_validator(mode="after")
    def _check_padding(self) -> Manifest:
        for spec in self.signature.inputs:
            value = self.batching.pad.get(spec.name)
            expected, wrong = ("a number", str) if spec.dtype in NUMERIC else ("a text", float)
            if isinstance(value, wrong):
                raise ValueError(f"batching.pad.{spec.name}: {value!r}: expected {expected}")
        return self

    @model_validator(mode="after")
    def _check_stages(self) -> Manifest:
        if (self.format == ensemble.FORMAT) != bool(self.ensemble):
            raise ValueError("ensemble: expected stages if `format` is ensemble, else no stages")
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
    """Return a validation error as one line: the field, its value and what is expected."""
    message = error["msg"].removeprefix("Value error, ")
    parts = [".".join(map(str, error["loc"])), message[:1].lower() + message[1:]]
    value = error["input"]
    if error["type"] not in ("missing", "extra_forbidden") and not isinstance(value, dict | list):
        shown = repr(value)
        parts.insert(1, shown if len(shown) <= 80 else shown[:77] + "...")
    return ": ".join(filter(None, parts))
