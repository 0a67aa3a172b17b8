"""Forward step: find the members that make a batch fail, and spare the others.

It knows nothing of models: the caller passes in the function that runs members.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from inferno.errors import ForwardFailed

T = TypeVar("T")


class Undecided(ForwardFailed):
    """The pass budget for isolating a failing batch is spent.

    This member may be innocent, so its task is retried.
    """

    transient = True


def isolate(
    members: Sequence[T], run: Callable[[Sequence[T]], Sequence[Any]]
) -> Iterator[tuple[T, Any | Exception]]:
    """Run members together; if that fails, run halves until each failing member is alone.

    One failing member of n costs 1 + 2 log2(n) passes. The budget is twice that (isolating 32
    failing members of 32 would cost 63 passes); members left over are `Undecided`.

    Args:
      members: at least one.
      run: answers members with one forward pass, or raises.
    Yields:
      Each member once, with its answer or its error.
    """
    budget = 2 + 4 * math.ceil(math.log2(len(members)))
    parts = deque([list(members)])
    while parts:
        part = parts.popleft()
        if budget <= 0:
            undecided = Undecided("its batch failed, and it could not be tried alone")
            yield from ((member, undecided) for member in part)
            continue
        budget -= 1
        answered: list[tuple[T, Any | Exception]]
        try:
            answered = list(zip(part, run(part), strict=True))
        except Exception as exc:
            if len(part) > 1 and (not is_transient(exc) or isinstance(exc, MemoryError)):
                middle = len(part) // 2
                parts += [part[:middle], part[middle:]]
                continue
            answered = [(member, exc) for member in part]
        yield from answered


def is_transient(exc: BaseException) -> bool:
    """Return whether the same task may succeed later.

    A model decides by the attribute `transient` of the exception that it raises. Without it,
    running out of memory and broken connections are transient.
    """
    return bool(
        getattr(exc, "transient", isinstance(exc, MemoryError | ConnectionError | TimeoutError))
    )
