"""The model repository: `<root>/<name>/<version>/model.yaml` and the artifact beside it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import yaml
from pydantic import ValidationError

from inferno import names
from inferno.errors import ModelNotFound, PackageError
from inferno.protocol.signature import Signature
from inferno.repository import graph as ensemble
from inferno.repository.graph import Stage
from inferno.repository.manifest import ENSEMBLE_EXECUTORS, MANIFEST, Manifest, explain
from inferno.settings import InferenceSettings, RepositorySettings

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


@dataclass(frozen=True)
class Model:
    """All versions of one model, which of them answer, and what is wrong with the others."""

    name: str
    versions: Mapping[int, Package]
    #: The version that answers who names none, or most of those; None where nothing does.
    active: int | None
    errors: Mapping[str, str] = field(default_factory=dict)
    #: What part of the requests that name no version each version answers, where there are several.
    shares: Mapping[int, float] = field(default_factory=dict)
    #: Versions that are taken out of service.
    withdrawn: frozenset[int] = frozenset()
    #: `active` is to be the newest version, whichever that is.
    follows_latest: bool = False

    @property
    def newest(self) -> Package:
        """The version with the highest number."""
        return self.versions[max(self.versions)]

    @property
    def described(self) -> Package:
        """The version that says what the model is: the active one, if there is one."""
        return self.newest if self.active is None else self.package()

    def package(self, version: int | None = None) -> Package:
        """Return one version, by default the active one.

        Raises:
          ModelNotFound: there is no such version, or none is active.
        """
        if version is None:
            version = self.active
        if version is None:
            raise ModelNotFound(
                f"model not found or not loaded: no version of {self.name} is active", "model"
            )
        try:
            return self.versions[version]
        except KeyError:
            known = ", ".join(map(str, sorted(self.versions)))
            raise ModelNotFound(
                f"model {self.name} has no version {version}; it has {known}", "version"
            ) from None

    def served(self, version: int | None, point: float) -> Package:
        """Return the version that shall answer a request.

        Args:
          version: that it names, if it does.
          point: from 0 to 1, evenly spread over the requests: which version's share it falls into.
        Raises:
          ModelNotFound: there is no such version, it is out of service, or none is active.
        """
        if version is None:
            return self.package(self._at(point) if self.shares else None)
        package = self.package(version)
        if version in self.withdrawn:
            raise ModelNotFound(
                f"model not found or not loaded: version {version} of {self.name} was unloaded",
                "version",
            )
        return package

    def _at(self, point: float) -> int:
        point *= sum(self.shares.values())
        for version, share in sorted(self.shares.items()):
            point -= share
            if point < 0:
                return version
        return max(self.shares)


@dataclass(frozen=True)
class Repository:
    """The models of one folder, as they were when it was read."""

    models: Mapping[str, Model]
    #: What is wrong, by model, where no version of it can be served.
    errors: Mapping[str, str]

    @classmethod
    def read(cls, settings: RepositorySettings, before: Repository | None = None) -> Repository:
        """Read every package; a broken one is listed with its error and takes nothing else down.

        Args:
          settings: where it is, and which versions are active.
          before: an earlier reading; what has not changed since is taken from it.
        Raises:
          PackageError: the folder itself cannot be read.
        """
        if not settings.root.is_dir():
            raise PackageError(
                f"no model repository at {settings.root}; "
                "set INFERNO_REPOSITORY__ROOT to a folder of models"
            )
        known = {
            package.path: package
            for model in (before.models.values() if before else ())
            for package in model.versions.values()
        }
        found = {
            folder.name: _read_versions(folder, known)
            for folder in sorted(settings.root.iterdir())
            if any(_version_folders(folder))
        }
        _sort_out_ensembles(found, settings.active)
        models: dict[str, Model] = {}
        errors: dict[str, str] = {}
        for name, (versions, broken) in found.items():
            active = settings.active.get(name, max(versions, default=0))
            if active in versions:
                models[name] = Model(
                    name,
                    versions,
                    active,
                    broken,
                    follows_latest=name not in settings.active,
                )
            elif not versions:
                errors[name] = "; ".join(broken.values())
            else:
                errors[name] = broken.get(str(active)) or (
                    f"INFERNO_REPOSITORY__ACTIVE: {name} has no version {active}"
                )
        for name in settings.active.keys() - found.keys():
            errors[name] = f"INFERNO_REPOSITORY__ACTIVE: there is no model {name!r}"
        return cls(models, errors)

    def model(self, name: str) -> Model:
        """Return a model by its name.

        Raises:
          ModelNotFound: there is none.
        """
        try:
            return self.models[name]
        except KeyError:
            raise ModelNotFound(f"model not found or not loaded: {name!r}", "model") from None

    def ready(self, serves: Callable[[str], bool]) -> set[str]:
        """Return the models that can answer: an ensemble only with those of its stages.

        Args:
          serves: whether a worker serves the model of a name.
        """
        return {
            name for name, model in self.models.items() if not self.missing(model.described, serves)
        }

    def missing(self, package: Package, serves: Callable[[str], bool]) -> list[str]:
        """Return the models for want of which a version cannot answer: its own, or its stages'.

        Args:
          package: the version.
          serves: whether a worker serves the model of a name.
        """
        found = {} if serves(package.name) else {package.name: None}
        for stage in package.manifest.ensemble:
            model = self.models.get(stage.model)
            try:
                inner = None if model is None else model.served(stage.version, 0.0)
            except ModelNotFound:
                inner = None
            if inner is None:
                found[stage.model] = None
            else:
                found |= dict.fromkeys(self.missing(inner, serves))
        return list(found)


def _version_folders(folder: Path) -> Iterator[Path]:
    # Hidden folders are packages that are still being written.
    if folder.is_dir() and not folder.name.startswith("."):
        for path in folder.iterdir():
            if not path.name.startswith(".") and (path / MANIFEST).is_file():
                yield path


def _read_versions(
    folder: Path, known: Mapping[Path, Package]
) -> tuple[dict[int, Package], dict[str, str]]:
    versions: dict[int, Package] = {}
    broken: dict[str, str] = {}
    for path in _version_folders(folder):
        try:
            package = known.get(path)
            if package is None or package.stamp() != package.seen:
                package = Package.read(path)
            versions[package.version] = package
        except PackageError as exc:
            broken[path.name] = exc.detail
    return versions, broken


#: By model, its versions that can be read, and by the names of their folders why others cannot.
_Found = Mapping[str, tuple[dict[int, Package], dict[str, str]]]


def _sort_out_ensembles(found: _Found, active: Mapping[str, int]) -> None:
    """Put the ensembles that do not fit their stages among what is broken."""
    check = _EnsembleCheck({name: dict(versions) for name, (versions, _) in found.items()}, active)
    for versions, broken in found.values():
        for package in list(versions.values()):
            if (fault := check.fault(package)) is not None:
                del versions[package.version]
                broken[str(package.version)] = fault


class _EnsembleCheck:
    """Finds out what is wrong with ensembles; those that they contain are looked at first."""

    def __init__(
        self, models: Mapping[str, Mapping[int, Package]], active: Mapping[str, int]
    ) -> None:
        self._models = models
        self._active = active
        self._faults: dict[Path, str | None] = {}

    def fault(self, package: Package) -> str | None:
        if not package.is_ensemble:
            return None
        if package.path not in self._faults:
            self._faults[package.path] = None
            try:
                self._check(package)
            except ValueError as exc:
                self._faults[package.path] = f"{package.path / MANIFEST}: ensemble: {exc}"
        return self._faults[package.path]

    def _check(self, package: Package) -> None:
        if circle := self._way([package.name], package.manifest.ensemble, set()):
            raise ValueError(f"it would contain its own model: {' -> '.join(circle)}")
        stages = package.manifest.ensemble
        signatures = {stage.name: self._package(stage).signature for stage in stages}
        ensemble.check_types(stages, package.signature, signatures)

    def _way(self, path: list[str], stages: Iterable[Stage], seen: set[str]) -> list[str] | None:
        """Return how a path of models can lead back to its beginning, by whichever versions.

        Any may become active. And versions share a lane, whose executors would wait for themselves.
        """
        for name in sorted({stage.model for stage in stages} - seen):
            if name == path[0]:
                return [*path, name]
            seen.add(name)
            versions = self._models.get(name, {}).values()
            inner = [stage for one in versions for stage in one.manifest.ensemble]
            if way := self._way([*path, name], inner, seen):
                return way
        return None

    def _package(self, stage: Stage) -> Package:
        versions = self._models.get(stage.model)
        if not versions:
            raise ValueError(f"stage {stage.name}: model: there is no sound model {stage.model!r}")
        version = stage.version or self._active.get(stage.model) or self._newest(versions)
        package = versions.get(version)
        if package is None:
            known = ", ".join(map(str, sorted(versions)))
            raise ValueError(
                f"stage {stage.name}: version: {stage.model} has no version {version}; "
                f"it has {known}"
            )
        if (fault := self.fault(package)) is not None:
            raise ValueError(f"stage {stage.name}: model: {stage.model} is broken: {fault}")
        return package

    def _newest(self, versions: Mapping[int, Package]) -> int:
        sound = [version for version, one in versions.items() if self.fault(one) is None]
        return max(sound, default=max(versions))
