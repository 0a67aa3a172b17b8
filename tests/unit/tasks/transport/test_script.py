"""Lua files: how they are put together, linted and packaged."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tasks.transport.lane import STREAMS
from tasks.transport.script import source

ROOT = Path(__file__).resolve().parents[4]
LUA = sorted((ROOT / "tasks").glob("*/lua/*.lua"))


def package(path: Path) -> str:
    return f"tasks.{path.parents[1].name}"


@pytest.mark.parametrize("path", LUA, ids=lambda path: f"{package(path)}/{path.stem}")
def test_every_file_finds_what_it_includes(path):
    assert path.read_text() in source(package(path), path.stem)


def test_an_included_module_stands_once_and_before_its_users(tmp_path, monkeypatch):
    folder = tmp_path / "sample" / "lua"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "low.lua").write_text("return {name = 'low'}\n")
    (folder / "high.lua").write_text('local low = include "sample/low"\nreturn low\n')
    (folder / "main.lua").write_text(
        'local high, low = include "sample/high", include "sample/low"\nreturn high.name\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    text = source("sample", "main")
    assert text.count("return {name = 'low'}") == 1
    assert text.index("{name = 'low'}") < text.index('modules["sample/high"]')
    with pytest.raises(FileNotFoundError):
        source("sample", "missing")


def test_python_holds_no_lua():
    places = ("bench", "inferno", "monitoring", "tasks", "web", "workers")
    files = [path for place in places for path in (ROOT / place).rglob("*.py")]
    assert [str(path) for path in files if "redis.call" in path.read_text()] == []


def test_lua_files_are_clean():
    luacheck = shutil.which("luacheck")
    if luacheck is None:
        pytest.skip("luacheck is not installed: apt-get install lua-check")
    command = [luacheck, "--no-color", *map(str, LUA)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def test_a_wheel_brings_the_lua_files(tmp_path):
    # From a copy, because setuptools leaves its build folder beside the sources.
    checkout = tmp_path / "checkout"
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\n")  # fmt: skip
    for name in names:
        if name and (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "models/")):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(checkout)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(place)
    code = "from tasks.transport.script import source; print(*map(len, map(source, %r, %r)))"
    packages, stems = [package(path) for path in LUA], [path.stem for path in LUA]
    run = subprocess.run(
        [sys.executable, "-c", code % (packages, stems)],
        cwd=place, env={"PYTHONPATH": str(place)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(run.stdout.split()) == len(LUA)


def test_python_and_lua_agree_on_the_streams_of_a_lane():
    text = (ROOT / "tasks/transport/lua/lane.lua").read_text()
    (streams,) = re.findall(r"M\.STREAMS = \{(.*)\}", text)
    assert tuple(re.findall(r"'(\w+)'", streams)) == STREAMS
