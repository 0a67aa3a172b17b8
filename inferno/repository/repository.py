"""The model repository: `<root>/<name>/<version>/model.yaml` and the artifact beside it.

Web and workers read it at their start, and again every few seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from inferno.errors import ModelNotFound, PackageError
from inferno.repository import graph as ensemble
from inferno.repository.graph import Stage
from inferno.repository.manifest import MANIFEST
from inferno.repository.package import Package
from inferno.settings import RepositorySettings


@dataclass(frozen=True)
class Model:
    """All versions of one model: the sound ones, the active ones, and why others are broken."""

    name: str
    versions: Mapping[int, Package]
    #: Active version: it answers requests that name no version, or most of them if there are
    #: `shares`. None when no version is active.
    active: int | None
    #: Why a version cannot be served, by the name of its folder.
    errors: Mapping[str, str] = field(default_factory=dict)
    #: Weight of each version in answering requests that name none; empty for `active` only.
    shares: Mapping[int, float] = field(default_factory=dict)
    #: Versions that were unloaded and must not answer.
    withdrawn: frozenset[int] = frozenset()
    #: Whether `active` moves to each newer version.
    follows_latest: bool = False

    @property
    def newest(self) -> Package:
        """The version with the highest number."""
        return self.versions[max(self.versions)]

    @property
    def described(self) -> Package:
        """The version that documents the model: the active one, else the newest."""
        return self.newest if self.active is None else self.package()

    def package(self, version: int | None = None) -> Package:
        """Return one version, by default the active one.

        Raises:
          ModelNotFound: the version does not exist, or no version is active.
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
        """Return the version that answers a request.

        Args:
          version: version that the request names; None when it names none.
          point: a number from 0 to 1, spread evenly over the requests; it falls into one version's
            share.
        Raises:
          ModelNotFound: the version does not exist or was unloaded, or no version is active.
        """
        if version is None:
            return self.package(self._version_at(point) if self.shares else None)
        package = self.package(version)
        if version in self.withdrawn:
            raise ModelNotFound(
                f"model not found or not loaded: version {version} of {self.name} was unloaded",
                "version",
            )
        return package

    def _version_at(self, point: float) -> int:
        point *= sum(self.shares.values())
        for version, share in sorted(self.shares.items()):
            point -= share
            if point < 0:
                return version
        return max(self.shares)


@dataclass(frozen=True)
class Repository:
    """The models of one folder at the time when it was read."""

    models: Mapping[str, Model]
    #: Why a model cannot be served, by its name.
    errors: Mapping[str, str]

    @classmethod
    def read(cls, settings: RepositorySettings, before: Repository | None = None) -> Repository:
        """Read every package. A broken package is listed in `errors`; the others are served.

        Args:
          settings: the repository's folder and the active versions.
          before: an earlier reading, whose unchanged packages are reused.
        Raises:
          PackageError: the folder does not exist.
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
            folder.name: _read_versions(folder, known, settings)
            for folder in sorted(settings.root.iterdir())
            if any(_version_folders(folder))
        }
        _reject_broken_ensembles(found, settings.active)
        return cls(*_choose_active(found, settings.active))

    def model(self, name: str) -> Model:
        """Return a model by its name.

        Raises:
          ModelNotFound: no model has this name.
        """
        try:
            return self.models[name]
        except KeyError:
            raise ModelNotFound(f"model not found or not loaded: {name!r}", "model") from None

    def ready(self, serves: Callable[[str], bool]) -> set[str]:
        """Return the names of the models that can answer: for an ensemble, every stage must.

        Args:
          serves: tells whether a worker serves a model, by the model's name.
        """
        return {
            name for name, model in self.models.items() if not self.missing(model.described, serves)
        }

    def missing(self, package: Package, serves: Callable[[str], bool]) -> list[str]:
        """Return the models that must be served first: the version's own, and its stages'.

        Args:
          package: the version that is to answer.
          serves: tells whether a worker serves a model, by the model's name.
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
    # A hidden folder is a package that is still being written.
    if folder.is_dir() and not folder.name.startswith("."):
        for path in folder.iterdir():
            if not path.name.startswith(".") and (path / MANIFEST).is_file():
                yield path


def _read_versions(
    folder: Path, known: Mapping[Path, Package], settings: RepositorySettings
) -> tuple[dict[int, Package], dict[str, str]]:
    versions: dict[int, Package] = {}
    broken: dict[str, str] = {}
    for path in _version_folders(folder):
        try:
            package = known.get(path)
            if package is None or package.stamp() != package.seen:
                package = Package.read(path)
            package.check_allowed(allow_code=settings.allow_code)
            versions[package.version] = package
        except PackageError as exc:
            broken[path.name] = exc.detail
    return versions, broken


#: By model: its sound versions, and why others are broken by the names of their folders.
_Found = Mapping[str, tuple[dict[int, Package], dict[str, str]]]


def _reject_broken_ensembles(found: _Found, active: Mapping[str, int]) -> None:
    """Move ensembles that do not fit their stages from the sound to the broken versions."""
    check = _EnsembleCheck({name: dict(versions) for name, (versions, _) in found.items()}, active)
    for versions, broken in found.values():
        for package in list(versions.values()):
            if (fault := check.fault(package)) is not None:
                del versions[package.version]
                broken[str(package.version)] = fault


def _choose_active(
    found: _Found, active: Mapping[str, int]
) -> tuple[dict[str, Model], dict[str, str]]:
    """Return the models that have an active version, and why the others have none."""
    models: dict[str, Model] = {}
    errors: dict[str, str] = {}
    for name, (versions, broken) in found.items():
        version = active.get(name, max(versions, default=0))
        if version in versions:
            models[name] = Model(name, versions, version, broken, follows_latest=name not in active)
        elif not versions:
            errors[name] = "; ".join(broken.values())
        else:
            errors[name] = broken.get(str(version)) or (
                f"INFERNO_REPOSITORY__ACTIVE: {name} has no version {version}"
            )
    for name in active.keys() - found.keys():
        errors[name] = f"INFERNO_REPOSITORY__ACTIVE: model {name!r} does not exist"
    return models, errors


class _EnsembleCheck:
    """Finds faults of ensembles, inner ensembles first."""

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
        if circle := self._cycle([package.name], package.manifest.ensemble, set()):
            raise ValueError(f"it contains its own model: {' -> '.join(circle)}")
        stages = package.manifest.ensemble
        signatures = {stage.name: self._package(stage).signature for stage in stages}
        ensemble.check_types(stages, package.signature, signatures)

    def _cycle(self, path: list[str], stages: Iterable[Stage], seen: set[str]) -> list[str] | None:
        """Return a path of models that leads back to its first model, or None.

        Every version of a model counts: each may become active, and all share one lane, whose
        executors would wait for themselves.
        """
        for name in sorted({stage.model for stage in stages} - seen):
            if name == path[0]:
                return [*path, name]
            seen.add(name)
            versions = self._models.get(name, {}).values()
            inner = [stage for one in versions for stage in one.manifest.ensemble]
            if cycle := self._cycle([*path, name], inner, seen):
                return cycle
        return None

    def _package(self, stage: Stage) -> Package:
        versions = self._models.get(stage.model)
        if not versions:
            raise ValueError(
                f"stage {stage.name}: model: {stage.model!r} does not exist or is broken"
            )
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
