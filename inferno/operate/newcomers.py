"""Which models get a worker: at the start, and when they are added while the platform runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable

from inferno.errors import PackageError
from inferno.repository.repository import Repository
from inferno.settings import RepositorySettings

logger = logging.getLogger(__name__)


class Newcomers:
    """Watches the repository for new models, on a thread that runs during a `with` block."""

    def __init__(
        self, settings: RepositorySettings, known: Iterable[str], found: Callable[[str], None]
    ) -> None:
        """Store the configuration.

        Args:
          settings: the repository's folder, and how often to read it.
          known: names of the models that have a worker.
          found: called once with the name of each new model that can be served.
        """
        self._settings = settings
        self._known = set(known)
        self._found = found
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="newcomers", daemon=True)

    def __enter__(self) -> Newcomers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        repository: Repository | None = None
        while not self._stop.wait(self._settings.reconcile_interval_s):
            try:
                repository = Repository.read(self._settings, repository)
            except (PackageError, OSError) as exc:
                logger.warning("the model repository cannot be read: %s", exc)
                continue
            models, _ = servable(repository, None)
            for name in models:
                if name not in self._known:
                    self._known.add(name)
                    self._found(name)


def servable(repository: Repository, chosen: str | None) -> tuple[list[str], dict[str, str]]:
    """Choose the models to start workers for.

    Args:
      repository: the model repository.
      chosen: names separated by commas; None for all models.

    Returns:
      The names, and why other models cannot be served, by name.

    Raises:
      InfernoError: a chosen model cannot be served.
    """
    broken = dict(repository.errors)
    for name, model in repository.models.items():
        path = model.package().missing_artifact
        if path is not None:
            broken[name] = f"{path} is missing; run `inferno models prepare {name}` to make it"
    if chosen is None:
        return [name for name in repository.models if name not in broken], broken
    names = list(dict.fromkeys(name.strip() for name in chosen.split(",") if name.strip()))
    for name in names:
        if name in broken:
            raise PackageError(broken[name])
        repository.model(name)
    return names, {}
