"""Dead letters: tasks that were given up after every attempt, with their inputs and errors.

The script that settles a task writes its letter; see `tasks.state.commands`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import redis
from kombu.utils.json import loads

from inferno import names
from inferno.errors import NotConfirmed, TaskNotFound
from inferno.settings import Settings
from tasks.broker.connection import translated
from tasks.state import claims
from tasks.state.listing import CHUNK, Page, Place, read_page

#: Fields that a list shows.
_OUTLINE = (
    "model", "version", "priority", "retries", "accepted_at", "died_at", "code", "error",
    "batch_id",
)  # fmt: skip


@dataclass(frozen=True)
class DeadLetter:
    """A task that was given up. Times are in seconds since the epoch."""

    task_id: str
    model: str
    version: int | None
    priority: int
    accepted_at: float
    died_at: float
    #: Stable name of the error.
    code: str
    #: Message of the error.
    error: str
    #: Traceback, if the model raised the error.
    traceback: str
    #: Batch of the last attempt.
    batch_id: str
    retries: int
    #: Keyword arguments of the task's message; `DeadLetters.asked` adds claimed inputs.
    payload: dict[str, Any]

    @classmethod
    def read(cls, task_id: str, fields: Mapping[bytes, bytes]) -> DeadLetter:
        """Return the dead letter from its hash."""
        text = {key.decode(): value.decode() for key, value in fields.items()}
        return cls(
            task_id=task_id,
            model=text["model"],
            version=int(text["version"]) if "version" in text else None,
            priority=int(text["priority"]),
            accepted_at=float(text["accepted_at"]),
            died_at=float(text["died_at"]),
            code=text["code"],
            error=text["error"],
            traceback=text.get("traceback", ""),
            batch_id=text["batch_id"],
            retries=int(text["retries"]),
            payload=loads(text.get("payload", "{}")),
        )


class DeadLetters:
    """Lists, shows and discards dead letters."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        """Store where letters are.

        Args:
          client: the Redis that holds the records; answers in bytes.
          settings: key prefix and lifetime of a letter.
        """
        self._redis = client
        self._prefix = settings.redis.prefix
        self._tasks = settings.tasks

    def count(self) -> int:
        """Return the number of letters.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        index = names.dead_index_key(self._prefix)
        # No transaction: a full Redis refuses it, and this deletes entries.
        with translated(), self._redis.pipeline(transaction=False) as pipe:
            # The letters expire by themselves; their ids in the index do not.
            pipe.zremrangebyscore(index, "-inf", time.time() - self._tasks.dead_ttl_s)
            pipe.zcard(index)
            return int(pipe.execute()[1])

    def newest(
        self, most: int, wanted: Callable[[DeadLetter], bool], after: Place | None = None
    ) -> Page[DeadLetter]:
        """Return a page of letters, newest first, without traceback and payload.

        Args:
          most: most letters of the page; see `tasks.state.listing.read_page`.
          wanted: whether a letter belongs on the page.
          after: last place of the page before.
        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        index = names.dead_index_key(self._prefix)
        return read_page(self._redis, index, self._outlines, wanted, most, after)

    def all(self) -> Iterator[DeadLetter]:
        """Yield all letters, newest first.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        ids = self._ids()
        for start in range(0, len(ids), CHUNK):
            yield from filter(None, self._read(ids[start : start + CHUNK]))

    def _ids(self) -> list[str]:
        with translated():
            ids = self._redis.zrange(names.dead_index_key(self._prefix), 0, -1, desc=True)
        return [task_id.decode() for task_id in cast(list[bytes], ids)]

    def _read(self, task_ids: Sequence[str]) -> list[DeadLetter | None]:
        with translated(), self._redis.pipeline(transaction=False) as pipe:
            for task_id in task_ids:
                pipe.hgetall(names.dead_key(self._prefix, task_id))
            found = zip(task_ids, pipe.execute(), strict=True)
        return [DeadLetter.read(task_id, fields) if fields else None for task_id, fields in found]

    def _outlines(self, task_ids: Sequence[str]) -> list[DeadLetter | None]:
        with translated(), self._redis.pipeline(transaction=False) as pipe:
            for task_id in task_ids:
                pipe.hmget(names.dead_key(self._prefix, task_id), _OUTLINE)
            found = zip(task_ids, pipe.execute(), strict=True)
        outlines = []
        for task_id, values in found:
            known = {
                name.encode(): value
                for name, value in zip(_OUTLINE, values, strict=True)
                if value is not None
            }
            outlines.append(DeadLetter.read(task_id, known) if known else None)
        return outlines

    def show(self, task_id: str) -> DeadLetter:
        """Return the dead letter of a task.

        Raises:
          TaskNotFound: the task has no dead letter.
          BrokerUnavailable: Redis does not answer.
        """
        (letter,) = self._read([task_id])
        if letter is None:
            raise TaskNotFound(f"no dead letter has the id {task_id!r}")
        return letter

    def asked(self, letter: DeadLetter) -> dict[str, Any]:
        """Return the keyword arguments of a dead task, with its claimed inputs if they still exist.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        if not claims.is_claim(letter.payload):
            return letter.payload
        with translated():
            found = self._redis.get(names.claim_key(self._prefix, letter.task_id))
        if found is None:
            return letter.payload
        return claims.complete(letter.payload, cast(bytes, found))

    def discard(self, task_id: str) -> None:
        """Delete a dead letter.

        Raises:
          TaskNotFound: the task has no dead letter.
          BrokerUnavailable: Redis does not answer.
        """
        if not self.delete([task_id]):
            raise TaskNotFound(f"no dead letter has the id {task_id!r}")

    def discard_all(self, count: int | None, model: str | None = None) -> int:
        """Delete all letters.

        Args:
          count: the number of letters that the caller expects, as a confirmation.
          model: delete only this model's letters; None for all models.
        Returns:
          the number of letters that were deleted.
        Raises:
          NotConfirmed: the number differs.
          BrokerUnavailable: Redis does not answer.
        """
        self.count()  # Removes the ids of expired letters.
        ids = self._ids()
        if model is not None:
            outlines = self._outlines(ids)
            ids = [one.task_id for one in outlines if one is not None and one.model == model]
        if len(ids) != count:
            raise NotConfirmed(f"{len(ids)} dead letters would be discarded", "confirm")
        return self.delete(ids) if ids else 0

    def delete(self, task_ids: Sequence[str]) -> int:
        """Delete letters and return their number; `keep_payloads` decides about claimed inputs.

        Raises:
          BrokerUnavailable: Redis does not answer.
        """
        with translated(), self._redis.pipeline(transaction=False) as pipe:
            for task_id in task_ids:
                pipe.delete(names.dead_key(self._prefix, task_id))
            pipe.zrem(names.dead_index_key(self._prefix), *task_ids)
            # A task without a letter may still be in flight, and need its inputs.
            found = zip(task_ids, pipe.execute(), strict=False)
            discarded = [task_id for task_id, deleted in found if deleted]
            for task_id in discarded:
                claim = names.claim_key(self._prefix, task_id)
                if self._tasks.keep_payloads == "never":
                    pipe.unlink(claim)
                else:
                    pipe.expire(claim, self._tasks.result_ttl_s)
            pipe.execute()
        return len(discarded)
