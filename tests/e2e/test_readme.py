"""The commands and programs in README and docs work as they stand, on a running platform."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.unit.test_docs import DOCUMENTS, NOT_RUN, ROOT, Block, blocks

#: URL of the platform in the documents.
DOCUMENTED_URL = "http://127.0.0.1:8000"

COMMANDS = [
    block
    for document in DOCUMENTS
    for block in blocks(document, "bash")
    if not NOT_RUN.keys() & set(block.commands)
]
PROGRAMS = list(blocks(ROOT / "README.md", "python"))


def run(block: Block, arguments: list[str], url: str, folder: Path, cwd: Path = ROOT) -> str:
    place = urlsplit(url)
    # By default, curl reports success even if the platform answers with an error.
    (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\nmax-time=60\n")
    environment = os.environ | {
        "CURL_HOME": str(folder),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "INFERNO_SERVER__HOST": str(place.hostname),
        "INFERNO_SERVER__PORT": str(place.port),
    }
    text = block.text
    for scheme in ("http", "ws"):
        text = text.replace(DOCUMENTED_URL.replace("http", scheme), f"{scheme}://{place.netloc}")
    done = subprocess.run(
        [*arguments, "-c", text],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    # A tool that prints a document to stdout prints hints to stderr.
    return done.stdout + done.stderr


def members(document: Any) -> Any:
    """Return the names of a document's members, with those of the objects in it."""
    if not isinstance(document, dict):
        return None
    return {name: members(value) for name, value in document.items()}


@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_documented_commands_work(block: Block, platform, tmp_path: Path) -> None:
    assert run(block, ["bash", "-euo", "pipefail"], platform.url, tmp_path)


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_documented_programs_work(block: Block, platform, tmp_path: Path) -> None:
    assert run(block, [sys.executable, "-W", "error"], platform.url, tmp_path)


def test_readme_shows_the_answer_to_its_first_call(platform, tmp_path: Path) -> None:
    call = next(b for b in blocks(ROOT / "README.md", "bash") if "curl" in b.text)
    shown = json.loads(next(blocks(ROOT / "README.md", "json")).text)

    answer = json.loads(run(call, ["bash", "-euo", "pipefail"], platform.url, tmp_path))

    # A kept result says so, and an earlier test may have made the same call.
    answer.pop("cached", None)
    assert members(answer) == members(shown)
    assert answer["outputs"]["label"] == shown["outputs"]["label"]
