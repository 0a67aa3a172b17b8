"""The client of a platform for Python programs, over HTTP and WebSocket.

    with Client() as client:
        task = client.submit("sentiment", "What a lovely day!")
        print(task.result().outputs["label"])

There is one call for each need: `submit` for work whose result is fetched later, `predict` for a
result at once, `stream` for many results over one connection. Errors are the classes of
`inferno.errors`, rebuilt from the platform's answers.
"""

from __future__ import annotations

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
    """A submitted task: something to ask for its result."""

    def __init__(self, client: Client, task_id: str) -> None:
        self._client = client
        self.id = task_id

    def __repr__(self) -> str:
        return f"Task({self.id!r})"

    def status(self) -> TaskState:
        """Ask where the task stands.

        Raises:
          InfernoError: the platform does not know the task, or does not answer.
        """
        return TaskState(self._client.task(self.id)["status"])

    def result(self, timeout_s: float = 30.0) -> Result:
        """Wait for the result; see `Client.result`."""
        return self._client.result(self.id, timeout_s)

    def cancel(self) -> None:
        """Take the task back; see `Client.cancel`."""
        self._client.cancel(self.id)


class Client:
    """A connection pool to one platform. Safe to share between threads."""

    def __init__(self, url: str = DEFAULT_URL) -> None:
        """Store where the platform is; nothing is sent yet.

        Args:
          url: of the front page, such as ``http://127.0.0.1:8000``.
        """
        self.url = url.rstrip("/")
        self._connection = Connection(self.url)
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
        """Hand in a task and return at once.

        Args:
          model: its name.
          inputs: as `Request.inputs`.
          version: of the model; default the active one.
          outputs: those to return; default all.
          priority: 0 to 9; higher is sooner.
          timeout_ms: the forward pass must start within it.
          idempotency_key: the same call with the same key makes one task, however often it is
            repeated; printable ASCII.
          webhook: a URL to call about the task.
          webhook_events: what to call it for, `start` or `completed`; default `completed` alone.

        Raises:
          RequestError: the request is wrong; nothing was queued.
          ServingError: the platform cannot take it.
        """
        request = Request(
            model, inputs, version, outputs, priority, timeout_ms, None, webhook, webhook_events
        )
        headers = key_header(idempotency_key)
        answer = self._connection.call("POST", "/infer", self._encode(request), headers=headers)
        return Task(self, answer["task_id"])

    def task(self, task_id: str, wait_s: float = 0.0) -> dict[str, Any]:
        """Return what the platform knows of a task, its outputs or error included.

        Args:
          task_id: as `Task.id`.
          wait_s: how long to wait for the end of a task that is still under way.

        Raises:
          TaskNotFound: there is no such task.
          ResultExpired: its result is no longer kept.
        """
        path = f"/tasks/{quote(task_id, safe='')}"
        params = {"wait": f"{wait_s:.3f}"} if wait_s else None
        view: dict[str, Any] = self._connection.call("GET", path, wait_s=wait_s, params=params)
        return view

    def result(self, task_id: str, timeout_s: float = 30.0) -> Result:
        """Wait for a task's result.

        Raises:
          TimeoutError: the task is not over yet; it goes on.
          InfernoError: the one that the task ended with, or that the platform answers.
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
        """Hand in a task and wait for its result.

        Args:
          model: its name.
          inputs: as `Request.inputs`.
          version: of the model; default the active one.
          outputs: those to return; default all.
          priority: 0 to 9; higher is sooner.
          timeout_ms: the forward pass must start within it.
          timeout_s: how long to wait for the result.
          idempotency_key: the same call with the same key makes one task, and returns its result
            again; printable ASCII.

        Raises:
          TimeoutError: the task is not over yet; it goes on.
          RequestInProgress: the first call with this key still waits for its result.
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
        # Whole seconds are all that the header can say.
        headers = {"Prefer": f"wait={min(timeout_s, POLL_S):.0f}", **key_header(idempotency_key)}
        answer = self._connection.call("POST", path, body, wait_s=POLL_S, headers=headers)
        if "outputs" in answer:
            return read_result(answer | {"status": TaskState.SUCCEEDED})
        # The platform's patience ended before ours; the task goes on.
        return self.result(answer["task_id"], max(deadline - time.monotonic(), 0.0))

    def cancel(self, task_id: str) -> dict[str, Any]:
        """Take a task back, wherever it is; if it runs, its result is discarded.

        Returns:
          what the platform knows of it.

        Raises:
          TaskNotFound: there is no such task.
          WrongState: it has ended otherwise.
        """
        view: dict[str, Any] = self._connection.call("DELETE", f"/tasks/{quote(task_id, safe='')}")
        return view

    def retry(self, task_id: str) -> Task:
        """Run again, as a new task, what a finished one was asked.

        Raises:
          TaskNotFound: there is no such task.
          WrongState: it is not over.
          PayloadGone: what it was asked was not kept.
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
        """Yield what the platform knows of the newest tasks, newest first.

        Args:
          status: the states to choose; none for all.
          model: whose tasks to choose.
        """
        return self._pages("/tasks", "tasks", {"status": ",".join(status), "model": model})

    # -- Dead letters -----------------------------------------------------------------------------

    def dead_letters(self, *, model: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the tasks that were given up, newest first."""
        return self._pages("/dead", "dead", {"model": model})

    def dead_letter(self, task_id: str) -> dict[str, Any]:
        """Return a dead letter with its `traceback` and `payload`.

        Raises:
          TaskNotFound: there is none.
        """
        letter: dict[str, Any] = self._connection.call("GET", f"/dead/{quote(task_id, safe='')}")
        return letter

    def count_dead_letters(self) -> int:
        """Return how many dead letters there are."""
        count: int = self._connection.call("GET", "/dead", params={"limit": "1"})["count"]
        return count

    def replay(self, task_id: str) -> Task:
        """Run a dead task again, as a new task, and discard its letter.

        Raises:
          TaskNotFound: there is no such letter.
          ModelNotFound: its model is gone.
        """
        answer = self._connection.call("POST", f"/dead/{quote(task_id, safe='')}/replay")
        return Task(self, answer["task_id"])

    def replay_all(self, *, model: str | None = None) -> dict[str, Any]:
        """Run all dead tasks again, or those of one model.

        Returns:
          `replayed` and `left`, how many were and were not, and `tasks`, the new ones.
        """
        params = {} if model is None else {"model": model}
        answer: dict[str, Any] = self._connection.call(
            "POST", "/dead/replay", params=params, wait_s=MANY_S
        )
        return answer

    def discard(self, task_id: str) -> None:
        """Delete a dead letter.

        Raises:
          TaskNotFound: there is none.
        """
        self._connection.call("DELETE", f"/dead/{quote(task_id, safe='')}")

    def discard_all(self, count: int) -> None:
        """Delete all dead letters.

        Args:
          count: how many there are.

        Raises:
          NotConfirmed: there are more or fewer.
        """
        self._connection.call("DELETE", "/dead", params={"confirm": str(count)})

    # -- Lanes ------------------------------------------------------------------------------------

    def lanes(self) -> list[dict[str, Any]]:
        """Return how much is in each lane: `model`, `waiting`, `held`, `delayed` and `paused`."""
        lanes: list[dict[str, Any]] = self._connection.call("GET", "/lanes")["lanes"]
        return lanes

    def lane(self, model: str) -> dict[str, Any]:
        """Return how much is in the lane of one model.

        Raises:
          ModelNotFound: there is none of this name.
        """
        lane: dict[str, Any] = self._connection.call("GET", f"/lanes/{quote(model, safe='')}")
        return lane

    def pause(self, model: str) -> None:
        """Hand out nothing more of a lane; tasks are accepted, and those in workers' hands end."""
        self._connection.call("POST", f"/lanes/{quote(model, safe='')}/pause")

    def resume(self, model: str) -> None:
        """Hand out a paused lane again."""
        self._connection.call("POST", f"/lanes/{quote(model, safe='')}/resume")

    def purge(self, model: str, count: int) -> int:
        """Cancel the tasks that wait in a lane, or for their next attempt.

        Args:
          model: whose lane it is.
          count: how many there are: `waiting` and `delayed`.

        Returns:
          how many were cancelled.

        Raises:
          NotConfirmed: there are more or fewer.
        """
        path = f"/lanes/{quote(model, safe='')}/purge"
        answer = self._connection.call("POST", path, params={"confirm": str(count)}, wait_s=MANY_S)
        cancelled: int = answer["cancelled"]
        return cancelled

    # -- The cache --------------------------------------------------------------------------------

    def cache(self) -> dict[str, Any]:
        """Return how many results are kept, and what that has saved."""
        found: dict[str, Any] = self._connection.call("GET", "/cache")
        return found

    def clear_cache(self, model: str | None = None) -> int:
        """Forget the kept results, of one model or of all.

        Returns:
          how many there were.
        """
        params = {} if model is None else {"model": model}
        cleared: int = self._connection.call("DELETE", "/cache", params=params)["cleared"]
        return cleared

    # -- The platform -----------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        """Return the models of the platform: `name`, `active`, `versions`, `ready` and more."""
        models: list[dict[str, Any]] = self._connection.call("GET", "/v1/models")["models"]
        return models

    def model(self, name: str) -> dict[str, Any]:
        """Return one model.

        Raises:
          ModelNotFound: there is none of this name.
        """
        model: dict[str, Any] = self._connection.call("GET", f"/v1/models/{quote(name, safe='')}")
        return model

    # -- Versions ---------------------------------------------------------------------------------

    def active(self, model: str) -> dict[str, Any]:
        """Return which versions answer who names none: `version`, `shares`, `loaded` and more.

        Raises:
          ModelNotFound: there is none of this name.
        """
        active: dict[str, Any] = self._connection.call(
            "GET", f"/v1/models/{quote(model, safe='')}/active"
        )
        return active

    def activate(self, model: str, versions: int | str | Mapping[int, float]) -> dict[str, Any]:
        """Let other versions answer who names none, as soon as all workers have loaded them.

        Args:
          model: whose versions they are.
          versions: one, `latest`, or several with what part of the requests each answers.

        Returns:
          as `active`.

        Raises:
          LoadFailed: a worker cannot load one of them; nothing has changed.
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
        """Have all workers of a model load a version, and wait until they have.

        Args:
          model: whose version it is.
          version: by default the newest.
          activate: let it answer all requests that name none.

        Returns:
          `version`, `active` and `workers`.

        Raises:
          LoadFailed: a worker cannot load it; nothing has changed.
          ModelUnavailable: no worker is there.
        """
        body = {"name": model, "version": version or "latest", "activate": activate}
        answer: dict[str, Any] = self._connection.call(
            "POST", "/v1/models:load", body, wait_s=MANY_S
        )
        return answer

    def unload(self, model: str, version: int | None = None) -> None:
        """Take a version, by default all of them, out of service and of the workers' memory."""
        self._connection.call(
            "POST", "/v1/models:unload", {"name": model, "version": version}, wait_s=MANY_S
        )

    # -- The platform itself ----------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """Return how the platform is, also when it is not well.

        Raises:
          PlatformUnreachable: nothing answers there.
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
