"""One version of a model: its `model.yaml`, and what follows from it.

Web and workers ask a `Package` for everything that a model declares: its signature, its batching,
whether its results may be shared.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import yaml
from pydantic import ValidationError

from inferno import names
from inferno.errors import PackageError
from inferno.protocol.signature import Signature
from inferno.repository.manifest import ENSEMBLE_EXECUTORS, MANIFEST, Manifest, explain
from inferno.settings import InferenceSettings

#: Path, time of the last change in ns, and size of each file of a version.
Stamp = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Package:
    """One version of a model, as it lies in the repository."""

    path: Path
    manifest: Manifest
    #: What its files looked like when it was read; see `stamp`.
    seen: Stamp = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.name

    @property
    def version(self) -> int:
        """The version's number."""
        return self.manifest.version

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""
        return self.manifest.signature

    @property
    def is_ensemble(self) -> bool:
        """Whether it is a graph of other models."""
        return bool(self.manifest.ensemble)

    @property
    def executors(self) -> int:
        """Forward passes at the same time in one worker; of an ensemble, batches."""
        return self.manifest.concurrency.max_concurrency or (
            ENSEMBLE_EXECUTORS if self.is_ensemble else 1
        )

    def max_batch_size(self, default: int) -> int:
        """Return the rows of one forward pass, at most.

        Args:
          default: for a package that does not say.
        """
        batching = self.manifest.batching
        largest = batching.batch_sizes[-1] if batching.batch_sizes else default
        return batching.max_batch_size or (largest if self.signature.batched else 1)

    def max_batch_delay_ms(self, default: float) -> float:
        """Return the window, in ms.

        Args:
          default: for a package that does not say.
        """
        delay_ms = self.manifest.batching.max_batch_delay_ms
        if delay_ms is None:
            # What the members of an ensemble's batch have in common is only a thread.
            return 0.0 if self.is_ensemble else default
        return delay_ms

    def slo_p95_ms(self, default: float | None) -> float | None:
        """Return the latency objective, in ms.

        Args:
          default: for a package that does not say.
        """
        return self.manifest.batching.slo_p95_ms or default

    def timeout_s(self, default: float) -> float:
        """Return the limit of one forward pass, in seconds.

        Args:
          default: for a package that does not say.
        """
        return self.manifest.timeout_s or default

    def inference(self, settings: InferenceSettings) -> InferenceSettings:
        """Return how its engine runs: the settings, with what the package says in their place."""
        said = self.manifest.inference.model_dump(exclude_none=True)
        return settings.model_copy(update=said)

    @property
    def keeps_results(self) -> bool:
        """Whether a result may answer later tasks with equal inputs."""
        return self._shares(self.manifest.cache.results)

    @property
    def coalesces(self) -> bool:
        """Whether tasks in flight with equal inputs may share one computation."""
        return self._shares(self.manifest.cache.coalesce)

    @property
    def deduplicates(self) -> bool:
        """Whether members of a batch with equal inputs may be computed once."""
        return self._shares(self.manifest.cache.deduplicate)

    def _shares(self, chosen: bool | None) -> bool:
        return self.manifest.deterministic if chosen is None else chosen

    @cached_property
    def digest(self) -> str:
        """Of the content of the version's files; another one when any of them has changed.

        Code that these import from elsewhere is not part of it.
        """
        found, folder = hashlib.sha256(), self.path.resolve()
        for file in sorted(self._files()):
            with file.open("rb") as content:
                inner = hashlib.file_digest(content, "sha256").hexdigest()
            # Relative, because the repository may lie elsewhere on another machine.
            found.update(f"{os.path.relpath(file, folder)}\0{inner}\n".encode())
        return found.hexdigest()[:16]

    def stamp(self) -> Stamp:
        """Return what the version's files look like now: another value when one was changed."""
        found = []
        for file in sorted(self._files()):
            with suppress(FileNotFoundError):
                status = file.stat()
                found.append((str(file), status.st_mtime_ns, status.st_size))
        return tuple(found)

    def _files(self) -> set[Path]:
        folder = self.path.resolve()
        files = {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
        manifest = self.manifest
        if manifest.artifact is not None:
            artifact = (folder / manifest.artifact).resolve()
            files |= {artifact, *artifact.rglob("*")}
        for function in (manifest.entrypoint, manifest.processor):
            if function is not None:
                files.add((folder / f"{function.partition(':')[0]}.py").resolve())
        return {file for file in files if file.is_file()}

    @classmethod
    def read(cls, path: Path) -> Package:
        """Read and validate the manifest in a version's folder.

        Raises:
          PackageError: names the file, the field, the value and the expectation.
        """
        file = path / MANIFEST
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except OSError as exc:
            raise PackageError(f"{file}: cannot be read: {exc.strerror}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as exc:
            # PyYAML lets pass what Python says of a date such as 2024-13-01.
            raise PackageError(f"{file}: no valid YAML: {' '.join(str(exc).split())}") from None
        if not isinstance(content, dict):
            raise PackageError(f"{file}: expected a mapping of fields")
        try:
            manifest = Manifest.model_validate(content)
        except ValidationError as exc:
            raise PackageError("; ".join(f"{file}: {explain(e)}" for e in exc.errors())) from None
        if names.RESERVED.fullmatch(manifest.name):
            raise PackageError(
                f"{file}: name: expected another name; the queue {manifest.name} is not a lane"
            )
        expected = {"name": path.parent.name, "version": path.name}
        for name, folder in expected.items():
            if str(getattr(manifest, name)) != folder:
                value = getattr(manifest, name)
                raise PackageError(
                    f"{file}: {name}: {value!r} differs from the folder's name {folder!r}"
                )
        package = cls(path, manifest)
        return replace(package, seen=package.stamp())
