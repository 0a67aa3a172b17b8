"""The command as people type it: in this process, or on a terminal where it runs others."""

import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from click.testing import CliRunner, Result

from inferno.cli.main import main
from inferno.operate.ports import free_port
from inferno.testing.processes import ROOT
from tests.integration.client.test_client import ScriptedPlatform, platform  # noqa: F401

#: Stands in for the web tier: says that the models are ready whose worker has made its file.
WEB = """
import http.server, json, os, pathlib, ssl

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        names = sorted(path.name for path in pathlib.Path("models").iterdir())
        models = [{"name": n, "ready": pathlib.Path(f"{n}.up").exists()} for n in names]
        body = json.dumps({"models": models}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass

port = int(os.environ["INFERNO_SERVER__PORT"])
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
if certificate := os.environ.get("INFERNO_SERVER__CERTFILE"):
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, os.environ["INFERNO_SERVER__KEYFILE"])
    server.socket = tls.wrap_socket(server.socket, server_side=True)
server.serve_forever()
"""

MANIFEST = """\
name: {name}
version: 1
format: python
entrypoint: model:build
description: For tests.
signature:
  inputs:
  - {{name: text, dtype: string, shape: [batch]}}
  outputs:
  - {{name: text, dtype: string, shape: [batch]}}
{more}
"""


