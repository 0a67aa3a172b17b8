"""A client of the platform, for Python programs; it speaks HTTP and WebSocket.

    with Client() as client:
        task = client.submit("sentiment", "What a lovely day!")
        print(task.result().outputs["label"])

One call per need: `submit` for work whose result is fetched later, `predict` for a result at once,
`stream` for many results over one connection. Errors are the classes of `inferno.errors`, rebuilt
from what the platform answers.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count, islice
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx
import numpy as np
import websocket

from inferno.errors import (
    InfernoError,
    InvalidRequest,
    ModelNotFound,
    PlatformUnreachable,
    RequestError,
    ServingError,
)
from inferno.protocol import tensors
from inferno.protocol.signature import Signature, TensorSpec
from inferno.protocol.tasks import TaskState
from inferno.protocol.tensors import NUMERIC, Array, Tensors

DEFAULT_URL = "http://127.0.0.1:8000"

#: Longest wait of one request for a result; longer patience is several requests.
POLL_S = 30.0
#: Time for everything but waiting for a result.
ANSWER_S = 30.0
#: Who asks for health wants to hear of its absence soon.
HEALTH_S = 5.0
#: Further time for what is done to many tasks.
MANY_S = 300.0
#: Tasks that one request lists.
PAGE = 100
#: Tasks of one stream that are under way at the same time: enough for full batches, and few enough
#: that the server never has to hold more results than a socket may queue.
STREAM_WINDOW = 256
#: A socket on which nothing arrives for so long is dead: the server pings more often.
SILENCE_S = 60.0

#: What the libraries raise when no connection comes about.
_UNREACHABLE = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    websocket.WebSocketAddressException,
    ConnectionRefusedError,
    # Of connecting alone: websocket wraps those of a connection that stands.
    TimeoutError,
)


@dataclass(frozen=True)
class Request:
    """One inference to ask for."""

    model: str
    #: By input name: text, bytes (an image), a number, a list of these, or a numpy array. Or one
    #: such value alone, for the input that can hold it.
    inputs: Any
    version: int | None = None
    #: Outputs to return; None for all.
    outputs: list[str] | None = None
    #: 0 to 9; higher is sooner.
    priority: int = 0
    #: The forward pass must start within this many milliseconds.
    timeout_ms: float | None = None
    #: Of `stream`: the same request with the same key is done once, however often it is sent.
    idempotency_key: str | None = None
    #: A URL to call about the task.
    webhook: str | None = None
    #: What to call it for, `start` or `completed`; None for `completed` alone.
    webhook_events: list[str] | None = None
    #: Whether the result of another task with equal inputs will do.
    cache: bool = True

    def options(self) -> dict[str, Any]:
        """Return what is not said by default."""
        options: dict[str, Any] = {
            "version": self.version,
            "outputs": self.outputs,
            "priority": self.priority or None,
            "timeout_ms": self.timeout_ms,
            "webhook": self.webhook,
            "webhook_events": self.webhook_events,
            "cache": None if self.cache else False,
        }
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True)
class Result:
    """How a task ended."""

    #: Empty when a request of a stream was refused, so that there is no task.
    task_id: str
    model: str
    #: Of the model; None when the task ended before one was chosen.
    version: int | None
    status: TaskState
    #: Arrays by name; text and bytes are object arrays. Empty unless the task succeeded.
    outputs: Tensors
    #: Why there are no outputs.
    error: InfernoError | None
    #: The answer as it came; also has `timings`, `batch` and `worker`.
    raw: Mapping[str, Any]
    #: What `stream` was given for this result.
    request: Request | None = None

    def checked(self) -> Result:
        """Return the result itself.

        Raises:
          InfernoError: the one that the task ended with.
        """
        if self.error is not None:
            raise self.error
        return self


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
        self._http = httpx.Client(base_url=self.url, timeout=ANSWER_S)
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
        self._http.close()

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
        headers = _key_header(idempotency_key)
        answer = self._call("POST", "/infer", self._body(request), headers=headers)
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
        view: dict[str, Any] = self._call("GET", path, wait_s=wait_s, params=params)
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
                return _result(view).checked()
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
        request = Request(model, self._named(model, inputs), version, outputs, priority, timeout_ms)
        body = {name: value for name, value in self._body(request).items() if name != "model"}
        path = f"/v1/models/{quote(model, safe='')}:predict"
        # Whole seconds are all that the header can say.
        headers = {"Prefer": f"wait={min(timeout_s, POLL_S):.0f}", **_key_header(idempotency_key)}
        answer = self._call("POST", path, body, wait_s=POLL_S, headers=headers)
        if "outputs" in answer:
            return _result(answer | {"status": TaskState.SUCCEEDED})
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
        view: dict[str, Any] = self._call("DELETE", f"/tasks/{quote(task_id, safe='')}")
        return view

    def retry(self, task_id: str) -> Task:
        """Run again, as a new task, what a finished one was asked.

        Raises:
          TaskNotFound: there is no such task.
          WrongState: it is not over.
          PayloadGone: what it was asked was not kept.
        """
        answer = self._call("POST", f"/tasks/{quote(task_id, safe='')}/retry")
        return Task(self, answer["task_id"])

    # -- Many tasks -------------------------------------------------------------------------------

    def stream(self, items: Iterable[Request | Task | str]) -> Iterator[Result]:
        """Yield results as they arrive, over one connection.

        A task that fails does not end the stream: its result has an `error`.

        Args:
          items: requests to submit, and tasks (or their ids) that were submitted already; taken
            from the iterable as earlier ones end.

        Raises:
          PlatformUnreachable: nothing answers there.
          ServingError: the connection was lost.
        """
        waiting = iter(items)
        numbers = count()
        #: Sent, and not accepted yet, by our own reference.
        sent: dict[str, Request] = {}
        #: Accepted, by task id: several may be the same task.
        accepted: dict[str, list[Request | None]] = {}
        #: Tasks that were told of: the platform does so once on each connection.
        told: set[str] = set()
        with closing(self._connect()) as socket:
            while True:
                taken = 0
                for item in islice(waiting, STREAM_WINDOW - len(sent) - len(accepted)):
                    taken += 1
                    if isinstance(item, Request):
                        ref = str(next(numbers))
                        sent[ref] = item
                        message: dict[str, Any] = {
                            "type": "submit",
                            "id": ref,
                            **self._body(item),
                        }
                        if item.idempotency_key is not None:
                            message["idempotency_key"] = item.idempotency_key
                    else:
                        task_id = item.id if isinstance(item, Task) else item
                        if task_id in told:
                            yield self._told(task_id, None)
                            continue
                        accepted.setdefault(task_id, []).append(None)
                        message = {"type": "subscribe", "task_ids": [task_id]}
                    self._send(socket, message)
                if not sent and not accepted:
                    if taken:
                        continue
                    return
                message = self._receive(socket)
                kind = message["type"]
                data: Any = message.get("data")
                if kind == "accepted" and message.get("id") in sent:
                    task_id, request = data["task_id"], sent.pop(message["id"])
                    if task_id in told:
                        yield self._told(task_id, request)
                    else:
                        accepted.setdefault(task_id, []).append(request)
                elif kind in ("result", "error") and message.get("task_id") in accepted:
                    task_id = message["task_id"]
                    told.add(task_id)
                    for each in accepted.pop(task_id):
                        if isinstance(data["status"], str):
                            yield _result(data, each)
                        else:
                            # There is no such task, or its result is gone.
                            yield _without_task(data, task_id, each)
                elif kind == "error" and message.get("id") in sent:
                    yield _without_task(data, "", sent.pop(message["id"]))
                elif kind == "error":
                    raise rebuild(data)

    def _told(self, task_id: str, request: Request | None) -> Result:
        """Return the result of a task that has been told of already."""
        try:
            return _result(self.task(task_id), request)
        except InfernoError as exc:
            return _without_task(exc.problem(), task_id, request)

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
        letter: dict[str, Any] = self._call("GET", f"/dead/{quote(task_id, safe='')}")
        return letter

    def count_dead_letters(self) -> int:
        """Return how many dead letters there are."""
        count: int = self._call("GET", "/dead", params={"limit": "1"})["count"]
        return count

    def replay(self, task_id: str) -> Task:
        """Run a dead task again, as a new task, and discard its letter.

        Raises:
          TaskNotFound: there is no such letter.
          ModelNotFound: its model is gone.
        """
        answer = self._call("POST", f"/dead/{quote(task_id, safe='')}/replay")
        return Task(self, answer["task_id"])

    def replay_all(self, *, model: str | None = None) -> dict[str, Any]:
        """Run all dead tasks again, or those of one model.

        Returns:
          `replayed` and `left`, how many were and were not, and `tasks`, the new ones.
        """
        params = {} if model is None else {"model": model}
        answer: dict[str, Any] = self._call("POST", "/dead/replay", params=params, wait_s=MANY_S)
        return answer

    def discard(self, task_id: str) -> None:
        """Delete a dead letter.

        Raises:
          TaskNotFound: there is none.
        """
        self._call("DELETE", f"/dead/{quote(task_id, safe='')}")

    def discard_all(self, count: int) -> None:
        """Delete all dead letters.

        Args:
          count: how many there are.

        Raises:
          NotConfirmed: there are more or fewer.
        """
        self._call("DELETE", "/dead", params={"confirm": str(count)})

    # -- Lanes ------------------------------------------------------------------------------------

    def lanes(self) -> list[dict[str, Any]]:
        """Return how much is in each lane: `model`, `waiting`, `held`, `delayed` and `paused`."""
        lanes: list[dict[str, Any]] = self._call("GET", "/lanes")["lanes"]
        return lanes

    def lane(self, model: str) -> dict[str, Any]:
        """Return how much is in the lane of one model.

        Raises:
          ModelNotFound: there is none of this name.
        """
        lane: dict[str, Any] = self._call("GET", f"/lanes/{quote(model, safe='')}")
        return lane

    def pause(self, model: str) -> None:
        """Hand out nothing more of a lane; tasks are accepted, and those in workers' hands end."""
        self._call("POST", f"/lanes/{quote(model, safe='')}/pause")

    def resume(self, model: str) -> None:
        """Hand out a paused lane again."""
        self._call("POST", f"/lanes/{quote(model, safe='')}/resume")

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
        answer = self._call("POST", path, params={"confirm": str(count)}, wait_s=MANY_S)
        cancelled: int = answer["cancelled"]
        return cancelled

    # -- The cache --------------------------------------------------------------------------------

    def cache(self) -> dict[str, Any]:
        """Return how many results are kept, and what that has saved."""
        found: dict[str, Any] = self._call("GET", "/cache")
        return found

    def clear_cache(self, model: str | None = None) -> int:
        """Forget the kept results, of one model or of all.

        Returns:
          how many there were.
        """
        params = {} if model is None else {"model": model}
        cleared: int = self._call("DELETE", "/cache", params=params)["cleared"]
        return cleared

    # -- The platform -----------------------------------------------------------------------------

    def models(self) -> list[dict[str, Any]]:
        """Return the models of the platform: `name`, `active`, `versions`, `ready` and more."""
        models: list[dict[str, Any]] = self._call("GET", "/v1/models")["models"]
        return models

    def model(self, name: str) -> dict[str, Any]:
        """Return one model.

        Raises:
          ModelNotFound: there is none of this name.
        """
        model: dict[str, Any] = self._call("GET", f"/v1/models/{quote(name, safe='')}")
        return model

    # -- Versions ---------------------------------------------------------------------------------

    def active(self, model: str) -> dict[str, Any]:
        """Return which versions answer who names none: `version`, `shares`, `loaded` and more.

        Raises:
          ModelNotFound: there is none of this name.
        """
        active: dict[str, Any] = self._call("GET", f"/v1/models/{quote(model, safe='')}/active")
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
        answer: dict[str, Any] = self._call(
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
        answer: dict[str, Any] = self._call("POST", "/v1/models:load", body, wait_s=MANY_S)
        return answer

    def unload(self, model: str, version: int | None = None) -> None:
        """Take a version, by default all of them, out of service and of the workers' memory."""
        self._call("POST", "/v1/models:unload", {"name": model, "version": version}, wait_s=MANY_S)

    # -- The platform itself ----------------------------------------------------------------------

    def health(self) -> dict[str, Any]:
        """Return how the platform is, also when it is not well.

        Raises:
          PlatformUnreachable: nothing answers there.
        """
        with self._translating():
            answer = self._http.get("/health", timeout=HEALTH_S)
        health: dict[str, Any] = _content(answer)
        return health

    # -- Inside -----------------------------------------------------------------------------------

    def _body(self, request: Request) -> dict[str, Any]:
        """Return the body of a submit."""
        inputs = request.inputs
        if isinstance(inputs, np.ndarray):
            inputs = self._named(request.model, inputs)
        if isinstance(inputs, Mapping):
            wire: Any = {
                name: self._write(request.model, name, value) for name, value in inputs.items()
            }
        else:
            wire = _plain(inputs)
        body = {"model": request.model, "inputs": wire}
        if isinstance(inputs, bytes):
            body["input_type"] = "image"
        return body | request.options()

    def _named(self, model: str, inputs: Any) -> Mapping[str, Any]:
        """Return inputs by name; a value alone goes to the input that can hold it."""
        if isinstance(inputs, Mapping):
            return inputs
        kind = "image" if isinstance(inputs, bytes) else None
        return {name: inputs for name in self._signature(model).assign(_plain(inputs), kind)}

    def _write(self, model: str, name: str, value: Any) -> Any:
        """Write one input, numeric arrays as base64 in the form that the model declares."""
        if not isinstance(value, np.ndarray) or value.dtype.kind not in "biuf":
            return _plain(value)
        # What does not fit is sent as it is: the platform says best what is wrong with it.
        with suppress(ModelNotFound):
            for spec in self._signature(model).inputs:
                if spec.name == name:
                    value = _conformed(value, spec)
        return tensors.encode(value, value.dtype.name, "base64")

    def _signature(self, model: str) -> Signature:
        if model not in self._signatures:
            self._signatures[model] = Signature.model_validate(self.model(model)["signature"])
        return self._signatures[model]

    def _pages(
        self, path: str, name: str, chosen: Mapping[str, str | None]
    ) -> Iterator[dict[str, Any]]:
        """Yield the items of a list, page by page."""
        params = {"limit": str(PAGE), **{key: value for key, value in chosen.items() if value}}
        while True:
            page = self._call("GET", path, params=params)
            yield from page[name]
            if page["next"] is None:
                return
            params["cursor"] = page["next"]

    def _call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        wait_s: float = 0.0,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> Any:
        """Send a request and return the content of its answer, or raise the error that it is.

        Args:
          method: of HTTP.
          path: of the route.
          body: to be sent as JSON; None for none.
          wait_s: how long the platform may wait before it answers.
          headers: besides those of the body.
          params: of the query.
        """
        with self._translating():
            answer = self._http.request(
                method,
                path,
                content=None if body is None else json.dumps(body),
                headers={"Content-Type": "application/json", **(headers or {})},
                params=params,
                timeout=ANSWER_S + wait_s,
            )
        content = _content(answer)
        if answer.is_error:
            raise rebuild(content, answer.status_code)
        return content

    def _connect(self) -> websocket.WebSocket:
        address = "ws" + self.url.removeprefix("http") + "/ws"
        with self._translating():
            return websocket.create_connection(address, timeout=SILENCE_S)

    def _send(self, socket: websocket.WebSocket, message: Mapping[str, Any]) -> None:
        with self._translating():
            socket.send(json.dumps(message))

    def _receive(self, socket: websocket.WebSocket) -> dict[str, Any]:
        with self._translating():
            opcode, data = socket.recv_data()
        if opcode == websocket.ABNF.OPCODE_CLOSE:
            # A code of two bytes, then the reason.
            reason = data[2:].decode(errors="replace") or "it did not say why"
            raise ServingError(f"{self.url} closed the connection: {reason}")
        message: dict[str, Any] = json.loads(data)
        return message

    @contextmanager
    def _translating(self) -> Iterator[None]:
        """Turn what the libraries raise into errors of ours."""
        try:
            yield
        except _UNREACHABLE:
            raise PlatformUnreachable(
                f"nothing answers at {self.url}; is the platform running?"
            ) from None
        except httpx.InvalidURL as exc:
            raise ServingError(f"{self.url}: {exc}") from None
        except (httpx.HTTPError, websocket.WebSocketException, OSError) as exc:
            reason = str(exc) or type(exc).__name__
            raise ServingError(f"the connection to {self.url} failed: {reason}") from exc


def _key_header(key: str | None) -> dict[str, str]:
    """Write an idempotency key as the string of a structured field."""
    if key is None:
        return {}
    if not (key.isascii() and key.isprintable()):
        raise InvalidRequest(f"expected printable ASCII, got {key!r}", "idempotency_key")
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    return {"Idempotency-Key": f'"{escaped}"'}


def rebuild(problem: Any, status: int = 500) -> InfernoError:
    """Make the error that a problem object describes.

    Args:
      problem: as `InfernoError.problem` returns it, or whatever came instead.
      status: of the HTTP answer, for a problem that does not name itself.
    """
    body = problem if isinstance(problem, Mapping) else {}
    fallback = RequestError if status < 500 else ServingError
    kind = _KINDS.get(body.get("code"), fallback)
    detail = body.get("detail") or body.get("title") or f"status {status} without an explanation"
    return kind(str(detail), body.get("field"))


def _kinds(base: type[InfernoError]) -> Iterator[tuple[str, type[InfernoError]]]:
    for kind in base.__subclasses__():
        # A subclass that does not name itself is told apart from its parent by nothing.
        if "code" in vars(kind):
            yield kind.code, kind
        yield from _kinds(kind)


#: The errors by their `code`.
_KINDS: dict[Any, type[InfernoError]] = dict(_kinds(InfernoError))


def _content(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        where = f"{answer.url.scheme}://{answer.url.netloc.decode()}"
        raise ServingError(
            f"{where} answered with status {answer.status_code} and no JSON; it is no Inferno"
        ) from None


def _result(view: Mapping[str, Any], request: Request | None = None) -> Result:
    """Read a task that is over."""
    status = TaskState(view["status"])
    outputs = view.get("outputs") or {}
    return Result(
        task_id=view["task_id"],
        model=view.get("model", ""),
        version=view.get("version"),
        status=status,
        outputs={
            name: tensors.decode(value, value["dtype"], name) for name, value in outputs.items()
        },
        error=None if status is TaskState.SUCCEEDED else rebuild(view.get("error")),
        raw=view,
        request=request,
    )


def _without_task(problem: Any, task_id: str, request: Request | None) -> Result:
    """Make the result of what the platform could not find, or never accepted."""
    return Result(
        task_id=task_id,
        model=request.model if request else "",
        version=request.version if request else None,
        status=TaskState.FAILED,
        outputs={},
        error=rebuild(problem),
        raw=problem,
        request=request,
    )


def _conformed(array: Array, spec: TensorSpec) -> Array:
    """Give an array the dtype of an input, where no value changes but by rounding, and its rows."""
    dtype = NUMERIC.get(spec.dtype)
    if dtype is not None and np.can_cast(array.dtype, dtype, "same_kind"):
        converted = array.astype(dtype)
        if dtype.kind == "f" or np.array_equal(converted, array):
            array = converted
    is_one_row = spec.batched and array.ndim == len(spec.shape) - 1
    return array[np.newaxis] if is_one_row else array


def _plain(value: Any) -> Any:
    """Write one input as JSON's own kinds."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
