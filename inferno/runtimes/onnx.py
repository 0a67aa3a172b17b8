"""Runtime of ONNX models: ONNX Runtime."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime as ort

from inferno.errors import PackageError
from inferno.protocol.tensors import Tensors
from inferno.repository.package import Package
from inferno.runtimes.base import ModelContext, UnsuitablePrecision, artifact, build_processor

logger = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
#: Operators whose weights become int8. Convolutions would be slower in int8 on most processors.
QUANTISED = ["MatMul", "Attention", "LSTM", "Gather", "EmbedLayerNormalization"]


class OnnxRuntime:
    """One ONNX Runtime session."""

    def __init__(self, package: Package, context: ModelContext) -> None:
        """Load `model.onnx` on the context's device.

        Raises:
          PackageError: the file is missing or is not an ONNX model, or a provider is missing.
        """
        path = artifact(package, "model.onnx")
        providers = choose_providers(context)
        try:
            with tempfile.TemporaryDirectory(prefix="inferno-onnx-") as folder:
                file = in_precision(path, context.quantize, providers, Path(folder))
                #: Size of the file; weights in a separate file do not count.
                self.memory_bytes = file.stat().st_size
                self._session = ort.InferenceSession(file, _options(context), providers=providers)
        except PackageError:
            raise
        except Exception as exc:  # ONNX Runtime's exceptions have no common base class.
            raise PackageError(f"{path}: cannot be loaded: {exc}") from exc
        self._outputs = [spec.name for spec in self._session.get_outputs()]
        self.processor = build_processor(package, context)

    def run(self, inputs: Tensors) -> Tensors:
        """Run the session; ONNX Runtime raises an error for inputs that the graph does not have."""
        values = self._session.run(
            self._outputs, {name: np.asarray(a, order="C") for name, a in inputs.items()}
        )
        return dict(zip(self._outputs, values, strict=True))


def _options(context: ModelContext) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = context.threads
    options.inter_op_num_threads = 1
    # Threads that spin while they wait take the cores from the machine's other models.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def choose_providers(context: ModelContext) -> list[str]:
    """Return ONNX Runtime's execution providers, in order of preference.

    Raises:
      PackageError: the installed ONNX Runtime lacks a provider that the settings name.
    """
    available = ort.get_available_providers()
    if missing := [name for name in context.onnx_providers if name not in available]:
        raise PackageError(
            f"INFERNO_INFERENCE__ONNX_PROVIDERS: {', '.join(missing)}: the installed onnxruntime "
            f"has {', '.join(available)}"
        )
    if context.onnx_providers:
        return list(context.onnx_providers)
    if context.device == "cuda":
        if "CUDAExecutionProvider" in available:
            return ["CUDAExecutionProvider", CPU]
        logger.warning(
            "%s runs on the CPU: the installed onnxruntime has no CUDA support; install "
            "onnxruntime-gpu",
            context.path,
        )
    return [CPU]


def in_precision(path: Path, precision: str, providers: list[str], folder: Path) -> Path:
    """Return a model's file in a precision: the file itself, or a converted one in a folder.

    Raises:
      UnsuitablePrecision: the providers do not support the precision, or a library is missing.
    """
    if precision == "none":
        return path
    if precision == "bf16":
        raise UnsuitablePrecision(
            f"{path}: quantize: ONNX models cannot use bf16; use fp16 or int8"
        )
    if precision == "fp16" and providers[0] == CPU:
        raise UnsuitablePrecision(
            f"{path}: quantize: fp16 is slower than fp32 on the CPU, which has few kernels for it; "
            "use int8"
        )
    try:
        return halve(path, folder) if precision == "fp16" else quantise(path, folder)
    except ImportError as exc:
        raise UnsuitablePrecision(
            f"{path}: quantize: {precision} needs a missing library: {exc}"
        ) from exc


def quantise(path: Path, folder: Path) -> Path:
    """Write a model with int8 weights, whose activations are quantised at run time."""
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = folder / "int8.onnx"
    # It logs advice about graphs of unknown shapes to the root logger.
    root = logging.getLogger()
    root.addFilter(_is_not_advice)
    try:
        quantize_dynamic(
            path,
            target,
            op_types_to_quantize=QUANTISED,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Without VNNI the 8-bit kernels can overflow their 16-bit sums; 7 bits cannot.
            reduce_range=True,
            # ONNX's shape inference lacks the result types of fused operators.
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
    finally:
        root.removeFilter(_is_not_advice)
    return target


def _is_not_advice(record: logging.LogRecord) -> bool:
    return "pre-processing" not in record.getMessage()


def halve(path: Path, folder: Path) -> Path:
    """Write a model with float16 weights and activations; inputs and outputs stay float32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    target = folder / "fp16.onnx"
    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), target)
    return target
