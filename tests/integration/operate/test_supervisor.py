"""The supervisor, with real processes: small Python programs that print, drain, ignore or die."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from inferno.errors import ConfigurationError
from inferno.operate import guard, supervisor
from inferno.operate.guard import Event, EventKind, Stage
from inferno.operate.ports import check_port
from inferno.operate.procfile import parse_procfile
from inferno.operate.supervisor import ProcessSpec, Supervisor

# Prints "up", drains for some seconds on SIGTERM, then adds its name to a file. Its child, as of a
# prefork pool, does the same and is told to only through the leader.
PROGRAM = """\
import os, signal, sys, time
name, trace, drain_s, has_child = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4] == "1"

def note(text):
    with open(trace, "a") as file:
        file.write(text + "\\n")

if has_child and os.fork() == 0:
    signal.signal(signal.SIGTERM, lambda *_: note(f"{name}'s child got SIGTERM"))
    while os.getppid() != 1:
        time.sleep(0.05)
    os._exit(0)

def stop(*_):
    note(f"{name} told")
    time.sleep(drain_s)
    note(f"{name} done")
    os._exit(0)

signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, lambda *_: note(f"{name} got SIGINT"))
print("up", flush=True)
while True:
    time.sleep(60)
"""

STUBBORN = """\
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.fork()
print("up", os.getpid(), flush=True)
while True:
    time.sleep(60)
"""

# `inferno up` in small: one store, one worker that drains for a while, one web.
PLATFORM = """\
import sys
from pathlib import Path
from inferno.operate.guard import Stage
from inferno.operate.supervisor import ProcessSpec, Supervisor
data_dir, command, drain_s = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
supervisor = Supervisor(data_dir, cwd=data_dir, on_event=lambda e: print(e.text(), flush=True))
supervisor.add(ProcessSpec("redis", f"{command} redis trace 0 0", stage=Stage.STORE))
supervisor.add(ProcessSpec("worker", f"{command} worker trace {drain_s} 0"))
supervisor.add(ProcessSpec("web", f"{command} web trace 0 0", stage=Stage.FRONT_END))
supervisor.run_forever()
"""


def wait_until(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """A zombie is not alive: in a container nobody may reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def session_members(leader: int) -> list[int]:
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            members.append(int(entry.name))
    return members


class Platform:
    """A supervisor in a thread, with what it reported."""

    def __init__(self, tmp_path: Path, **options: Any) -> None:
        self.tmp_path = tmp_path
        self.events: list[Event] = []
        self.supervisor = Supervisor(
            tmp_path / "data", cwd=tmp_path, on_event=self.events.append, **options
        )
        self.thread = threading.Thread(target=self.supervisor.run_forever)
        self.trace = tmp_path / "trace"
        self.trace.touch()
        (tmp_path / "program.py").write_text(PROGRAM)
        (tmp_path / "stubborn.py").write_text(STUBBORN)

    def add(self, name: str, command: str, **options: Any) -> None:
        self.supervisor.add(ProcessSpec(name, command, **options))

    def add_program(
        self,
        name: str,
        *,
        drain_s: float = 0,
        has_child: bool = False,
        stage: Stage = Stage.WORKER,
    ) -> None:
        python = shlex.quote(sys.executable)
        self.add(name, f"{python} program.py {name} trace {drain_s} {has_child:d}", stage=stage)

    def start(self) -> None:
        self.thread.start()

    def log(self, name: str) -> str:
        path = self.supervisor.log_path(name)
        return path.read_text() if path.exists() else ""

    def wait_for_log(self, name: str, text: str) -> None:
        wait_until(lambda: text in self.log(name))

    def of_kind(self, kind: EventKind, name: str | None = None) -> list[Event]:
        return [e for e in self.events if e.kind is kind and name in (None, e.process)]

    def stop(self) -> None:
        self.supervisor.request_stop()
        if self.thread.ident is not None:
            self.thread.join(40)
            assert not self.thread.is_alive()


