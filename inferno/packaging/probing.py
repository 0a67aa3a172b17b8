"""Trial run of a draft on made-up inputs, to find the dtypes and shapes of its outputs.

The free dimensions have different sizes in two passes. An output's dimension that changes in the
same way as an input's is the same dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from inferno.engine.device import choose_device
from inferno.errors import PackageError
from inferno.packaging.draft import Dimension, Draft, Tensor
from inferno.protocol import tensors
from inferno.protocol.signature import Signature, TensorSpec
from inferno.protocol.tensors import NUMERIC, Array
from inferno.repository.manifest import Manifest
from inferno.repository.package import Package
from inferno.runtimes import ModelContext, Runtime, find_runtime
from inferno.settings import InferenceSettings

#: Text in made-up inputs.
SENTENCE = "The quick brown fox jumps over the lazy dog."


def outputs(
    draft: Draft, folder: Path, inputs: Sequence[Tensor], inference: InferenceSettings
) -> list[Tensor]:
    """Return the outputs with dtypes and shapes.

    Args:
      draft: the draft to run.
      folder: folder of the draft's files.
      inputs: inputs with a name for each free dimension.
      inference: settings of the forward passes.
    Raises:
      PackageError: the model cannot be loaded, or fails on the inputs.
    """
    runtime = _load(draft, folder, inputs, inference)
    names = list(dict.fromkeys(d for t in inputs for d in t.shape or () if isinstance(d, str)))
    first, second = (dict(zip(names, itertools.count(start, 2))) for start in (2, 3))
    runs = [_run(draft, runtime, inputs, sizes) for sizes in (first, second)]
    expected = [tensor.name for tensor in draft.outputs] or list(runs[0])
    for name in expected:
        if name not in runs[0]:
            raise PackageError(
                f"{draft.source}: returned no output {name!r}, but {', '.join(runs[0])}"
            )
    symbols = {(first[name], second[name]): name for name in names}
    return [
        Tensor(
            name,
            _dtype(draft, name, runs[0][name]),
            _shape(name, symbols, [run[name] for run in runs]),
        )
        for name in expected
    ]


def _load(
    draft: Draft, folder: Path, inputs: Sequence[Tensor], inference: InferenceSettings
) -> Runtime:
    # Outputs are unknown so far; runtimes only need their names.
    named = [tensor.name for tensor in draft.outputs] or ["output"]
    specs = [TensorSpec(name=name, dtype="float32", shape=("n",)) for name in named]
    package = Package(
        folder,
        Manifest(
            name="draft",
            version=1,
            format=draft.format,
            artifact=draft.artifact,
            entrypoint=draft.entrypoint,
            parameters=draft.parameters,
            signature=Signature(
                inputs=tuple(
                    TensorSpec(name=tensor.name, dtype=tensor.dtype, shape=("n",))
                    for tensor in inputs
                ),
                outputs=tuple(specs),
            ),
        ),
    )
    context = ModelContext(
        path=folder.resolve(),
        device=choose_device(inference.device),
        threads=inference.pass_threads(1),
        parameters=draft.parameters,
        labels=(),
    )
    return find_runtime(package)(package, context)


def _run(
    draft: Draft, runtime: Runtime, inputs: Sequence[Tensor], sizes: Mapping[str, int]
) -> dict[str, Array]:
    given = {tensor.name: _made_up(tensor, sizes) for tensor in inputs if not tensor.optional}
    preprocess = getattr(runtime.processor, "preprocess", None)
    postprocess = getattr(runtime.processor, "postprocess", None)
    try:
        made = runtime.run(preprocess(given) if preprocess else given)
        made = postprocess(made) if postprocess else made
        if not isinstance(made, dict):
            raise TypeError(f"returned {type(made).__name__}, expected outputs by name")
    except Exception as exc:  # Whatever the model raises.
        tried = ", ".join(f"{name} {list(array.shape)}" for name, array in given.items())
        raise PackageError(
            f"{draft.source}: fails on made-up inputs ({tried}): {type(exc).__name__}: {exc}. "
            "Declare fixed sizes with --input name:dtype:shape, or the outputs with --output "
            "name:dtype:shape"
        ) from exc
    return {name: np.asarray(array) for name, array in made.items()}


def _made_up(tensor: Tensor, sizes: Mapping[str, int]) -> Array:
    shape = [sizes[dim] if isinstance(dim, str) else dim or 1 for dim in tensor.shape or ()]
    if tensor.dtype in NUMERIC:
        # Ones are valid in more places than zeros: in masks, as divisors, as indices.
        return np.ones(shape, NUMERIC[tensor.dtype])
    text = SENTENCE if tensor.dtype == "string" else SENTENCE.encode()
    return np.full(shape, text, dtype=object)


def _dtype(draft: Draft, name: str, array: Array) -> str:
    kinds = {"U": "string", "S": "bytes"}
    dtype = kinds.get(array.dtype.kind) or (tensors.dtype_of(array) if array.size else "")
    if dtype not in tensors.DTYPES:
        raise PackageError(
            f"{draft.source}: the output {name} has dtype {array.dtype}; expected one of "
            f"{', '.join(tensors.DTYPES)}"
        )
    return dtype


def _shape(
    name: str, symbols: Mapping[tuple[int, int], str], arrays: Sequence[Array]
) -> tuple[Dimension, ...]:
    first, second = (array.shape for array in arrays)
    if len(first) != len(second):
        raise PackageError(
            f"the output {name} has {len(first)} dimensions in one run and {len(second)} in another"
        )
    return tuple(
        one if one == other else symbols.get((one, other), f"{name}_{axis}")
        for axis, (one, other) in enumerate(zip(first, second, strict=True))
    )
