"""Pages of other sites in a real browser: they change nothing and read nothing, unless allowed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page

from inferno.client import Client
from inferno.testing.platform import Platform
from inferno.testing.processes import web
from tests.e2e.chromium import chromium

#: A name that attackers let resolve to this machine.
REBOUND = "evil.example"

#: What a page can send without asking first, beside submitting: `TASK` waits in its lane.
CHANGES = [
    ("/infer", '{"model": "echo", "inputs": "from a foreign page"}'),
    ("/v1/models/echo:predict", '{"inputs": {"text": "from a foreign page"}}'),
    ("/v2/models/echo/infer", '{"inputs": []}'),
    ("/v1/models:unload", '{"name": "digits", "version": 1}'),
    ("/v2/repository/models/digits/unload", "{}"),
    ("/lanes/mock/pause", ""),
    ("/lanes/echo/resume", ""),
    ("/lanes/echo/purge?confirm=1", ""),
    ("/tasks/TASK/cancel", ""),
    ("/dead/replay?all=true", ""),
]

#: Sends each change in each way that needs no permission; returns how many were sent.
ATTACK = """async ([url, changes]) => {
  let sent = 0;
  for (const [path, body] of changes) {
    for (const kind of ["text/plain", "application/x-www-form-urlencoded"]) {
      const headers = {"Content-Type": kind};
      const options = {method: "POST", mode: "no-cors", headers, body};
      await fetch(url + path, options).catch(() => {});
      sent += 1;
    }
    navigator.sendBeacon(url + path, body);
    sent += 1;
  }
  return sent;
}"""

#: Posts a form into a frame.
FORM = """([url, body]) => {
  const frame = document.createElement("iframe");
  frame.name = `target-${document.forms.length}`;
  document.body.append(frame);
  const form = document.createElement("form");
  Object.assign(form, {action: url, method: "POST", enctype: "text/plain", target: frame.name});
  const field = document.createElement("input");
  const [name, value] = body.split("=");
  Object.assign(field, {type: "hidden", name, value});
  form.append(field);
  document.body.append(form);
  form.submit();
}"""

#: Returns whether a WebSocket opened, and the first answer to a message.
SOCKET = """([url, message]) => new Promise((done) => {
  const socket = new WebSocket(url);
  socket.onopen = () => socket.send(message);
  socket.onmessage = (event) => { socket.close(); done(event.data); };
  socket.onerror = () => done(null);
})"""

#: Returns what a page learns of an address in each way that it can include one.
READ = """async (url) => {
  const seen = {};
  await fetch(url).then((r) => r.text()).then((t) => { seen.fetch = t; }, () => {});
  const include = (tag, how) => new Promise((done) => {
    const element = document.createElement(tag);
    element.onload = () => { seen[tag] = true; done(); };
    element.onerror = () => done();
    how(element);
    document.body.append(element);
  });
  await include("script", (e) => { e.src = url; });
  await include("img", (e) => { e.src = url; });
  await include("link", (e) => { e.rel = "stylesheet"; e.href = url; });
  await new Promise((done) => {
    const events = new EventSource(url);
    events.onopen = () => { seen.events = true; };
    events.onerror = () => { events.close(); done(); };
  });
  return seen;
}"""

#: Calls as an application of an allowed site would.
USE = """async (url) => {
  const submitted = await fetch(url + "/infer", {
    method: "POST",
    headers: {
      "Content-Type": "application/json", "Idempotency-Key": '"once"', "Prefer": "wait=0",
      "Inferno-Version": "1", "Cache-Control": "no-cache",
    },
    body: JSON.stringify({model: "echo", inputs: "from an allowed page"}),
  });
  const task = await submitted.json();
  const done = await (await fetch(`${url}/tasks/${task.task_id}?wait=30`)).json();
  const deleted = await fetch(`${url}/cache?model=echo`, {method: "DELETE"});
  const missing = await fetch(url + "/tasks/none");
  return {
    location: submitted.headers.get("Location"),
    status: done.status,
    deleted: deleted.status,
    missing: (await missing.json()).code,
  };
}"""


class Hostile(BaseHTTPRequestHandler):
    """Serves an empty page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><body>")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The origin of another site; a browser takes it for the same site, but not the same origin."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Chromium asks before a page of the internet may call this machine; other browsers do not.
    alone = "--disable-features=LocalNetworkAccessChecks"
    with chromium(f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1", alone) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, site: str) -> Iterator[Page]:
    """A page of the other site."""
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(site)
        yield page


@pytest.fixture
def unharmed(platform: Platform) -> Iterator[str]:
    """A task that waits in its lane, beside everything that must be the same after the test."""
    with Client(platform.url) as client, httpx.Client(base_url=platform.url) as http:
        http.post("/lanes/echo/pause").raise_for_status()
        try:
            task = client.submit("echo", "waiting")
            before = state(http)
            assert before["lanes"]["echo"]["paused"]
            yield task.id
            assert state(http) == before
        finally:
            http.post("/lanes/echo/resume").raise_for_status()
        task.result()


def state(http: httpx.Client) -> dict[str, Any]:
    """Return what the changes would change."""
    lanes = {lane["model"]: lane for lane in http.get("/lanes").json()["lanes"]}
    models = {
        model["name"]: model.get("loaded_versions")
        for model in http.get("/models").json()["models"]
    }
    tasks = [(task["task_id"], task["status"]) for task in http.get("/tasks").json()["tasks"]]
    return {"lanes": lanes, "models": models, "tasks": tasks, "dead": http.get("/dead").json()}


def changes(task_id: str) -> list[tuple[str, str]]:
    return [(path.replace("TASK", task_id), body) for path, body in CHANGES]


def statuses(page: Page) -> list[int]:
    """Collect the status of each answer from now on, also of those that the browser withholds."""
    seen: list[int] = []
    devtools = page.context.new_cdp_session(page)
    devtools.send("Network.enable")
    devtools.on("Network.responseReceivedExtraInfo", lambda event: seen.append(event["statusCode"]))
    return seen


def wait_for_answers(page: Page, seen: list[int], count: int) -> None:
    """Wait until the browser has reported a number of answers."""
    end = time.monotonic() + 30
    while len(seen) < count and time.monotonic() < end:
        page.wait_for_timeout(20)  # Events arrive meanwhile.
    assert len(seen) == count, seen


def test_no_way_of_posting_changes_anything(page: Page, platform: Platform, unharmed: str) -> None:
    seen = statuses(page)
    sent = page.evaluate(ATTACK, [platform.url, changes(unharmed)])
    assert sent == 3 * len(CHANGES)
    wait_for_answers(page, seen, sent)
    for path, body in (
        ("/lanes/mock/pause", "a=b"),
        ("/infer", '{"model": "echo", "inputs": "="}'),
    ):
        page.evaluate(FORM, [platform.url + path, body])
        sent += 1
        wait_for_answers(page, seen, sent)
    assert seen == sent * [403]


def test_flower_is_not_driven(page: Page, platform: Platform) -> None:
    flower = httpx.Client(base_url=platform.flower_url)
    workers = flower.get("/api/workers", params={"refresh": "true"}).json()
    seen = statuses(page)
    paths = [(f"/api/worker/shutdown/{name}", "") for name in workers]
    page.evaluate(ATTACK, [platform.flower_url, paths])
    assert set(seen) == {403}
    assert page.evaluate(READ, platform.flower_url + "/api/workers") == {}
    assert flower.get("/api/workers", params={"refresh": "true"}).json().keys() == workers.keys()


def test_socket_does_not_open(page: Page, platform: Platform, unharmed: str) -> None:
    url = platform.url.replace("http", "ws")
    cancel = f'{{"type": "cancel", "id": 1, "task_id": "{unharmed}"}}'
    submit = '{"type": "submit", "id": 1, "model": "echo", "inputs": "from a foreign page"}'
    for message in (cancel, submit):
        assert page.evaluate(SOCKET, [url + "/ws", message]) is None
    assert page.evaluate(SOCKET, [f"{url}/v1/ws/{unharmed}", ""]) is None


@pytest.mark.parametrize("path", ["/tasks", "/openapi.json", "/static/front.js", "/health/live"])
def test_nothing_is_read(page: Page, platform: Platform, path: str) -> None:
    assert page.evaluate(READ, platform.url + path) == {}


def test_included_address_is_not_even_looked_up(page: Page, platform: Platform) -> None:
    # Asking for a model can load it, and asking for a task can wait.
    seen = statuses(page)
    page.evaluate(READ, platform.url + "/v1/models/digits")
    wait_for_answers(page, seen, 5)
    assert set(seen) == {403}


@pytest.mark.parametrize("path", ["/", "/docs", "flower"])
def test_no_page_is_framed(page: Page, platform: Platform, path: str) -> None:
    url = platform.flower_url if path == "flower" else platform.url + path
    page.evaluate(
        """(url) => new Promise((done) => {
          const frame = document.createElement("iframe");
          frame.onload = () => done();
          frame.src = url;
          document.body.append(frame);
        })""",
        url,
    )
    page.frames[1].wait_for_url("chrome-error:**")


def test_sandboxed_page_changes_nothing(page: Page, platform: Platform, unharmed: str) -> None:
    # Its origin is "null".
    with page.expect_console_message(lambda message: "NotSameOrigin" in message.text):
        page.evaluate(
            """(url) => {
              const frame = document.createElement("iframe");
              frame.sandbox = "allow-scripts";
              frame.srcdoc = `<script>
                fetch("${url}/lanes/mock/pause", {method: "POST", mode: "no-cors"});
              </` + `script>`;
              document.body.append(frame);
            }""",
            platform.url,
        )


def test_rebound_name_is_not_answered(browser: Browser, platform: Platform, unharmed: str) -> None:
    # Given a page whose name resolved to the attacker's server when it was loaded
    own = f"http://{REBOUND}:{urlsplit(platform.url).port}"
    with browser.new_context() as context:
        page = context.new_page()
        page.route(
            f"{own}/page",
            lambda route: route.fulfill(content_type="text/html", body="<!doctype html><body>"),
        )
        page.goto(f"{own}/page")
        # When the name then resolves to this machine, so that the platform is of its own origin
        seen = statuses(page)
        read = page.evaluate(
            """async () => {
              const answer = await fetch("/tasks");
              return [answer.status, (await answer.json()).code];
            }"""
        )
        page.evaluate(ATTACK, [own, changes(unharmed)])
        socket = page.evaluate(SOCKET, [own.replace("http", "ws") + "/ws", "{}"])
        front = page.goto(f"{own}/")
    # Then it gets nothing
    assert read == [421, "misdirected"]
    assert set(seen) == {421}
    assert socket is None
    assert front is not None
    assert front.status == 421


def test_allowed_page_may_do_everything(
    page: Page, platform: Platform, site: str, log: Any
) -> None:
    env = platform.env | {"INFERNO_SERVER__CORS_ORIGINS": f"https://app.example,{site}"}
    env.pop("INFERNO_SERVER__PORT")
    with web(env, log) as address:
        used = page.evaluate(USE, f"http://{address}")
        answer = page.evaluate(SOCKET, [f"ws://{address}/ws", '{"type": "ping", "id": 7}'])
    assert '"pong"' in answer
    assert used.pop("location").startswith("/tasks/")
    assert used == {"status": "succeeded", "deleted": 200, "missing": "task_not_found"}