class Project:
    """A directory like Inferno's own, with small stand-ins for its processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = free_port()
        (root / "celeryconfig.py").touch()
        (root / "web.py").write_text(WEB)
        (root / "worker.sh").write_text(
            'test "$INFERNO_WORKER__MODEL_NAME" != broken || { echo cannot load; exit 3; }\n'
            'echo "$INFERNO_REDIS__URL" > "$INFERNO_WORKER__MODEL_NAME.up"\n'
            "exec sleep 600\n"
        )
        (root / "Procfile").write_text(
            f"web: {sys.executable} web.py\nworker: sh worker.sh\nflower: sleep 600\n"
        )
        self.environment = {
            "INFERNO_SERVER__PORT": str(self.port),
            "INFERNO_FLOWER__PORT": str(free_port()),
            "INFERNO_WORKER__GRACE_S": "5",
        }

    def add_model(self, name: str, more: str = "") -> Path:
        folder = self.root / "models" / name / "1"
        folder.mkdir(parents=True)
        (folder / "model.yaml").write_text(MANIFEST.format(name=name, more=more))
        return folder

    def start(self, *arguments: str, through: tuple[str, ...] = ()) -> "Terminal":
        return Terminal([*through, command(), *arguments], self.root, self.environment)


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
        self.shown = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            # Tests that run in the background of a shell have inherited that it is ignored.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.chdir(folder)
            os.execvpe(arguments[0], arguments, {**os.environ, **environment, "TERM": "dumb"})

    def wait_for(self, text: str, timeout_s: float = 40) -> None:
        end = time.monotonic() + timeout_s
        while text not in self.shown:
            assert time.monotonic() < end, f"no {text!r} in:\n{self.shown}"
            assert self._read(), f"ended without {text!r}:\n{self.shown}"

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def exit_code(self, timeout_s: float = 40) -> int:
        end = time.monotonic() + timeout_s
        while self._read():
            assert time.monotonic() < end, f"still runs:\n{self.shown}"
        status = os.waitpid(self.pid, 0)[1]
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGTERM)
            os.waitpid(self.pid, 0)
        os.close(self._fd)

    def _read(self) -> bool:
        if not select.select([self._fd], [], [], 0.2)[0]:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux's way to say that the other end is closed.
            return False
        self.shown += data.decode(errors="replace")
        return bool(data)


def command() -> str:
    return str(Path(sys.executable).with_name("inferno"))


def invoke(*arguments: str, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(main, list(arguments), input=stdin)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = Project(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, value in project.environment.items():
        monkeypatch.setenv(name, value)
    return project


@pytest.fixture
def up(project: Project) -> Iterator[Terminal]:
    """A platform of stand-ins with one model, started and ready."""
    project.add_model("echo")
    terminal = project.start("up")
    try:
        terminal.wait_for("Press Ctrl-C to stop.")
        yield terminal
    finally:
        terminal.close()


# -- Serving ---------------------------------------------------------------------------------------


def test_up_shows_what_is_ready_and_how_to_use_it(project: Project, up: Terminal) -> None:
    url = f"http://127.0.0.1:{project.port}"

    assert f"Front page  {url}\r\n" in up.shown
    assert "Models      echo\r\n" in up.shown
    assert f"curl {url}/v1/models/echo:predict -d '{{" in up.shown
    assert (project.root / "echo.up").read_text().startswith("unix:///")


def test_up_knows_its_front_end_without_dns_and_without_trust(project: Project) -> None:
    project.add_model("echo")
    for name in ("own", "other"):
        command = f"openssl req -x509 -newkey ed25519 -nodes -subj /CN={name}".split()
        command += ["-keyout", str(project.root / f"{name}.key")]
        command += ["-out", str(project.root / f"{name}.crt")]
        subprocess.run(command, check=True, capture_output=True)
    project.environment |= {
        "INFERNO_SERVER__HOSTS": "nowhere.invalid",
        "INFERNO_SERVER__CERTFILE": str(project.root / "own.crt"),
        "INFERNO_SERVER__KEYFILE": str(project.root / "own.key"),
    }
    up = project.start("up")
    try:
        up.wait_for("Press Ctrl-C to stop.")
        assert f"Front page  https://nowhere.invalid:{project.port}\r\n" in up.shown
    finally:
        up.close()

    project.environment["INFERNO_SERVER__KEYFILE"] = str(project.root / "other.key")
    up = project.start("up")
    assert up.exit_code() == 1
    assert up.shown.startswith("Error: INFERNO_SERVER__CERTFILE=")


def test_up_shows_how_other_machines_reach_its_redis(project: Project) -> None:
    project.add_model("echo")
    port = free_port()
    project.environment |= {
        "INFERNO_REDIS__LISTEN": "127.0.0.1",
        "INFERNO_REDIS__PORT": str(port),
    }
    up = project.start("up")
    try:
        up.wait_for("Press Ctrl-C to stop.")
        (line,) = re.findall(r'export INFERNO_REDIS__URL=("redis://.*")\r\n', up.shown)
        url = subprocess.check_output(["sh", "-c", f"echo {line}"], text=True).strip()

        password = (project.root / "data" / "redis" / "password.txt").read_text().strip()
        assert url == f"redis://:{password}@127.0.0.1:{port}/0"
        assert password not in up.shown
        with redis.Redis.from_url(url) as client:
            assert client.ping()
    finally:
        up.close()


def test_taken_port_of_redis_is_said_before_anything_starts(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.add_model("echo")
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("INFERNO_REDIS__PORT", str(other.getsockname()[1]))
        result = invoke("up")

    assert result.exit_code == 1
    assert "set INFERNO_REDIS__PORT to another port" in result.stderr


def test_what_up_writes_can_be_read_by_its_user_only(project: Project, up: Terminal) -> None:
    data = project.root / "data"

    written = {str(path.relative_to(data)): path for path in data.rglob("*")}

    assert written.keys() > {"logs", "redis", "logs/worker-echo.log", "supervisor.lock"}
    open_to_others = [name for name, path in written.items() if path.stat().st_mode & 0o077]
    assert not open_to_others
    assert data.stat().st_mode & 0o077 == 0


def test_servers_that_others_can_reach_are_warned_of(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.add_model("echo")
    # The stand-ins listen on nothing else than before.
    project.environment |= {"INFERNO_SERVER__HOST": "0.0.0.0", "INFERNO_FLOWER__HOST": "::"}
    terminal = project.start("up")
    terminal.wait_for("Press Ctrl-C to stop.")

    assert f"Warning     The front end listens on 0.0.0.0, port {project.port}" in terminal.shown
    assert "Warning     Flower listens on ::, port " in terminal.shown
    assert terminal.shown.count("authenticates nobody") == 2
    terminal.close()


def test_servers_on_this_machine_are_not_warned_of(up: Terminal) -> None:
    assert "Warning" not in up.shown


def test_ctrl_c_stops_everything(project: Project, up: Terminal) -> None:
    up.type("\x03")

    assert up.exit_code() == 0
    assert up.shown.rstrip().endswith("Stopped.")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", project.port))


def test_ctrl_c_ends_make_without_an_error(project: Project) -> None:
    project.add_model("echo")
    (project.root / "Makefile").write_text(f"run:\n\t@exec {command()} up\n")
    terminal = Terminal(["make", "run"], project.root, project.environment)
    terminal.wait_for("Press Ctrl-C to stop.")

    terminal.type("\x03")

    assert terminal.exit_code() == 0
    assert "***" not in terminal.shown
    terminal.close()


def test_broken_packages_and_failing_workers_are_named(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.add_model("echo")
    project.add_model("broken")
    project.add_model("typo", more="formt: onnx")
    project.add_model("unprepared", more="artifact: model.onnx")
    terminal = project.start("up")

    terminal.wait_for("Press Ctrl-C to stop.", timeout_s=60)

    assert "Models      echo\r\n" in terminal.shown
    assert "typo: models/typo/1/model.yaml: formt: extra inputs" in terminal.shown
    assert "run `inferno models prepare unprepared` to make it" in terminal.shown
    assert terminal.shown.count("> cannot load") == 1
    assert "Failing     broken; see data/logs/worker-broken.log" in terminal.shown
    terminal.type("\x03")
    assert terminal.exit_code() == 0
    terminal.close()


def test_a_model_that_comes_later_gets_a_worker(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERNO_REPOSITORY__RECONCILE_INTERVAL_S", "0.1")
    project.add_model("echo")
    terminal = project.start("up")
    terminal.wait_for("Press Ctrl-C to stop.")

    project.add_model("late")

    terminal.wait_for("was added to the repository; its worker is starting")
    while not (project.root / "late.up").exists():
        terminal._read()
    terminal.type("\x03")
    assert terminal.exit_code() == 0
    terminal.close()


def test_up_serves_only_the_models_that_are_asked_for(project: Project) -> None:
    project.add_model("echo")
    project.add_model("broken")
    terminal = project.start("up", "--models", "echo", "--no-flower")

    terminal.wait_for("Press Ctrl-C to stop.")

    assert "broken" not in terminal.shown
    assert "Flower" not in terminal.shown
    terminal.type("\x03")
    assert terminal.exit_code() == 0
    terminal.close()


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_what_up_starts_leaves_the_cores_that_are_kept_for_passes(project: Project) -> None:
    kept, *others = sorted(os.sched_getaffinity(0))
    project.add_model("echo")
    project.environment["INFERNO_INFERENCE__CORES"] = str(kept)
    terminal = project.start("up")
    terminal.wait_for("Press Ctrl-C to stop.")

    children = Path(f"/proc/{terminal.pid}/task/{terminal.pid}/children").read_text().split()

    assert len(children) >= 4
    assert all(os.sched_getaffinity(int(pid)) == set(others) for pid in children)
    terminal.type("\x03")
    assert terminal.exit_code() == 0
    terminal.close()


def test_broker_that_is_away_is_one_clear_line(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.add_model("echo")
    monkeypatch.setenv("INFERNO_BROKER__URL", f"amqp://guest:password@127.0.0.1:{free_port()}//")

    result = invoke("up")

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: INFERNO_BROKER__URL: 127.0.0.1 cannot be reached: ")
    assert result.stderr.count("\n") == 1


def test_taken_port_is_one_clear_line(project: Project) -> None:
    project.add_model("echo")
    with socket.create_server(("127.0.0.1", project.port)):
        result = invoke("up")

    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: Port {project.port} on 127.0.0.1 is in use by process")
    assert result.stderr.count("\n") == 1


def test_second_platform_on_the_same_data_is_refused(project: Project, up: Terminal) -> None:
    result = invoke("up")

    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: The data directory {project.root}")


def test_unreachable_redis_is_said_before_anything_starts(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.add_model("echo")
    monkeypatch.setenv("INFERNO_REDIS__URL", "redis://:secret@127.0.0.1:1/0")

    result = invoke("up")

    assert result.exit_code == 1
    assert "INFERNO_REDIS__URL: 127.0.0.1 cannot be reached" in result.stderr
    assert "secret" not in result.output


def test_worker_joins_the_platform_that_runs(project: Project, up: Terminal) -> None:
    first = (project.root / "echo.up").read_text()
    (project.root / "echo.up").unlink()

    terminal = project.start("worker", "echo")
    while not (project.root / "echo.up").exists():
        terminal._read()

    # A shell that is about to become another program loses what is typed meanwhile.
    while Path(f"/proc/{terminal.pid}/comm").read_text() != "sleep\n":
        terminal._read()
    assert (project.root / "echo.up").read_text() == first
    terminal.type("\x03")
    assert terminal.exit_code() == -signal.SIGINT
    terminal.close()


def test_worker_without_a_platform_says_how_to_get_one(project: Project) -> None:
    project.add_model("echo")

    result = invoke("worker", "echo")

    assert result.exit_code == 1
    assert "Start one with `inferno up`" in result.stderr


# -- Models ----------------------------------------------------------------------------------------


def test_models_lists_what_there_is_and_what_is_wrong(project: Project) -> None:
    project.add_model("echo")
    project.add_model("typo", more="formt: onnx")

    result = invoke("models")

    assert result.exit_code == 0
    assert "echo" in result.output
    assert "typo cannot be served: models/typo/1/model.yaml: formt:" in result.output


def test_models_show_tells_what_a_model_takes(project: Project) -> None:
    project.add_model("echo")

    output = invoke("models", "show", "echo").output

    assert "text         string [batch]" in output
    assert f"curl http://127.0.0.1:{project.port}/v1/models/echo:predict -d" in output


def test_unknown_model_is_an_error_with_a_hint(project: Project) -> None:
    project.add_model("echo")

    result = invoke("models", "show", "nope")

    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "Error: model: model not found or not loaded: 'nope'",
        "  `inferno models` lists the models.",
    ]


def test_prepare_runs_the_scripts_of_models(project: Project) -> None:
    for name in ("one", "two"):
        project.add_model(name)
        script = project.root / "models" / name / "prepare.py"
        script.write_text(f"open('made-{name}', 'w').close()")
    project.add_model("three")

    run = [command(), "models", "prepare"]
    subprocess.run([*run, "one", "three"], check=True, timeout=60)
    assert [path.name for path in project.root.glob("made-*")] == ["made-one"]
    subprocess.run(run, check=True, timeout=60)
    assert (project.root / "made-two").exists()


def test_failed_preparation_is_named_and_stops_no_other(project: Project) -> None:
    for name, code in (("bad", "raise SystemExit(1)"), ("good", "open('made', 'w').close()")):
        project.add_model(name)
        (project.root / "models" / name / "prepare.py").write_text(code)

    result = invoke("models", "prepare")

    assert result.exit_code == 1
    assert "Error: could not prepare bad;" in result.stderr
    assert (project.root / "made").exists()


# -- Using a platform ------------------------------------------------------------------------------


@pytest.fixture
def url(platform: ScriptedPlatform) -> str:  # noqa: F811
    return platform.url


def test_submit_prints_the_id(platform: ScriptedPlatform, url: str) -> None:  # noqa: F811
    options = ["--priority", "9", "--webhook", "http://a.example/"]
    result = invoke("submit", "echo", "hello", *options, "--url", url)

    assert result.stdout == "task-0\n"
    body = {"model": "echo", "inputs": "hello", "priority": 9, "webhook": "http://a.example/"}
    assert platform.bodies == [body]


def test_submit_and_wait_prints_the_outputs(url: str) -> None:
    output = invoke("submit", "echo", "hello", "--wait", "--url", url).stdout

    assert "label        good\n" in output
    assert "y            0.5, 1.5\n" in output


def test_submit_and_wait_can_print_json(url: str) -> None:
    output = invoke("submit", "echo", "hello", "--wait", "--json", "--url", url).stdout

    assert json.loads(output)["outputs"]["label"]["data"] == ["good"]


@pytest.mark.parametrize(
    ("content", "inputs"),
    [
        (b"a line\n", "a line"),
        (b'{"text": "a"}', {"text": "a"}),
        (b"[[1, 2]]", [[1, 2]]),
        (b"[sic] no JSON", "[sic] no JSON"),
        ("größer".encode(), "größer"),
        (b"\x89PNG", "iVBORw=="),
    ],
)
def test_inputs_come_from_files_and_standard_input(
    platform: ScriptedPlatform,  # noqa: F811
    url: str,
    tmp_path: Path,
    content: bytes,
    inputs: object,
) -> None:
    file = tmp_path / "input"
    file.write_bytes(content)

    assert invoke("submit", "echo", f"@{file}", "--url", url).exit_code == 0
    assert invoke("submit", "echo", "-", "--url", url, stdin=content).exit_code == 0

    assert [body["inputs"] for body in platform.bodies] == [inputs, inputs]


def test_missing_file_is_an_error(url: str) -> None:
    result = invoke("submit", "echo", "@/nowhere", "--url", url)

    assert result.exit_code == 2
    assert "/nowhere cannot be read: No such file or directory" in result.stderr


def test_error_of_the_platform_is_one_line(url: str) -> None:
    result = invoke("submit", "nope", "hello", "--url", url)

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: model: no such model\n")


def test_platform_that_does_not_run_is_an_error_with_a_hint() -> None:
    result = invoke("submit", "echo", "hello", "--url", "http://127.0.0.1:1")

    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "Error: nothing answers at http://127.0.0.1:1; is the platform running?",
        "  `inferno up` starts the platform; --url names another one.",
    ]


def test_watch_prints_results_and_fails_with_a_failed_task(url: str) -> None:
    for text in ("fine", "poison"):
        invoke("submit", "echo", text, "--url", url)

    assert invoke("watch", "task-0", "--url", url).exit_code == 0
    result = invoke("watch", "task-0", "task-1", "--url", url)

    assert result.exit_code == 1
    assert "label        good" in result.stdout
    assert "failed: poisoned" in result.stdout


# -- This machine ----------------------------------------------------------------------------------


def test_settings_show_what_was_changed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERNO_INFERENCE__CORES", "2-3")
    output = invoke("settings").output

    assert f"INFERNO_SERVER__PORT = {project.port}  (default: 8000)" in output
    assert "INFERNO_SERVER__HOST = 127.0.0.1\n" in output
    assert "INFERNO_INFERENCE__CORES = 2,3  (default: unset)" in output


def test_wrong_setting_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERNO_SERVER__PORT", "many")

    result = invoke("settings")

    assert result.exit_code == 1
    assert result.stderr.startswith("Error: INFERNO_SERVER__PORT='many': input should be a valid")


def test_doctor_finds_nothing_wrong_here(project: Project) -> None:
    project.add_model("echo")

    result = invoke("doctor")

    assert result.exit_code == 0, result.output
    assert "as pinned in requirements.txt" in result.output
    assert "✗" not in result.output


def test_doctor_names_what_is_wrong(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.add_model("typo", more="formt: onnx")
    project.add_model("unprepared", more="artifact: model.onnx")
    monkeypatch.setenv("INFERNO_REDIS__URL", "redis://127.0.0.1:1")
    monkeypatch.setenv("INFERNO_DATA__DIR", "Procfile/data")
    with socket.create_server(("127.0.0.1", project.port)):
        result = invoke("doctor")

    assert result.exit_code == 1
    for text in (
        "INFERNO_REDIS__URL",
        "is not writable",
        "typo:",
        "prepare unprepared",
        "in use",
    ):
        assert text in result.output
    assert "5 problems found." in result.output


def test_help_lists_the_commands_as_they_are_needed() -> None:
    output = invoke("--help").output

    names = ["up", "worker", "models", "tune", "simulate", "submit", "watch", "tasks", "dead"]
    names += ["lanes", "versions", "cache", "settings", "doctor"]
    lines = output.split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in lines[: len(names)]] == names


def test_module_is_the_command_too() -> None:
    run = [sys.executable, "-m", "inferno", "--version"]

    assert subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT).stdout


# -- The Makefile ----------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "Makefile", tmp_path)
    return tmp_path


def make(checkout: Path, *arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    shell = "/bin/sh"
    return subprocess.run(
        [shutil.which("make") or "make", *arguments, f"SHELL={shell}"],
        cwd=checkout,
        env={"PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_make_lists_its_commands(checkout: Path) -> None:
    shown = make(checkout, path=os.environ["PATH"]).stdout

    assert [line.split()[1] for line in shown.splitlines()][1:5] == [
        "setup",
        "run",
        "check",
        "test",
    ]


def test_missing_python_is_one_clear_line(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "python3").chmod(0o755)

    result = make(checkout, ".venv/bin/python", path=str(tmp_path / "bin"))

    assert result.returncode != 0
    assert "Error: Python 3.11 or newer was not found" in result.stderr


def test_python_without_venv_says_what_to_install(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    # A Debian without python3-venv: new enough, but it cannot import ensurepip.
    script = f'case "$2" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n'
    (tmp_path / "bin" / "python3.12").write_text(f"#!/bin/sh\n{script}")
    (tmp_path / "bin" / "python3.12").chmod(0o755)

    result = make(checkout, ".venv/bin/python", path=str(tmp_path / "bin"))

    version = ".".join(map(str, sys.version_info[:2]))
    assert f"install it: apt-get install python{version}-venv" in result.stderr
    assert not (checkout / ".venv").exists()
