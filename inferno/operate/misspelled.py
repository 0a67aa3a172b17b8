"""Finds environment variables that look like settings and are none.

Settings ignore unknown names, so that one environment can serve several versions of Inferno. A
misspelled name is ignored as well, which its operator wants to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches

from pydantic import AliasChoices

from inferno.settings import Settings, variable

#: Similarity from which a name without a double underscore is taken for a setting. Other programs
#: may use such names.
_SURELY = 0.95


def misspelled(names: Iterable[str]) -> Iterator[str]:
    """Yield a sentence for each variable that looks like a setting and is none.

    Args:
      names: names of environment variables.
    """
    known = frozenset(_variables())
    fields = [name for name in known if "__" in name]
    for name in sorted(names):
        # Their case does not matter, and `INFERNO_GROUP__FIELD__KEY` sets one member of a mapping.
        parts = name.upper().split("__")
        if parts[0].startswith("INFERNO_") and "__".join(parts[:2]) not in known:
            cutoff = 0.8 if len(parts) > 1 else _SURELY
            nearest = get_close_matches("__".join(parts[:2]), fields, n=1, cutoff=cutoff)
            if nearest:
                yield f"{name} is not a setting and has no effect; did you mean {nearest[0]}?"
            elif len(parts) > 1:
                yield f"{name} is not a setting and has no effect"


def _variables() -> Iterator[str]:
    """Yield the names of all settings, of their other names, and of whole groups."""
    for group, info in Settings.model_fields.items():
        yield f"INFERNO_{group}".upper()
        assert info.annotation is not None
        for field, detail in info.annotation.model_fields.items():
            yield variable(group, field)
            if isinstance(detail.validation_alias, AliasChoices):
                yield from (variable(group, str(name)) for name in detail.validation_alias.choices)
