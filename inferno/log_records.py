"""Log records that clients cannot forge: control characters are escaped, and long texts are cut.

A URL, the name of a task or the text of an exception may contain line breaks, which would look like
further records, and escape codes, which change the operator's terminal. The record itself is
cleaned, so every handler and formatter of the process writes a clean one: also those of gunicorn,
Celery and Flower.

Only a record's first line begins at the left edge. A traceback, and further lines of a program's
own text, are indented.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Mapping
from typing import Any

#: Maximum number of characters of a message, and of a traceback, of which the end is kept.
MAX_MESSAGE, MAX_TRACEBACK = 2_000, 20_000

#: Control characters, and what else some terminals and readers take for the end of a line.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_UNPRINTABLE_IN_LINES = re.compile(
    _UNPRINTABLE.pattern.replace(r"\x00-\x1f", r"\x00-\x09\x0b-\x1f")
)


def install() -> None:
    """Make every log record of this process a clean one; entry points call it once."""
    logging.setLogRecordFactory(CleanRecord)


class CleanRecord(logging.LogRecord):
    """A log record whose message and traceback are safe to write."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.exc_info and self.exc_info[1] is not None:
            # Formatters write it in place of their own traceback.
            self.exc_text = _indented("".join(traceback.format_exception(self.exc_info[1])))

    def getMessage(self) -> str:
        """Return the message in one line; a text of several lines keeps those of its own."""
        template = str(self.msg)
        if self.args and "\n" in template:
            self.args, args = _clean_arguments(self.args), self.args
            try:
                message = super().getMessage()
            finally:
                self.args = args
            return _indented(_shortened(message)).lstrip()
        return clean(super().getMessage())


def clean(text: str) -> str:
    """Return a text as one line without control characters, of at most `MAX_MESSAGE` characters."""
    return _UNPRINTABLE.sub(_escaped, _shortened(text))


def _shortened(text: str) -> str:
    if len(text) <= MAX_MESSAGE:
        return text
    return f"{text[:MAX_MESSAGE]}... ({len(text) - MAX_MESSAGE} more characters)"


def _indented(text: str) -> str:
    if len(text) > MAX_TRACEBACK:
        text = f"({len(text) - MAX_TRACEBACK} characters before)...\n{text[-MAX_TRACEBACK:]}"
    lines = _UNPRINTABLE_IN_LINES.sub(_escaped, text).rstrip("\n").split("\n")
    return "\n".join(f"  {line}" for line in lines)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def _clean_arguments(args: Any) -> Any:
    if isinstance(args, Mapping):
        return {name: _clean_argument(value) for name, value in args.items()}
    return tuple(map(_clean_argument, args))


def _clean_argument(value: Any) -> Any:
    # `%d` and its kind need a number.
    return value if isinstance(value, int | float) else _Clean(value)


class _Clean:
    """Writes a value in one line."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __str__(self) -> str:
        return clean(str(self._value))

    def __repr__(self) -> str:
        return clean(repr(self._value))
