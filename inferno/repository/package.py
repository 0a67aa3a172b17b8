"""One version of a model: its `model.yaml`, and what follows from it.

Web and workers ask a `Package` for everything that a model declares: its signature, its batching,
whether its results may be shared.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from inferno import names
from inferno.errors import PackageError
from inferno.protocol.signature import Signature
from inferno.repository.manifest import ENSEMBLE_EXECUTORS, MANIFEST, Manifest, explain
from inferno.settings import InferenceSettings, variable

#: Formats whose artifacts are programs.
CODE_FORMATS = ("python", "torchscript")
#: Functions of `processor` that come with the platform.
_OWN_PROCESSOR = re.compile(r"inferno\.processors\.[a-z_]+:build")

#: Path, modification time in ns and size of each file of a version.
Stamp = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Package:
    """One version of a model in the repository."""

    path: Path
    manifest: Manifest
    #: `stamp` of the version when it was read.
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
        """The version's inputs and outputs."""
        return self.manifest.signature

    @property
    def is_ensemble(self) -> bool:
        """Whether the package is a graph of other models."""
        return bool(self.manifest.ensemble)

    @property
    def executors(self) -> int:
        """Number of concurrent forward passes in one worker; for an ensemble, of batches."""
        return self.manifest.concurrency.max_concurrency or (
            ENSEMBLE_EXECUTORS if self.is_ensemble else 1
        )

    @property
    def missing_artifact(self) -> Path | None:
        """Path of the artifact if it does not exist; None if it does, or none is needed."""
        artifact = self.manifest.artifact
        if artifact is None or (self.path / artifact).exists():
            return None
        return self.path / artifact

    @property
    def code(self) -> str | None:
        """Part of the package that is code, such as ``format python``; None if all is data."""
        if self.manifest.format in CODE_FORMATS:
            return f"format {self.manifest.format}"
        for name in ("entrypoint", "processor"):
            function = getattr(self.manifest, name)
            if function is not None and not _OWN_PROCESSOR.fullmatch(function):
                return f"{name} {function}"
        return None

    def check_allowed(self, *, allow_code: bool) -> None:
        """Check that the settings allow this package to be loaded.

        Raises:
          PackageError: it is code, which the settings forbid.
        """
        if not allow_code and (code := self.code) is not None:
            raise PackageError(
                f"{self.path / MANIFEST}: {code} is code, which "
                f"{variable('repository', 'allow_code')}=false forbids"
            )

    def max_batch_size(self, default: int) -> int:
        """Return the maximum number of rows in one forward pass.

        Args:
          default: used when the manifest does not set it.
        """
        batching = self.manifest.batching
        largest = batching.batch_sizes[-1] if batching.batch_sizes else default
        return batching.max_batch_size or (largest if self.signature.batched else 1)

    def max_batch_delay_ms(self, default: float) -> float:
        """Return the window, in ms.

        Args:
          default: used when the manifest does not set it.
        """
        delay_ms = self.manifest.batching.max_batch_delay_ms
        if delay_ms is None:
            # Members of an ensemble's batch share a thread, no forward pass: waiting gains nothing.
            return 0.0 if self.is_ensemble else default
        return delay_ms

    def slo_p95_ms(self, default: float | None) -> float | None:
        """Return the latency objective, in ms.

        Args:
          default: used when the manifest does not set it.
        """
        return self.manifest.batching.slo_p95_ms or default

    def timeout_s(self, default: float) -> float:
        """Return the limit of one forward pass, in seconds.

        Args:
          default: used when the manifest does not set it.
        """
        return self.manifest.timeout_s or default

    def inference(self, settings: InferenceSettings) -> InferenceSettings:
        """Return the inference settings, overridden by the manifest's `inference` section."""
        overrides = self.manifest.inference.model_dump(exclude_none=True)
        return settings.model_copy(update=overrides)

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
        """Digest of the version's files, as 16 hexadecimal digits.

        Code that these files import from elsewhere does not count.
        """
        found, folder = hashlib.sha256(), self.path.resolve()
        for file in sorted(self._files()):
            with file.open("rb") as content:
                inner = hashlib.file_digest(content, "sha256").hexdigest()
            # Relative, so that the digest is the same on a machine with another repository path.
            found.update(f"{os.path.relpath(file, folder)}\0{inner}\n".encode())
        return found.hexdigest()[:16]

    def stamp(self) -> Stamp:
        """Return the present stamp of the version's files; it changes when a file changes."""
        found = []
        for file in sorted(self._files()):
            with suppress(FileNotFoundError):
                status = file.stat()
                found.append((str(file), status.st_mtime_ns, status.st_size))
        return tuple(found)

    def _files(self) -> set[Path]:
        files = self._tree()
        for function in (self.manifest.entrypoint, self.manifest.processor):
            if function is not None:
                files.add((self.path / f"{function.partition(':')[0]}.py").resolve())
        return {file for file in files if file.is_file()}

    def _tree(self) -> set[Path]:
        """Return all paths in the version's folder and in its artifact."""
        folder = self.path.resolve()
        found = {path for path in folder.rglob("*") if "__pycache__" not in path.parts}
        if self.manifest.artifact is not None:
            artifact = (folder / self.manifest.artifact).resolve()
            found |= {artifact, *artifact.rglob("*")}
        return found

    @classmethod
    def read(cls, path: Path) -> Package:
        """Read and validate the manifest in a version's folder.

        Raises:
          PackageError: the manifest is wrong; names the file, the field, the value and what is
            expected. Or a file of the package is outside the model's folder.
        """
        file = path / MANIFEST
        content = _read_yaml(file)
        try:
            manifest = Manifest.model_validate(content)
        except ValidationError as exc:
            raise PackageError("; ".join(f"{file}: {explain(e)}" for e in exc.errors())) from None
        if names.RESERVED.fullmatch(manifest.name):
            raise PackageError(
                f"{file}: name: {manifest.name!r} is reserved for a queue; choose another name"
            )
        expected = {"name": path.parent.name, "version": path.name}
        for name, folder in expected.items():
            if str(getattr(manifest, name)) != folder:
                value = getattr(manifest, name)
                raise PackageError(
                    f"{file}: {name}: {value!r} differs from the folder's name {folder!r}"
                )
        package = cls(path, manifest)
        package._check_inside()
        return replace(package, seen=package.stamp())

    def _check_inside(self) -> None:
        """Check that no file of the package is outside the model's folder.

        Versions share files of that folder. A path or symbolic link out of it would let a package
        show, push or load any file of the machine.
        """
        model, manifest = self.path.resolve().parent, self.manifest
        functions = {
            name: f"{function.partition(':')[0]}.py"
            for name in ("entrypoint", "processor")
            if (function := getattr(manifest, name)) and not is_import(function)
        }
        for name, place in ({"artifact": manifest.artifact} | functions).items():
            if place is not None and not (self.path / place).resolve().is_relative_to(model):
                raise PackageError(
                    f"{self.path / MANIFEST}: {name}: {getattr(manifest, name)!r}: expected a path "
                    f"inside the model's folder {self.path.parent}"
                )
        for file in self._tree():
            if file.is_symlink() and not file.resolve().is_relative_to(model):
                raise PackageError(
                    f"{file}: is a symbolic link out of the model's folder {self.path.parent}; put "
                    "the file itself there"
                )


def is_import(function: str) -> bool:
    """Return whether `module:function` names an installed module, and not a file."""
    module = function.partition(":")[0]
    return "." in module and "/" not in module


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as exc:
        raise PackageError(f"{file}: cannot be read: {exc.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        # For a date such as 2024-13-01, PyYAML raises the ValueError of `datetime`.
        raise PackageError(f"{file}: not valid YAML: {' '.join(str(exc).split())}") from None
    if not isinstance(content, dict):
        raise PackageError(f"{file}: expected a mapping of fields")
    return content
