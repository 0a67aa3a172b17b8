"""The client of a platform for Python programs, over HTTP and WebSocket.

    with Client() as client:
        task = client.submit("sentiment", "What a lovely day!")
        print(task.result().outputs["label"])

There is one call for each need: `submit` for work whose result is fetched later, `predict` for a
result at once, `stream` for many results over one connection. Errors are the classes of
`inferno.errors`, rebuilt from the platform's answers.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from inferno.client.connection import Connection
from inferno.client.encoding import Request, encode_request, key_header, name_inputs
from inferno.client.results import Result, read_result
from inferno.client.stream import Stream
from inferno.protocol.signature import Signature
from inferno.protocol.tasks import TaskState

DEFAULT_URL = "http://127.0.0.1:8000"

#: Longest wait of one request for a result, in seconds; a longer wait takes several requests.
POLL_S = 30.0
#: Time limit of a health check, in seconds: a caller wants to hear soon that nothing answers.
HEALTH_S = 5.0
#: Extra time for calls that change many tasks or load models, in seconds.
MANY_S = 300.0
#: Items that one request lists.
PAGE = 100


class Task:
    """A submitted task, whose result can be waited for."""

    def __init__(self, client: Client, task_id: str) -> None:
        self._client = client
        self.id = task_id

    def __repr__(self) -> str:
        return f"Task({self.id!r})"

    def status(self) -> TaskState:
        """Fetch the task's state.

        Raises:
          InfernoError: the platform does not know the task, or does not answer.
        """
        return TaskState(self._client.task(self.id)["status"])

    def result(self, timeout_s: float = 30.0) -> Result:
        """Wait for the result; see `Client.result`."""
        return self._client.result(self.id, timeout_s)

    def cancel(self) -> None:
        """Cancel the task; see `Client.cancel`."""
        self._client.cancel(self.id)


class Client:
    """A client of one platform. Safe to share between threads."""

    def __init__(self, url: str = DEFAULT_URL, *, tls: ssl.SSLContext | None = None) -> None:
        """Store the platform's URL; nothing is sent yet.

        Args:
          url: URL of the front page, such as ``http://127.0.0.1:8000``.
          tls: which certificates are trusted. None: those in the file that the environment variable
            SSL_CERT_FILE names, or the public authorities.

        Raises:
          ConfigurationError: the file that SSL_CERT_FILE names cannot be read.
        """
        self.url = url.rstrip("/")
        self._connection = Connection(self.url, tls)
        self._signatures: dict[str, Signature] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._connection.close()

    # -- One task ---------------------------------------------------------------------------------

    def submit(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        outputs: list[str] | None = None,
        priority: int = 0,
        timeout_ms: float | None = None,
        idempotency_key: str | None = None,
        webhook: str | None = None,
        webhook_events: list[str] | None = None,
    ) -> Task:
        """Submit a task and return at once.

        Args:
          model: name of the model.
          inputs: as `Request.inputs`.
          version: model version (default: the active one).
          outputs: names of the outputs to return (default: all).
          priority: 0 to 9; higher runs sooner.
          timeout_ms: the forward pass must start within this many milliseconds.
          idempotency_key: calls with the same key make one task; printable ASCII.
          webhook: URL to call about the task.
          webhook_events: events to call it for, `start` or `completed` (default: `completed`).

        Raises:
          RequestError: the request is wrong; nothing was queued.
          ServingError: the platform cannot accept the task.
        """
        request = Request(
            model, inputs, version, outputs, priority, timeout_ms, None, webhook, webhook_events
        )
        headers = key_header(idempotency_key)
        answer = self._connection.call("POST", "/infer", self._encode(request), headers=headers)
        return Task(self, answer["task_id"])

    def task(self, task_id: str, wait_s: float = 0.0) -> dict[str, Any]:
        """Return a task's view, with its outputs or its error.

        Args:
          task_id: as `Task.id`.
          wait_s: how long to wait for an unfinished task, in seconds.

        Raises:
          TaskNotFound: no task has this id.
          ResultExpired: the task's result was deleted.
        """
        path = f"/tasks/{quote(task_id, safe='')}"
        params = {"wait": f"{wait_s:.3f}"} if wait_s else None
        view: dict[str, Any] = self._connection.call("GET", path, wait_s=wait_s, params=params)
        return view

    def result(self, task_id: str, timeout_s: float = 30.0) -> Result:
        """Wait for a task's result.

        Raises:
          TimeoutError: the task is not finished yet; it keeps running.
          InfernoError: the error that the task ended with, or that the platform answers.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            wait_s = min(max(deadline - time.monotonic(), 0.0), POLL_S)
            view = self.task(task_id, wait_s)
            if TaskState(view["status"]).terminal:
                return read_result(view).checked()
            if time.monotonic() >= deadline:
                raise TimeoutError(f"task {task_id} is {view['status']} after {timeout_s:g} s")

    def predict(
        self,
        model: str,
        inputs: Any,
        *,
        version: int | None = None,
        outputs: list[str] | None = None,
        priority: int = 0,
        timeout_ms: float | None = None,
        timeout_s: float = 30.0,
        idempotency_key: str | None = None,
    ) -> Result:
        """Submit a task and wait for its result.

        Args:
          model: name of the model.
          inputs: as `Request.inputs`.
          version: model version (default: the active one).
          outputs: names of the outputs to return (default: all).
          priority: 0 to 9; higher runs sooner.
          timeout_ms: the forward pass must start within this many milliseconds.
          timeout_s: how long to wait for the result, in seconds.
          idempotency_key: calls with the same key make one task and return its result; printable
            ASCII.

        Raises:
          TimeoutError: the task is not finished yet; it keeps running.
          RequestInProgress: the first call with this key is still waiting for its result.
          InfernoError: the one that the task ended with, or that the platform answers.
        """
        deadline = time.monotonic() + timeout_s
        request = Request(
            model,
            name_inputs(model, inputs, self._signature),
            version,
            outputs,
            priority,
            timeout_ms,
        )
        body = {name: value for name, value in self._encode(request).items() if name != "model"}
        path = f"/v1/models/{quote(model, safe='')}:predict"
        # The header only takes whole seconds.
        headers = {"Prefer": f"wait={min(timeout_s, POLL_S):.0f}", **key_header(idempotency_key)}
        answer = self._connection.call("POST", path, body, wait_s=POLL_S, headers=headers)
        if "outputs" in answer:
            return read_result(answer | {"status": TaskState.SUCCEEDED})
        # The platform stopped waiting before we do; the task keeps running.
        return self.result(answer["task_id"], max(deadline - time.monotonic(), 0.0))

    def cancel(self, task_id: str) -> dict[str, Any]:
        """Cancel a task. A running task's result is discarded; cancelling twice is harmless.

        Returns:
          The task's view.

        Raises:
          TaskNotFound: no task has this id.
          WrongState: the task succeeded, failed or expired before.
        """
        view: dict[str, Any] = self._connection.call("DELETE", f"/tasks/{quote(task_id, safe='')}")
        return view

    def retry(self, task_id: str) -> Task:
        """Run the request of a finished task again, as a new task.

        Raises:
          TaskNotFound: no task has this id.
          WrongState: the task is not finished.
          PayloadGone: the task's request was not kept.
        """
        answer = self._connection.call("POST", f"/tasks/{quote(task_id, safe='')}/retry")
        return Task(self, answer["task_id"])

    # -- Many tasks -------------------------------------------------------------------------------

    def stream(self, items: Iterable[Request | Task | str]) -> Iterator[Result]:
        """Yield results as they arrive, over one connection.

        A task that fails does not end the stream: its result has an `error`.

        Args:
          items: requests to submit, and submitted tasks or their ids. They are taken from the
            iterable as earlier ones finish.

        Raises:
          PlatformUnreachable: nothing answers at the URL.
          ServingError: the connection was lost.
        """
        plain = (item.id if isinstance(item, Task) else item for item in items)
        with closing(self._connection.open_socket()) as socket:
            yield from Stream(socket, self._encode, self.task).results(plain)

    def tasks(
        self, *, status: Iterable[str] = (), model: str | None = None
    ) -> Iterator[dict[str, Any]]:
        """Yield the views of the newest tasks, newest first.

        Args:
          status: only tasks in these states; empty for all.
          model: only tasks of this model.
        """
        return self._pages("/tasks", "tasks", {"status": ",".join(status), "model": model})

    # -- Dead letters -----------------------------------------------------------------------------

    def dead_letters(self, *, model: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the tasks that were given up, newest first."""
        return self._pages("/dead", "dead", {"model": model})

    def dead_letter(self, task_id: str) -> dict[str, Any]:
        """Return a dead letter with its `traceback` and `payload`.

        Raises:
          TaskNotFound: the task has no dead letter.
        """
        letter: dict[str, Any] = self._connection.call("GET", f"/dead/{quote(task_id, safe='')}")
        return letter

    def count_dead_letters(self) -> int:
        """Return how many dead letters there are."""
        count: int = self._connection.call("GET", "/dead", params={"limit": "1"})["count"]
        return count

    def replay(self, task_id: str) -> Task:
        """Run a dead task again, as a new task, and discard its dead letter.

        Raises:
          TaskNotFound: the task has no dead letter.
          ModelNotFound: the task's model is no longer in the repository.
        """
        answer = self._connection.call("POST", f"/dead/{quote(task_id, safe='')}/replay")
        return Task(self, answer["task_id"])

    def replay_all(self, *, model: str | None = None) -> dict[str, Any]:
        """Run all dead tasks again, or those of one model.

        Returns:
          The counts `replayed` and `left`, and the new `tasks`.
        """
        params = {} if model is None else {"model": model}
        answer: dict[str, Any] = self._connection.call(
            "POST", "/dead/replay", params=params, wait_s=MANY_S
        )
        return answer

    def discard(self, task_id: str) -> None:
        """Delete a dead letter.

        Raises:
          TaskNotFound: the task has no dead letter.
        """
        self._connection.call("DELETE", f"/dead/{quote(task_id, safe='')}")

    def discard_all(self, count: int) -> None:
        """Delete all dead letters.

        Args:
          count: the number of dead letters that the caller expects to delete.

        Raises:
          NotConfirmed: the number is different.
        """
        self._connection.call("DELETE", "/dead", params={"confirm": str(count)})

    # -- Lanes ------------------------------------------------------------------------------------

    def lanes(self) -> list[dict[str, Any]]:
        """Return each lane's `model`, its `waiting`, `held` and `delayed` tasks, and `paused`."""
        lanes: list[dict[str, Any]] = self._connection.call("GET", "/lanes")["lanes"]
        return lanes

    def lane(self, model: str) -> dict[str, Any]:
        """Return the lane of one model, as `lanes` does.

        Raises:
          ModelNotFound: no model has this name.
        """
        lane: dict[str, Any] = self._connection.call("GET", f"/lanes/{quote(model, safe='')}")
        return lane

    def pause(self, model: str) -> None:
        """Pause a lane: tasks are still accepted, and workers finish the tasks that they hold."""
        self._connection.call("POST", f"/lanes/{quote(model, safe='')}/pause")

    def resume(self, model: str) -> None:
        """Resume a paused lane."""
        self._connection.call("POST", f"/lanes/{quote(model, safe='')}/resume")

    def purge(self, model: str, count: int) -> int:
        """Cancel the tasks that wait in a lane or for their next attempt.

        Args:
          model: model of the lane.
          count: the number of tasks that the caller expects to cancel: `waiting` plus `delayed`.

        Returns:
          The number of cancelled tasks.

        Raises:
          NotConfirmed: the number is different.
        """
        path = f"/lanes/{quote(model, safe='')}/purge"
        answer = self._connection.call("POST", path, params={"confirm": str(count)}, wait_s=MANY_S)
        cancelled: int = answer["cancelled"]
        return cancelled

    # -- The cache --------------------------------------------------------------------------------

    def cache(self) -> dict[str, Any]:
        """Return the number and size of the kept results, and the hits and misses by model."""
        found: dict[str, Any] = self._connection.call("GET", "/cache")
        return found

    def clear_cache(self, model: str | None = None) -> int:
        """Delete the kept results of one model, by default of all models.

        Returns:
          The number of deleted results.
        """
        params = {} if model is None else {"model": model}
        cleared: int = self._connection.call("DELETE", "/cache", params=params)["cleared"]
        return cleared

    # -- Models -----------------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        """Return the models of the platform: `name`, `active`, `versions`, `ready` and more."""
        models: list[dict[str, Any]] = self._connection.call("GET", "/v1/models")["models"]
        return models

    def model(self, name: str) -> dict[str, Any]:
        """Return one model, as `models` does.

        Raises:
          ModelNotFound: no model has this name.
        """
        model: dict[str, Any] = self._connection.call("GET", f"/v1/models/{quote(name, safe='')}")
        return model

    # -- Versions ---------------------------------------------------------------------------------

    def active(self, model: str) -> dict[str, Any]:
        """Return the active versions of a model: `version`, `shares`, `loaded` and more.

        Raises:
          ModelNotFound: no model has this name.
        """
        active: dict[str, Any] = self._connection.call(
            "GET", f"/v1/models/{quote(model, safe='')}/active"
        )
        return active

    def activate(self, model: str, versions: int | str | Mapping[int, float]) -> dict[str, Any]:
        """Load versions in every worker, then make them the active ones.

        Args:
          model: model of the versions.
          versions: a version, `latest`, or a weight for each of several versions.

        Returns:
          As `active`.

        Raises:
          LoadFailed: a worker could not load a version; nothing has changed.
        """
        weights = {} if isinstance(versions, int | str) else versions
        body: dict[str, Any] = {"weights": {str(v): share for v, share in weights.items()}}
        answer: dict[str, Any] = self._connection.call(
            "PUT",
            f"/v1/models/{quote(model, safe='')}/active",
            body if weights else {"version": versions},
            wait_s=MANY_S,
        )
        return answer

    def load(
        self, model: str, version: int | None = None, *, activate: bool = True
    ) -> dict[str, Any]:
        """Load a version in every worker of a model, and wait until that is done.

        Args:
          model: model of the version.
          version: the version to load (default: the newest).
          activate: also make it the active version.

        Returns:
          `version`, `active` and `workers`.

        Raises:
          LoadFailed: a worker could not load the version; nothing has changed.
          ModelUnavailable: no live worker serves the model.
        """
        body = {"name": model, "version": version or "latest", "activate": activate}
        answer: dict[str, Any] = self._connection.call(
            "POST", "/v1/models:load", body, wait_s=MANY_S
        )
        return answer

    def unload(self, model: str, version: int | None = None) -> None:
        """Stop serving a version, by default every version, and free the workers' memory."""
        self._connection.call(
            "POST", "/v1/models:unload", {"name": model, "version": version}, wait_s=MANY_S
        )

    # -- The platform itself ----------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """Return the health of the platform, also when it is unhealthy.

        Raises:
          PlatformUnreachable: nothing answers at the URL.
        """
        health: dict[str, Any] = self._connection.get_any("/health", HEALTH_S)
        return health

    # -- Inside -----------------------------------------------------------------------------------

    def _encode(self, request: Request) -> dict[str, Any]:
        return encode_request(request, self._signature)

    def _signature(self, model: str) -> Signature:
        if model not in self._signatures:
            self._signatures[model] = Signature.model_validate(self.model(model)["signature"])
        return self._signatures[model]

    def _pages(
        self, path: str, name: str, filters: Mapping[str, str | None]
    ) -> Iterator[dict[str, Any]]:
        """Yield the items of a list, page by page."""
        params = {"limit": str(PAGE), **{key: value for key, value in filters.items() if value}}
        while True:
            page = self._connection.call("GET", path, params=params)
            yield from page[name]
            if page["next"] is None:
                return
            params["cursor"] = page["next"]
