"""Writing a package into the repository: from a draft to a version that workers can load.

A version appears as a whole: its files are put together in a hidden folder of the repository,
which nobody looks into, and renamed.
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
    """What the owner says of a new package."""

    name: str
    #: By default the next free number.
    version: int | None = None
    task: TaskType = TaskType.OTHER
    #: By default what the artifact says.
    description: str | None = None


def create(root: Path, identity: Identity, draft: Draft, inference: InferenceSettings) -> Package:
    """Write a version.

    Args:
      root: the model repository; made if it is missing.
      identity: what it is called.
      draft: what it is made from. Notes are added to it.
      inference: how it is run, to see what comes out.
    Raises:
      PackageError: there is such a version already, or nothing can be made of the draft.
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
    """Check that a version can be written.

    Raises:
      PackageError: it is there.
    """
    if (root / name / str(version)).exists():
        raise PackageError(
            f"{root / name / str(version)} exists already; versions do not change: choose another "
            "number"
        )


@contextmanager
def staging(root: Path, name: str, version: int) -> Iterator[Path]:
    """Give a hidden folder of the repository for the files of a version; see `publish`."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=root) as hidden:
        folder = Path(hidden) / name / str(version)
        folder.mkdir(parents=True)
        yield folder


def publish(root: Path, folder: Path) -> Path:
    """Let a version appear that was put together; returns its folder.

    Raises:
      PackageError: another one of this number has appeared meanwhile.
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
    """Return the sections `signature` and `batching` of the manifest."""
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
                "Its first dimension is fixed at 1, so each row has a forward pass of its own; "
                "export it with a dynamic first dimension to have rows share passes."
            )
        elif draft.fixed_rows is not None:
            batching["batch_sizes"] = [draft.fixed_rows]
            draft.notes.append(
                f"Its first dimension is fixed at {draft.fixed_rows}: fewer rows are padded to it."
            )
        _note_free_sizes(draft, inputs)
    else:
        draft.notes.append(f"{reason}, so each task has a forward pass of its own.")
        inputs = [_renamed(tensor, {BATCH: "rows"}) for tensor in inputs]
        outputs = [_renamed(tensor, {BATCH: "rows"}) for tensor in outputs]
    for tensor in inputs:
        if tensor.dtype == "bytes":
            draft.notes.append(
                f"{tensor.name} is of bytes, and nobody can make them up: give real ones, in "
                "base64, in `warm_up.inputs`, and say `content: image` if they are pictures."
            )
    return {"inputs": list(map(_spec, inputs)), "outputs": list(map(_spec, outputs))}, batching


def _rows(draft: Draft, inputs: Sequence[Tensor]) -> set[Dimension]:
    """Return what the first dimension of the inputs is called, where it may be the batch."""
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
    """Return the outputs with all that is known of them; run the draft where it does not say it."""
    said = draft.outputs
    complete = said and all(
        tensor.shape is not None
        and None not in tensor.shape
        and (not rows or tensor.shape[:1] == (BATCH,) or set(tensor.shape[:1]) <= rows)
        for tensor in said
    )
    if complete:
        return list(said)
    try:
        # All inputs have as many rows, whatever that is called; a graph that takes a number of
        # rows and no other is run with it.
        one = dict.fromkeys((BATCH, *rows), draft.fixed_rows or BATCH)
        found = probing.outputs(draft, folder, [_renamed(t, one) for t in inputs], inference)
    except PackageError as exc:
        if not said or any(tensor.shape is None for tensor in said):
            raise
        draft.notes.append(f"Its outputs were not tried: {exc}")
        return [_named(tensor) for tensor in said]
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
    """Say why rows cannot share forward passes; None if they can."""
    if not rows:
        return "Not all inputs have a free first dimension"
    for tensor in (*inputs, *outputs):
        if (rows | {BATCH}) & set((tensor.shape or ())[1:]) - {1}:
            return f"The batch is also another dimension of {tensor.name}"
    for tensor in outputs:
        if not tensor.shape or (tensor.shape[0] not in rows and tensor.shape[0] != BATCH):
            return f"The first dimension of {tensor.name} does not grow with that of the inputs"
    return None


def _note_free_sizes(draft: Draft, inputs: Sequence[Tensor]) -> None:
    free = sorted({dim for t in inputs for dim in (t.shape or ())[1:] if isinstance(dim, str)})
    if free:
        draft.notes.append(
            f"Tasks share a pass when they agree in {', '.join(free)}; `batching.pad` says what to "
            "fill up shorter ones with."
        )


def _named(tensor: Tensor) -> Tensor:
    """Give each free dimension a name."""
    if tensor.shape is None:
        raise PackageError(
            f"{tensor.name}: it is not known how many dimensions it has; say it, such as "
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
