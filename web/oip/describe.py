"""How the Open Inference Protocol describes errors and models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, TypedDict

from msgspec import Meta

from inferno.protocol import tensors
from inferno.protocol.signature import TensorSpec
from inferno.repository.package import Package
from tasks.state.statistics import BatchStatistics, Duration, VersionStatistics
from web.calls.errors import OipError, oip_error
from web.openapi.describe import ErrorForm

#: Form of errors; the protocol has no separate status for invalid fields.
ERRORS = ErrorForm(OipError, "application/json", 400, lambda error: oip_error(error.problem()))

#: Names of the runtimes in the protocol.
PLATFORMS = {
    "onnx": "onnx_onnxv1",
    "torchscript": "pytorch_torchscript",
    "python": "python",
}


class TensorMetadata(TypedDict):
    """A declared input or output."""

    name: str
    datatype: Annotated[str, Meta(examples=["FP32"])]
    shape: Annotated[list[int], Meta(description="-1 for a free dimension.")]


class ModelMetadata(TypedDict):
    """The inputs and outputs of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


def metadata(package: Package, versions: Iterable[int]) -> ModelMetadata:
    """Return a model's metadata.

    Args:
      package: version whose signature is shown.
      versions: versions of the model.
    """
    return {
        "name": package.name,
        "versions": [str(version) for version in sorted(versions)],
        "platform": PLATFORMS.get(package.manifest.format, package.manifest.format),
        "inputs": [_spec(spec) for spec in package.signature.inputs],
        "outputs": [_spec(spec) for spec in package.signature.outputs],
    }


def _spec(spec: TensorSpec) -> TensorMetadata:
    return {
        "name": spec.name,
        "datatype": tensors.DATATYPES[spec.dtype],
        "shape": [dim if isinstance(dim, int) else -1 for dim in spec.shape],
    }


def config(package: Package, max_batch_size: int, max_batch_delay_ms: float) -> dict[str, Any]:
    """Return the part of a model's configuration for which Triton has a term."""
    manifest, batched = package.manifest, package.signature.batched

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        dims = spec.shape[1:] if batched else spec.shape
        return {
            "name": spec.name,
            "data_type": _config_type(spec.dtype),
            "dims": [dim if isinstance(dim, int) else -1 for dim in dims],
            **({"optional": True} if spec.optional else {}),
        }

    return {
        "name": package.name,
        "platform": PLATFORMS.get(manifest.format, manifest.format),
        "backend": manifest.format,
        "version_policy": {"latest": {"num_versions": 1}},
        # 0 stands for a model without batches.
        "max_batch_size": max_batch_size if batched else 0,
        "input": [tensor(spec) for spec in package.signature.inputs],
        "output": [tensor(spec) for spec in package.signature.outputs],
        "dynamic_batching": {
            "preferred_batch_size": list(manifest.batching.batch_sizes) or [max_batch_size],
            "max_queue_delay_microseconds": round(max_batch_delay_ms * 1000),
        },
        "instance_group": [{"name": package.name, "count": manifest.concurrency.max_concurrency}],
        "default_model_filename": manifest.artifact or "",
        "parameters": {
            name: {"string_value": str(value)} for name, value in manifest.parameters.items()
        },
    }


def _config_type(dtype: str) -> str:
    datatype = tensors.DATATYPES[dtype]
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


class InferenceStatistics(TypedDict):
    """Number of tasks by outcome and step, and their total time."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration


class ModelStatistics(TypedDict):
    """Statistics of a version."""

    name: str
    version: str
    last_inference: int
    inference_count: int
    execution_count: int
    inference_stats: InferenceStatistics
    batch_stats: tuple[BatchStatistics, ...]


def statistics(model: str, version: int, found: VersionStatistics) -> ModelStatistics:
    """Return the statistics of a version, in Triton's terms."""
    return {
        "name": model,
        "version": str(version),
        "last_inference": found.last_inference,
        "inference_count": found.inference_count,
        "execution_count": found.execution_count,
        "inference_stats": {
            "success": found.success,
            "fail": found.fail,
            "queue": found.queue,
            "compute_input": found.compute_input,
            "compute_infer": found.compute_infer,
            "compute_output": found.compute_output,
            "cache_hit": found.cache_hit,
            # The time of a lookup without a hit is not measured.
            "cache_miss": Duration(found.misses, 0),
        },
        "batch_stats": found.batch_stats,
    }
