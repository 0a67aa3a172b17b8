"""The device on which engines run."""

from __future__ import annotations

import os

from inferno.errors import PackageError


def choose_device(wanted: str) -> str:
    """Return `cuda` or `cpu`.

    Args:
      wanted: `cuda`, `cpu`, or `auto` for CUDA where torch can use it. Torch is imported to find
        out only on machines with an NVIDIA driver.
    Raises:
      PackageError: `cuda` is demanded, and there is no usable CUDA device.
    """
    if wanted == "cpu":
        return "cpu"
    available = os.path.exists("/dev/nvidiactl") and _cuda_works()
    if wanted == "cuda" and not available:
        raise PackageError(
            "INFERNO_INFERENCE__DEVICE=cuda, but no usable CUDA device was found; use auto or cpu"
        )
    return "cuda" if available else "cpu"


def _cuda_works() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()
