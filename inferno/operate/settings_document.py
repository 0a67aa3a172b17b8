"""The settings as documents: docs/settings.md, .env.example and `inferno settings`."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import AliasChoices, BaseModel
from pydantic.fields import FieldInfo

from inferno.settings import Settings, variable

#: The password of a URL, with what is before it.
_PASSWORD_IN_URL = re.compile(r"(://[^/@]*:)[^/@]+@")


@dataclass(frozen=True)
class DocumentedSetting:
    """One setting with its documentation."""

    group: str
    field: str
    variable: str
    default: str
    meaning: str

    def value(self, settings: Settings) -> str:
        """Return the setting's value as an environment variable would hold it, without secrets."""
        value = _format(getattr(getattr(settings, self.group), self.field))
        return _PASSWORD_IN_URL.sub(r"\1**********@", value)


def documented_settings() -> Iterator[DocumentedSetting]:
    """Yield every setting, group by group."""
    for group, info in Settings.model_fields.items():
        kind = info.annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        for field, detail in kind.model_fields.items():
            default = _format(detail.get_default(call_default_factory=True, validated_data={}))
            yield DocumentedSetting(
                group, field, variable(group, field), default, _meaning(group, field, detail)
            )


def _meaning(group: str, field: str, detail: FieldInfo) -> str:
    meaning = detail.description or ""
    if get_origin(detail.annotation) is Literal:
        choices = [f"`{choice}`" for choice in get_args(detail.annotation)]
        meaning += f" One of {', '.join(choices)}."
    if isinstance(detail.validation_alias, AliasChoices):
        others = [str(name) for name in detail.validation_alias.choices if name != field]
        names = [f"`{variable(group, name)}`" for name in others]
        meaning += f" Other names: {', '.join(names)}."
    return meaning


def _format(value: Any) -> str:
    """Return a value as an environment variable would hold it."""
    if value is None:
        return "unset"
    if isinstance(value, bool | dict):
        return json.dumps(value)
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "unset"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_markdown() -> str:
    """Return docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "<!-- From inferno/settings.py, by `inferno settings --markdown > docs/settings.md` -->",
        "",
        "Every setting is an environment variable that a process reads once, when it starts. An",
        "invalid value stops the process with an error that names it. `inferno settings` prints",
        "the values in force. Paths are relative to the project's directory.",
    ]
    group = ""
    for setting in documented_settings():
        if setting.group != group:
            group = setting.group
            kind = Settings.model_fields[group].annotation
            assert kind is not None
            lines += ["", f"## {group}", "", kind.__doc__ or "", ""]
            lines += ["| variable | default | meaning |", "|---|---|---|"]
        lines += [f"| `{setting.variable}` | `{setting.default}` | {setting.meaning} |"]
    return "\n".join(lines) + "\n"


def environment_example() -> str:
    """Return .env.example."""
    lines = [
        "# Every setting with its default, written by `inferno settings --env > .env.example`.",
        "# Copy it to .env, uncomment what you change, and load it: set -a; . ./.env; set +a",
    ]
    group = ""
    for setting in documented_settings():
        if setting.group != group:
            group = setting.group
            lines += [""]
        value = "" if setting.default == "unset" else shlex.quote(setting.default)
        lines += [f"# {setting.meaning}", f"#{setting.variable}={value}"]
    return "\n".join(lines) + "\n"