@pytest.fixture
def make_platform(tmp_path: Path) -> Iterator[Callable[..., Platform]]:
    made: list[Platform] = []

    def make(**options: Any) -> Platform:
        made.append(Platform(tmp_path, **options))
        return made[-1]

    yield make
    for platform in made:
        pids = platform.supervisor.pids().values()
        platform.stop()
        assert [pid for pid in pids if alive(pid)] == []


@pytest.fixture
def platform(make_platform: Callable[..., Platform]) -> Platform:
    return make_platform()


@pytest.fixture
def platform_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[float], tuple[subprocess.Popen[bytes], dict[str, int]]]]:
    """Starts PLATFORM as its own process and returns it with the pids of what it runs."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "supervise.py").write_text(PLATFORM)
    (tmp_path / "trace").touch()
    monkeypatch.setenv("PYTHONPATH", str(Path(guard.__file__).parents[2]))
    left: list[int] = []

    def start(drain_s: float) -> tuple[subprocess.Popen[bytes], dict[str, int]]:
        command = f"{shlex.quote(sys.executable)} {tmp_path / 'program.py'}"
        printed = tmp_path / "printed"
        with printed.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, tmp_path / "supervise.py", tmp_path, command, str(drain_s)],
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        left.append(process.pid)
        logs = [tmp_path / "logs" / f"{name}.log" for name in ("redis", "worker", "web")]
        wait_until(lambda: all(log.exists() and "up" in log.read_text() for log in logs))
        started = re.findall(r"(\w+) +\| Started, process (\d+)", printed.read_text())
        pids = {name: int(pid) for name, pid in started}
        left.extend(pids.values())
        return process, pids

    yield start
    for pid in left:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


# -- Procfile --------------------------------------------------------------------------------------


def test_procfile_lines_are_read_in_order_without_comments() -> None:
    text = '# all of it\n\nweb: gunicorn "web.app:create_app()"\nworker:  celery -A tasks # x\n'

    assert parse_procfile(text) == {
        "web": 'gunicorn "web.app:create_app()"',
        "worker": "celery -A tasks # x",
    }
    assert list(parse_procfile(text)) == ["web", "worker"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("web gunicorn", "line 1: expected `name: command`"),
        ("web:", "line 1"),
        ("a: b\na: c", "line 2: a is defined twice"),
    ],
)
def test_wrong_procfile_line_is_named(text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        parse_procfile(text)


# -- Starting --------------------------------------------------------------------------------------


def test_leader_is_the_command_itself_in_a_session_of_its_own(platform: Platform) -> None:
    platform.add("sleeper", "sleep 60")
    platform.start()
    wait_until(platform.supervisor.pids)
    pid = platform.supervisor.pids()["sleeper"]

    wait_until(lambda: Path(f"/proc/{pid}/comm").read_text() == "sleep\n")

    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    assert os.readlink(f"/proc/{pid}/fd/1").startswith("socket:")


def test_command_sees_its_environment_and_its_own_pid(platform: Platform) -> None:
    platform.add("greeter", "EXTRA=x echo ${MODEL}-$$@%h", env={"MODEL": "echo"})
    platform.start()
    platform.wait_for_log("greeter", "@%h")

    (first, *_) = platform.of_kind(EventKind.STARTED, "greeter")
    pid = re.findall(r"process (\d+)", first.message)[0]

    assert platform.log("greeter").startswith(f"echo-{pid}@%h\n")


def test_process_added_while_running_is_started(platform: Platform) -> None:
    platform.add_program("first")
    platform.start()
    platform.wait_for_log("first", "up")

    platform.add_program("second")

    platform.wait_for_log("second", "up")


def test_names_are_unique_and_fit_for_files(platform: Platform) -> None:
    platform.add("web", "sleep 60")

    with pytest.raises(ConfigurationError, match="Two processes are named web"):
        platform.add("web", "sleep 60")
    with pytest.raises(ConfigurationError, match="cannot name a process"):
        platform.add("../web", "sleep 60")


def test_second_platform_on_the_same_data_is_refused(platform: Platform, tmp_path: Path) -> None:
    platform.supervisor.lock()
    second = Supervisor(tmp_path / "data", cwd=tmp_path)

    with pytest.raises(ConfigurationError, match=rf"in use by process {os.getpid()} \("):
        second.lock()

    platform.supervisor.stop()
    second.lock()
    second.stop()


def test_stores_are_awaited_before_others_start(platform: Platform) -> None:
    served = threading.Event()
    asked = threading.Event()

    def wait(running: Callable[[], bool]) -> bool:
        asked.set()
        return running() and served.wait(20)

    platform.add_program("worker")
    platform.add("redis", "sleep 60", stage=Stage.STORE, wait_until_ready=wait)
    platform.start()
    assert asked.wait(20)
    assert list(platform.supervisor.pids()) == ["redis"]

    served.set()

    platform.wait_for_log("worker", "up")


def test_store_that_does_not_come_up_stops_everything(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, cwd=tmp_path)

    def wait(running: Callable[[], bool]) -> bool:
        wait_until(lambda: not running())
        return False

    command = "sh -c 'echo bad directive; exit 1'"
    supervisor.add(ProcessSpec("cache", "sleep 60", stage=Stage.STORE))
    supervisor.add(ProcessSpec("redis", command, stage=Stage.STORE, wait_until_ready=wait))
    supervisor.add(ProcessSpec("web", "sleep 60", stage=Stage.FRONT_END))

    with pytest.raises(ConfigurationError, match=r"redis did not start.*\n  > bad directive"):
        supervisor.run_forever()

    assert supervisor.pids() == {}
    assert not supervisor.log_path("web").exists()


# -- Dying -----------------------------------------------------------------------------------------


def test_killed_process_is_restarted_and_leaves_no_children(platform: Platform) -> None:
    platform.add_program("worker", has_child=True)
    platform.start()
    platform.wait_for_log("worker", "up")
    leader = platform.supervisor.pids()["worker"]
    members = session_members(leader)
    assert len(members) == 2

    os.kill(leader, signal.SIGKILL)

    wait_until(lambda: platform.log("worker").count("up") == 2)
    assert [pid for pid in members if alive(pid)] == []
    (death,) = platform.of_kind(EventKind.DIED)
    assert re.fullmatch(r"Ended with SIGKILL after \d+\.\d s; restarts in 1 s\.", death.message)
    assert death.log_lines == ("up",)


def test_backoff_doubles_up_to_its_cap(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LONGEST_BACKOFF_S", 2.0)
    platform.add("broken", "false")
    platform.start()

    wait_until(lambda: len(platform.of_kind(EventKind.DIED)) == 3)

    delays = [e.message.rpartition(" in ")[2] for e in platform.of_kind(EventKind.DIED)]
    assert delays[:3] == ["1 s.", "2 s.", "2 s."]


def test_stable_run_resets_the_backoff(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STABLE_S", 0.0)
    platform.add("brief", "true")
    platform.start()

    wait_until(lambda: len(platform.of_kind(EventKind.DIED)) == 3)

    assert all(" in 1 s." in e.message for e in platform.of_kind(EventKind.DIED))
    assert platform.of_kind(EventKind.FAILING) == []


def test_broken_process_is_named_once_and_hurts_no_other(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LONGEST_BACKOFF_S", 0.05)
    platform.add_program("sound")
    platform.add("broken", "sh -c 'echo no such model; exit 3'")
    platform.start()
    platform.wait_for_log("sound", "up")
    sound = platform.supervisor.pids()["sound"]

    wait_until(lambda: len(platform.of_kind(EventKind.DIED, "broken")) > 6)

    (failing,) = platform.of_kind(EventKind.FAILING)
    assert "Failed 5 times in a row" in failing.message
    assert failing.level == "error"
    assert platform.of_kind(EventKind.DIED, "broken")[0].log_lines == ("no such model",)
    assert platform.supervisor.pids()["sound"] == sound


# -- Stopping --------------------------------------------------------------------------------------


def test_slow_drain_is_waited_for_beside_a_quick_sibling(platform: Platform) -> None:
    # Eight seconds: process managers are known to kill five seconds after the first exit.
    platform.add_program("redis", stage=Stage.STORE)
    platform.add_program("quick")
    platform.add_program("slow", drain_s=8, has_child=True)
    platform.add_program("web", stage=Stage.FRONT_END)
    platform.start()
    for name in ("redis", "quick", "slow", "web"):
        platform.wait_for_log(name, "up")

    platform.stop()

    assert [e.process for e in platform.of_kind(EventKind.STOPPED)] == [
        "web",
        "quick",
        "slow",
        "redis",
    ]
    trace = platform.trace.read_text().splitlines()
    assert trace[:2] == ["web told", "web done"]
    assert set(trace[2:4]) | {trace[4]} == {"quick told", "quick done", "slow told"}
    assert trace[5:] == ["slow done", "redis told", "redis done"]


def test_group_is_killed_when_the_grace_period_is_over(
    make_platform: Callable[..., Platform],
) -> None:
    platform = make_platform(grace_s=0.5)
    platform.add("stubborn", f"{shlex.quote(sys.executable)} stubborn.py")
    platform.start()
    wait_until(lambda: platform.log("stubborn").count("up") == 2)
    members = session_members(platform.supervisor.pids()["stubborn"])
    assert len(members) == 2

    platform.stop()

    assert [pid for pid in members if alive(pid)] == []
    assert len(platform.of_kind(EventKind.KILLED, "stubborn")) == 1


def test_second_request_hastens(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "SAME_REQUEST_S", 0.0)
    platform.add_program("slow", drain_s=60)
    platform.start()
    platform.wait_for_log("slow", "up")

    platform.supervisor.request_stop()
    wait_until(lambda: "slow told" in platform.trace.read_text())
    platform.stop()

    assert [e.process for e in platform.of_kind(EventKind.KILLED)] == ["slow"]


def test_ctrl_c_reaches_the_supervisor_only(
    platform_process: Callable[[float], tuple[subprocess.Popen[bytes], dict[str, int]]],
    tmp_path: Path,
) -> None:
    process, pids = platform_process(1.0)

    os.killpg(process.pid, signal.SIGINT)

    assert process.wait(20) == 0
    assert (tmp_path / "trace").read_text().splitlines() == [
        f"{name} {what}" for name in ("web", "worker", "redis") for what in ("told", "done")
    ]
    assert [pid for pid in pids.values() if alive(pid)] == []


def test_killed_supervisor_leaves_nothing_behind(
    platform_process: Callable[[float], tuple[subprocess.Popen[bytes], dict[str, int]]],
    tmp_path: Path,
) -> None:
    process, pids = platform_process(2.0)

    process.kill()
    process.wait()

    # While the worker drains, the data is not given to the next platform.
    wait_until(lambda: "worker told" in (tmp_path / "trace").read_text())
    with pytest.raises(ConfigurationError, match="in use"):
        Supervisor(tmp_path, cwd=tmp_path).lock()
    wait_until(lambda: not any(map(alive, pids.values())), timeout_s=30)
    assert (tmp_path / "trace").read_text().splitlines() == [
        f"{name} {what}" for name in ("web", "worker", "redis") for what in ("told", "done")
    ]
    following = Supervisor(tmp_path, cwd=tmp_path)
    wait_until(lambda: _locks(following))
    following.stop()


def _locks(supervisor: Supervisor) -> bool:
    try:
        supervisor.lock()
    except ConfigurationError:
        return False
    return True


def test_killed_guard_is_replaced(
    platform_process: Callable[[float], tuple[subprocess.Popen[bytes], dict[str, int]]],
    tmp_path: Path,
) -> None:
    process, pids = platform_process(0.0)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (guard,) = [pid for pid in map(int, children) if "inferno.operate.guard" in command_line(pid)]

    os.kill(guard, signal.SIGKILL)
    wait_until(lambda: "Replaced the guard" in (tmp_path / "printed").read_text())
    process.kill()
    process.wait()

    wait_until(lambda: not any(map(alive, pids.values())), timeout_s=30)
    assert (tmp_path / "trace").read_text().split()[-2:] == ["redis", "done"]


def test_guard_stops_what_it_is_told_of() -> None:
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        reaper = threading.Thread(target=process.wait)
        reaper.start()
        guard._guard([f'[["sleeper", {process.pid}, 1]]\n'], grace_s=20)  # type: ignore[arg-type]
        reaper.join(20)

    assert process.returncode == -signal.SIGTERM


def test_guard_takes_a_zombie_and_a_reused_pid_for_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        orphan = guard._Orphan("sleeper", process.pid, Stage.WORKER)
        stranger = guard._Orphan("stranger", process.pid, Stage.WORKER)
        assert orphan.running()
        # As if the pid had gone to a process that started later.
        monkeypatch.setattr(stranger._process, "_ident", (process.pid, 0.0))
        assert not stranger.running()

        process.kill()
        wait_until(lambda: not alive(process.pid))
        assert not orphan.running()


# -- Logs ------------------------------------------------------------------------------------------


# Four processes share a log, as gunicorn's do; every twentieth line is a block that exceeds what a
# pipe writes at once.
STORM = """\
import os, sys
for child in range(4):
    if os.fork() == 0:
        for number in range(int(sys.argv[1])):
            block = ("#" * 8000) if number % 20 == 0 else ""
            os.write(1, f"<{child} {number} {block}>\\n".encode())
        os._exit(0)
