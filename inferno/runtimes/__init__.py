"""Runtimes execute a model's artifact.

A new runtime is one module here with a class that implements `Runtime`, and one line in `RUNTIMES`.
Modules are imported when a model needs them, so that a worker with ONNX models never loads torch.
"""

from inferno.runtimes.base import (
    RUNTIMES,
    ModelContext,
    Runtime,
    UnsuitablePrecision,
    find_runtime,
)

__all__ = ["RUNTIMES", "ModelContext", "Runtime", "UnsuitablePrecision", "find_runtime"]
