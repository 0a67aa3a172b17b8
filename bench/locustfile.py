"""Load by Locust, with or without its web page: `locust -f bench/locustfile.py`.

Two kinds of users call the platform over HTTP: one waits for its result in the call (`--tags
predict`), the other submits and fetches the result by the task's id (`--tags submit`). Of a hundred
requests, 70 have normal inputs, 20 have mutated inputs, which are unusual but valid, and 10 have
odd inputs, which are invalid and must be refused with a status of 400 to 499.

A refusal with 429 means too much load. It is counted on its own line and is not a failure.
"""

from __future__ import annotations

import copy
import json
import random
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import httpx
from locust import FastHttpUser, between, events, tag, task
from locust.env import Environment
from locust.exception import StopTest
from locust.runners import WorkerRunner

#: Body of a predict.
Body = dict[str, Any]

#: How long one call waits for a submitted task, in seconds.
WAIT_S = 30
#: Mutated and odd inputs of a hundred; the rest are normal.
MUTATED_PERCENT, ODD_PERCENT = 20, 10

SENTENCES = (
    "What a lovely day!",
    "The soup was cold, and so was the waiter.",
    "I would not watch it again.",
    "Nothing about the plot makes sense, yet I could not look away.",
    "Fine.",
    "It arrived two weeks late, in three pieces.",
)


@events.init_command_line_parser.add_listener
def add_arguments(parser: ArgumentParser) -> None:
    """Add options to Locust's command line and page."""
    # Locust's page shows this address at first.
    parser.set_defaults(host="http://127.0.0.1:8000")
    own = parser.add_argument_group("Inferno")
    own.add_argument("--model-name", default="sentiment", help="Model to call")
    own.add_argument("--model-version", type=int, help="Version to call (default: the active one)")
    own.add_argument(
        "--load-model",
        action="store_true",
        help="Load the version before the load starts; stop if that fails",
    )
    own.add_argument("--warmup", type=int, default=0, help="Uncounted requests before the start")
    own.add_argument(
        "--verify-response",
        action="store_true",
        help="Count an answer without any output tensor as a failure",
    )
    own.add_argument(
        "--payload-file",
        type=Path,
        help="JSON file with the body to send (default: the model's example)",
    )
    own.add_argument(
        "--request-timeout", type=float, default=60.0, help="Limit of one request, in seconds"
    )
    own.add_argument("--mutated-percent", type=float, default=MUTATED_PERCENT)
    own.add_argument("--odd-percent", type=float, default=ODD_PERCENT)