for child in range(4):
    os.wait()
os.write(1, b"all written\\n")
import time
time.sleep(60)
"""


def start_storm(platform: Platform, lines: int) -> list[Path]:
    """Write a storm of lines, and return the log's files when it is over, oldest first."""
    (platform.tmp_path / "storm.py").write_text(STORM)
    platform.add("storm", f"{shlex.quote(sys.executable)} storm.py {lines}")
    platform.start()
    platform.wait_for_log("storm", "all written")
    path = platform.supervisor.log_path("storm")
    older = path.parent.glob("storm.log.*")
    return [*sorted(older, key=lambda file: -int(file.suffix[1:])), path]


def test_no_line_is_lost_or_torn_while_a_log_rotates(
    make_platform: Callable[..., Platform],
) -> None:
    files = start_storm(make_platform(log_bytes=100_000, logs_kept=1000), 1000)

    assert len(files) > 10
    assert all(file.stat().st_size <= 200_000 for file in files)
    *lines, last = b"".join(file.read_bytes() for file in files).decode().splitlines()
    assert last == "all written"
    numbers: dict[str, list[int]] = {}
    for line in lines:
        found = re.fullmatch(r"<(\d) (\d+) (#{8000})?>", line)
        assert found is not None, line[:100]
        numbers.setdefault(found[1], []).append(int(found[2]))
    assert numbers == {child: list(range(1000)) for child in "0123"}


