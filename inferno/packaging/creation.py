"""Writes a draft into the repository, as a version that workers can load.

A version appears at once: its files are assembled in a hidden folder of the repository, which
readers ignore, and then renamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from inferno.errors import PackageError
from inferno.packaging import probing
from inferno.packaging.draft import Dimension, Draft, Tensor
from inferno.protocol.signature import BATCH
from inferno.repository.manifest import MANIFEST, TaskType
from inferno.repository.package import Package
from inferno.settings import InferenceSettings


@dataclass(frozen=True)
class Identity:
    """The fields of a new package that its owner chooses."""

    name: str
    #: Version number; None for the next free one.
    version: int | None = None
    task: TaskType = TaskType.OTHER
    #: One line about the model; None for the artifact's.
    description: str | None = None


def create(root: Path, identity: Identity, draft: Draft, inference: InferenceSettings) -> Package:
    """Write a version.

    Args:
      root: the model repository; created if it does not exist.
      identity: name, version and description.
      draft: contents of the package. Notes are added to it.
      inference: settings of the trial run, which finds unknown outputs.
    Raises:
      PackageError: the version exists, or no package can be made from the draft.
    """
    version = identity.version or next_version(root, identity.name)
    check_absent(root, identity.name, version)
    with staging(root, identity.name, version) as folder:
        for place, file in draft.files.items():
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        signature, batching = _signature(draft, folder, inference)
        fields: dict[str, Any] = {
            "name": identity.name,
            "version": version,
            "format": draft.format,
            "artifact": draft.artifact,
            "entrypoint": draft.entrypoint,
            "task": str(identity.task),
            "description": (
                draft.description if identity.description is None else identity.description
            ),
            "signature": signature,
            "batching": batching,
            "parameters": draft.parameters,
        }
        written = {name: value for name, value in fields.items() if value not in (None, "", {})}
        (folder / MANIFEST).write_text(_text(draft, written), encoding="utf-8")
        Package.read(folder)
        path = publish(root, folder)
    return Package.read(path)


def next_version(root: Path, name: str) -> int:
    """Return the number after the highest one of a model, broken versions included."""
    numbers = (int(path.name) for path in (root / name).glob("*") if path.name.isdecimal())
    return max(numbers, default=0) + 1


def check_absent(root: Path, name: str, version: int) -> None:
    """Check that a version does not exist.

    Raises:
      PackageError: the version exists.
    """
    if (root / name / str(version)).exists():
        raise PackageError(
            f"{root / name / str(version)} already exists, and versions never change; choose "
            "another number"
        )


@contextmanager
def staging(root: Path, name: str, version: int) -> Iterator[Path]:
    """Yield a hidden folder of the repository for the files of a version; see `publish`."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=root) as hidden:
        folder = Path(hidden) / name / str(version)
        folder.mkdir(parents=True)
        yield folder


def publish(root: Path, folder: Path) -> Path:
    """Move a version from its hidden folder to its final one, and return that.

    Raises:
      PackageError: a version of this number was added meanwhile.
    """
    target = root / folder.parent.name / folder.name
    target.parent.mkdir(exist_ok=True)
    try:
        os.rename(folder, target)
    except OSError:
        check_absent(root, folder.parent.name, int(folder.name))
        raise
    return target


def _text(draft: Draft, fields: dict[str, Any]) -> str:
    head = [f"# Written by `inferno models new` from {draft.source}."]
    for note in draft.notes:
        head += textwrap.wrap(note, 100, initial_indent="# ", subsequent_indent="#   ")
    body = yaml.safe_dump(
        fields, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True
    )
    return "\n".join(head) + "\n" + body


# -- Which dimension is the batch ------------------------------------------------------------------