class Inputs:
    """Varies one valid body."""

    def __init__(self, body: Body, seed: int | None = None) -> None:
        """Store a valid body."""
        self._body = body
        self._random = random.Random(seed)

    def normal(self) -> Body:
        """Return the body with other texts."""
        return self._changed(lambda _: self._sentence())

    def mutated(self) -> Body:
        """Return a valid but unusual body: noise in its texts, any priority."""
        body = self._changed(self._noisy)
        body["priority"] = self._random.randint(0, 9)
        return body

    def odd(self) -> Any:
        """Return an invalid body, wrong in one of several ways."""
        body = copy.deepcopy(self._body)
        name = self._random.choice(list(body["inputs"]))
        wrongs: list[Callable[[], Any]] = [
            lambda: {},
            lambda: [body],
            lambda: body | {"inputs": {}},
            lambda: body | {"inputs": {**body["inputs"], "no such input": 1}},
            lambda: body | {"inputs": {name: {"dtype": "complex64", "shape": [1], "data": [1]}}},
            lambda: body | {"inputs": {name: {"dtype": "float32", "shape": [3], "data": [1.0]}}},
            lambda: body | {"outputs": ["no such output"]},
            lambda: body | {"priority": 10},
            lambda: body | {"timeout_ms": -1},
            lambda: body | {"version": 10**6},
        ]
        return self._random.choice(wrongs)()

    def _sentence(self) -> str:
        # The number makes each text unique, so the cache does not answer.
        return f"{self._random.choice(SENTENCES)} {self._random.randrange(10**6)}"

    def _noisy(self, _: str) -> str:
        text = list(self._sentence() * self._random.choice((1, 1, 5)))
        for _place in range(len(text) // 4):
            at = self._random.randrange(len(text))
            text[at] = self._random.choice((text[at].swapcase(), "", "\N{FIRE}", "\t", "é"))
        return "".join(text)

    def _changed(self, change: Callable[[str], str]) -> Body:
        body = copy.deepcopy(self._body)
        for name, value in body["inputs"].items():
            # A string without spaces may be base64 of a picture.
            if isinstance(value, str) and " " in value:
                body["inputs"][name] = change(value)
        return body


def read_body(environment: Environment) -> Body:
    """Return the body of the file, or the platform's example for the model.

    Raises:
      ValueError: the body has no inputs by name.
      OSError, httpx.HTTPError: the file or the platform cannot be read.
    """
    options = environment.parsed_options
    assert options is not None
    if options.payload_file is not None:
        body = json.loads(options.payload_file.read_text())
    else:
        model = httpx.get(f"{environment.host}/v1/models/{options.model_name}", timeout=30)
        body = model.raise_for_status().json()["example"]
    if not isinstance(body, dict) or not isinstance(body.get("inputs"), dict):
        raise ValueError('the payload: expected {"inputs": {<name>: ...}}')
    body.pop("model", None)
    if options.model_version is not None:
        body["version"] = options.model_version
    return body


@events.test_start.add_listener
def prepare(environment: Environment, **_: object) -> None:
    """Read the body, and warm the model up before requests are counted.

    Raises:
      StopTest: a step failed.
    """
    options = environment.parsed_options
    assert options is not None
    try:
        Caller.inputs = Inputs(read_body(environment))
        # With several processes, the master warms up.
        if not isinstance(environment.runner, WorkerRunner):
            warm_up(environment, options.warmup, options.load_model)
    except (OSError, ValueError, httpx.HTTPError) as exc:
        environment.process_exit_code = 1
        raise StopTest(f"{type(exc).__name__}: {exc}") from exc


def warm_up(environment: Environment, requests: int, is_loaded: bool) -> None:
    """Send uncounted requests.

    Args:
      environment: Locust's environment.
      requests: number of requests.
      is_loaded: whether the model must be loaded. Then at least one request is sent, because a
        version that is not in memory loads for its first task.

    Raises:
      httpx.HTTPError: a request did not succeed.
    """
    options = environment.parsed_options
    assert options is not None
    for _ in range(max(requests, int(is_loaded))):
        httpx.post(
            f"{environment.host}/v1/models/{options.model_name}:predict",
            json=Caller.inputs.normal(),
            timeout=options.request_timeout,
        ).raise_for_status()


class Caller(FastHttpUser):
    """A user who calls, pauses for a moment, and calls again."""

    wait_time = between(0.01, 0.1)
    inputs: ClassVar[Inputs]

    def __init__(self, environment: Environment) -> None:
        options = environment.parsed_options
        assert options is not None
        self.connection_timeout = self.network_timeout = options.request_timeout
        super().__init__(environment)
        self._options = options

    @tag("predict")
    @task
    def predict(self) -> None:
        """Call predict."""
        kind, body = self._draw()
        self._call("POST", f"/v1/models/{self._options.model_name}:predict", "predict", kind, body)

    @tag("submit")
    @task
    def submit(self) -> None:
        """Submit, and fetch the result by the task's id."""
        kind, body = self._draw()
        if isinstance(body, dict):
            body = {"model": self._options.model_name, **body}
        accepted = self._call("POST", "/infer", "submit", kind, body)
        if accepted is not None:
            path = f"/tasks/{accepted['task_id']}?wait={WAIT_S}"
            self._call("GET", path, "result", kind)

    def _draw(self) -> tuple[str, Any]:
        """Draw a kind of input, and return it with a body."""
        drawn = random.uniform(0, 100)
        if drawn < self._options.odd_percent:
            return "odd", self.inputs.odd()
        if drawn < self._options.odd_percent + self._options.mutated_percent:
            return "mutated", self.inputs.mutated()
        return "normal", self.inputs.normal()

    def _call(self, method: str, path: str, name: str, kind: str, body: Any = None) -> Any:
        """Send a request and judge the answer; return the document of a valid one."""
        with self.client.request(
            method, path, name=f"{name}, {kind}", json=body, catch_response=True
        ) as answer:
            status = answer.status_code
            if status == 429:
                answer.request_meta["name"] += ", refused"
                answer.success()
            elif kind == "odd":
                if 400 <= status < 500:
                    answer.success()
                else:
                    answer.failure(f"status {status}, expected 400 to 499: {answer.text}")
            elif status not in (200, 202):
                answer.failure(f"status {status}: {answer.text}")
            else:
                document = answer.json()
                if self._options.verify_response and status == 200 and not document.get("outputs"):
                    answer.failure(f"there are no outputs: {answer.text}")
                else:
                    answer.success()
                    return document
        return None
