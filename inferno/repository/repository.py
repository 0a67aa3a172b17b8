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