def _signature(
    draft: Draft, folder: Path, inference: InferenceSettings
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the manifest's sections `signature` and `batching`."""
    inputs = [_named(tensor) for tensor in draft.inputs]
    rows = _rows(draft, inputs)
    outputs = _outputs(draft, folder, inputs, rows, inference)
    batching: dict[str, Any] = {}
    reason = _unbatched(draft, inputs, outputs, rows)
    if reason is None:
        inputs = [_batched(tensor) for tensor in inputs]
        outputs = [_batched(tensor) for tensor in outputs]
        if draft.fixed_rows == 1:
            batching["max_batch_size"] = 1
            draft.notes.append(
                "The first dimension is fixed at 1, so each row needs its own forward pass. Export "
                "the model with a dynamic first dimension to let rows share passes."
            )
        elif draft.fixed_rows is not None:
            batching["batch_sizes"] = [draft.fixed_rows]
            draft.notes.append(
                f"The first dimension is fixed at {draft.fixed_rows}; fewer rows are padded to it."
            )
        _note_free_sizes(draft, inputs)
    else:
        draft.notes.append(f"{reason}, so each task needs its own forward pass.")
        inputs = [_renamed(tensor, {BATCH: "rows"}) for tensor in inputs]
        outputs = [_renamed(tensor, {BATCH: "rows"}) for tensor in outputs]
    for tensor in inputs:
        if tensor.dtype == "bytes":
            draft.notes.append(
                f"{tensor.name} has dtype bytes, for which no sample can be made up. Put a real "
                "one, in base64, into `warm_up.inputs`, and set `content: image` for images."
            )
    return {"inputs": list(map(_spec, inputs)), "outputs": list(map(_spec, outputs))}, batching


def _rows(draft: Draft, inputs: Sequence[Tensor]) -> set[Dimension]:
    """Return the names of the inputs' first dimensions; empty if these cannot be the batch."""
    first = {tensor.shape[0] if tensor.shape else None for tensor in inputs}
    if first == {1} and draft.fixed_rows == 1:
        return first
    return first if all(isinstance(dim, str) for dim in first) else set()


def _outputs(
    draft: Draft,
    folder: Path,
    inputs: Sequence[Tensor],
    rows: set[Dimension],
    inference: InferenceSettings,
) -> list[Tensor]:
    """Return the outputs with dtypes and shapes, from a trial run if the draft is incomplete."""
    declared = draft.outputs
    complete = declared and all(
        tensor.shape is not None
        and None not in tensor.shape
        and (not rows or tensor.shape[:1] == (BATCH,) or set(tensor.shape[:1]) <= rows)
        for tensor in declared
    )
    if complete:
        return list(declared)
    try:
        # All inputs have the same number of rows, whatever the dimension is called. A graph with
        # a fixed number of rows is run with that number.
        one = dict.fromkeys((BATCH, *rows), draft.fixed_rows or BATCH)
        found = probing.outputs(draft, folder, [_renamed(t, one) for t in inputs], inference)
    except PackageError as exc:
        if not declared or any(tensor.shape is None for tensor in declared):
            raise
        draft.notes.append(f"The outputs were not tried: {exc}")
        return [_named(tensor) for tensor in declared]
    if draft.fixed_rows is not None and rows:
        found = [
            replace(t, shape=(BATCH, *t.shape[1:]))
            if t.shape and t.shape[0] == draft.fixed_rows
            else t
            for t in found
        ]
    return found


def _unbatched(
    draft: Draft, inputs: Sequence[Tensor], outputs: Sequence[Tensor], rows: set[Dimension]
) -> str | None:
    """Return why rows cannot share forward passes; None if they can."""
    if not rows:
        return "Some inputs have no free first dimension"
    for tensor in (*inputs, *outputs):
        if (rows | {BATCH}) & set((tensor.shape or ())[1:]) - {1}:
            return f"The batch dimension is also another dimension of {tensor.name}"
    for tensor in outputs:
        if not tensor.shape or (tensor.shape[0] not in rows and tensor.shape[0] != BATCH):
            return f"The first dimension of {tensor.name} does not grow with the inputs'"
    return None


def _note_free_sizes(draft: Draft, inputs: Sequence[Tensor]) -> None:
    free = sorted({dim for t in inputs for dim in (t.shape or ())[1:] if isinstance(dim, str)})
    if free:
        draft.notes.append(
            f"Tasks share a pass if they agree in {', '.join(free)}. Set `batching.pad` to pad "
            "shorter inputs instead."
        )


def _named(tensor: Tensor) -> Tensor:
    """Give each free dimension a name."""
    if tensor.shape is None:
        raise PackageError(
            f"{tensor.name}: the number of dimensions is unknown; name them, such as "
            f"--input {tensor.name}:{tensor.dtype}:batch,3"
        )
    shape = (
        dim if dim is not None else (f"{tensor.name}_{axis}" if axis else BATCH)
        for axis, dim in enumerate(tensor.shape)
    )
    return replace(tensor, shape=tuple(shape))


def _batched(tensor: Tensor) -> Tensor:
    return replace(tensor, shape=(BATCH, *(tensor.shape or ())[1:]))


def _renamed(tensor: Tensor, names: Mapping[Dimension, Any]) -> Tensor:
    return replace(tensor, shape=tuple(names.get(dim, dim) for dim in tensor.shape or ()))


def _spec(tensor: Tensor) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape or ()),
    }
    return spec | ({"optional": True} if tensor.optional else {})