def test_a_storm_cannot_fill_the_disk(make_platform: Callable[..., Platform]) -> None:
    files = start_storm(make_platform(log_bytes=50_000, logs_kept=2), 1000)

    assert len(files) == 3
    # One read of the writer may exceed the limit, if it is the first of a file.
    assert sum(file.stat().st_size for file in files) <= 3 * 70_000


def test_a_line_without_end_takes_no_memory(make_platform: Callable[..., Platform]) -> None:
    platform = make_platform()
    platform.add(
        "endless", "sh -c 'head -c 3000000 /dev/zero | tr \\\\0 x; echo; echo end; sleep 60'"
    )
    platform.start()

    platform.wait_for_log("endless", "\nend\n")

    *broken, last = platform.log("endless").splitlines()
    assert last == "end"
    assert "".join(broken) == "x" * 3_000_000
    assert all(len(line) < 150_000 for line in broken)


def test_control_characters_do_not_reach_a_log(platform: Platform) -> None:
    platform.add("talker", r"printf '\t\033[2J\007\302\233x ä\nend\n'")
    platform.start()

    platform.wait_for_log("talker", "end")

    assert platform.log("talker").splitlines()[0] == r"	\x1b[2J\x07\x9bx ä".replace(r"\t", "\t")


def test_a_killed_writer_is_replaced_and_loses_no_line(platform: Platform) -> None:
    platform.add("counter", "sh -c 'n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done'")
    platform.start()
    platform.wait_for_log("counter", "20\n")
    writer = platform.supervisor._logs._writer
    assert writer is not None
    os.kill(writer.pid, signal.SIGSTOP)
    time.sleep(0.2)  # Lines gather in the socket.

    writer.kill()

    wait_until(lambda: any("Replaced the writer" in e.message for e in platform.events))
    known = len(platform.log("counter").splitlines())
    wait_until(lambda: len(platform.log("counter").splitlines()) > known + 20)
    lines = list(map(int, platform.log("counter").splitlines()))
    assert lines == list(range(1, len(lines) + 1))


