"""ONNX models, by ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

from inferno.errors import PackageError
from inferno.protocol.tensors import Tensors
from inferno.repository import Package
from inferno.runtimes.base import ModelContext, artifact, build


class OnnxRuntime:
    """One ONNX Runtime session."""

    def __init__(self, package: Package, context: ModelContext) -> None:
        """Load `model.onnx` on the context's device.

        Raises:
          PackageError: the file is missing or no ONNX model.
        """
        path = artifact(package, "model.onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = context.threads
        options.inter_op_num_threads = 1
        # Threads that spin while they wait would take the cores from the machine's other models.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        providers = ["CPUExecutionProvider"]
        if context.device == "cuda" and "CUDAExecutionProvider" in ort.get_available_providers():
            providers.insert(0, "CUDAExecutionProvider")
        try:
            self._session = ort.InferenceSession(path, options, providers=providers)
        except Exception as exc:  # ONNX Runtime's own exceptions have no common base.
            raise PackageError(f"{path}: cannot be loaded: {exc}") from exc
        self._outputs = [spec.name for spec in self._session.get_outputs()]
        self.processor = (
            build(package, package.manifest.processor, context)
            if package.manifest.processor
            else None
        )

    def run(self, inputs: Tensors) -> Tensors:
        """Run the session; inputs that the graph does not have are an error of ONNX Runtime's."""
        values = self._session.run(
            self._outputs, {name: np.asarray(a, order="C") for name, a in inputs.items()}
        )
        return dict(zip(self._outputs, values, strict=True))
