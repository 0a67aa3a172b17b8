"""Log records stay one record, whatever clients and models put into them."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from inferno import log_records

FORGED = "x\r\n2026-11-30 [CRITICAL] all is lost\x1b[2J\x9b31m\u2028\u202e"
ESCAPED = r"x\r\n2026-11-30 [CRITICAL] all is lost\x1b[2J\x9b31m\u2028\u202e"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """What a handler of another library writes, after the records of this process are clean."""
    before = logging.getLogRecordFactory()
    log_records.install()
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
    logger = logging.getLogger("tests.log_records")
    logger.addHandler(handler)
    logger.propagate = False
    yield stream
    logger.removeHandler(handler)
    logging.setLogRecordFactory(before)


log = logging.getLogger("tests.log_records")


def test_a_message_is_one_line(written: io.StringIO) -> None:
    log.warning("%s %s: %s", "GET", FORGED, ValueError("a\nb"))
    log.warning(FORGED)
    log.warning("%(path)s", {"path": FORGED})

    assert written.getvalue().splitlines() == [
        rf"[WARNING] GET {ESCAPED}: a\nb",
        f"[WARNING] {ESCAPED}",
        f"[WARNING] {ESCAPED}",
    ]


def test_text_of_people_is_kept(written: io.StringIO) -> None:
    log.warning("%s: %d of %.1f, %r", "Grüße, 世界 🙂", 3, 4.25, "ä\n")

    assert written.getvalue() == "[WARNING] Grüße, 世界 🙂: 3 of 4.2, 'ä\\n'\n"


def test_a_long_message_is_cut(written: io.StringIO) -> None:
    log.warning("%s", "y" * 1_000_000)

    assert written.getvalue() == f"[WARNING] {'y' * 2000}... (998000 more characters)\n"


def test_a_text_of_several_lines_keeps_its_own_lines_only(written: io.StringIO) -> None:
    log.warning("Unknown task:\n%s\nwith %r, %d", FORGED, {"a": FORGED}, 3)

    lines = written.getvalue().split("\n")
    assert lines[:2] == ["[WARNING] Unknown task:", f"  {ESCAPED}"]
    assert lines[2].startswith("  with {'a': ")
    assert lines[2:] == [lines[2], ""]


def test_a_traceback_is_indented_and_cut(written: io.StringIO) -> None:
    try:
        raise ValueError(FORGED)
    except ValueError:
        log.exception("it failed")
    try:
        raise ValueError("z" * 1_000_000)
    except ValueError:
        log.exception("it failed")

    first, *lines = written.getvalue().splitlines()
    assert first == "[ERROR] it failed"
    assert lines[0] == "  Traceback (most recent call last):"
    assert "ValueError: x" in "".join(lines)
    assert "\x1b" not in written.getvalue()
    assert [line for line in lines if not line.startswith("  ")] == ["[ERROR] it failed"]
    assert len(written.getvalue()) < 30_000