def test_logs_and_locks_are_their_owners_only(platform: Platform) -> None:
    path = platform.supervisor.log_path("worker")
    path.parent.mkdir(parents=True, mode=0o755)
    for old in (path, path.with_name("worker.log.1")):
        old.write_text("of an older version\n")
        old.chmod(0o644)
    platform.add_program("worker")
    platform.start()
    platform.wait_for_log("worker", "up")

    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in path.parents[1].rglob("*")}

    assert modes.pop("logs") == "0o700"
    assert modes.keys() >= {"worker.log", "worker.log.1", "supervisor.log", "supervisor.lock"}
    assert set(modes.values()) == {"0o600"}


def test_large_log_is_moved_away(make_platform: Callable[..., Platform]) -> None:
    platform = make_platform(log_bytes=10)
    path = platform.supervisor.log_path("worker")
    path.parent.mkdir(parents=True)
    path.write_text("of the last run\n")
    platform.add_program("worker")
    platform.start()

    platform.wait_for_log("worker", "up")

    assert platform.log("worker") == "up\n"
    assert path.with_name("worker.log.1").read_text() == "of the last run\n"


def test_followed_logs_are_reported_line_by_line(
    make_platform: Callable[..., Platform], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LONGEST_BACKOFF_S", 0.05)
    platform = make_platform(follow=True, log_bytes=3)
    platform.add("talker", "printf 'one\\ntwo\\n'")
    platform.start()

    wait_until(lambda: len(platform.of_kind(EventKind.OUTPUT)) >= 8)
    platform.stop()

    lines = [e.message for e in platform.of_kind(EventKind.OUTPUT)]
    assert lines == ["one", "two"] * (len(lines) // 2)


def test_event_text_has_its_name_before_each_line() -> None:
    event = Event(EventKind.DIED, "web", "Ended.", "error", ("Traceback", "  boom"))

    assert event.text() == (
        "web          | Ended.\nweb          |   > Traceback\nweb          |   >   boom"
    )
    assert event.text(colour=True).startswith("\x1b[31mweb          |\x1b[0m Ended.")


# -- Ports -----------------------------------------------------------------------------------------


def test_port_in_use_tells_by_whom() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        with pytest.raises(
            ConfigurationError,
            match=rf"Port {port} on 127.0.0.1 is in use by process {os.getpid()} \(.+\)\. "
            "Stop that process or set INFERNO_SERVER__PORT to another port",
        ):
            check_port("127.0.0.1", port, "INFERNO_SERVER__PORT")

    check_port("127.0.0.1", port, "INFERNO_SERVER__PORT")


def test_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"on 192\.0\.2\.1 cannot be used"):
        check_port("192.0.2.1", 8000, "INFERNO_SERVER__PORT")
