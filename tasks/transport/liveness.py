"""Liveness: which consumers of a lane are dead, so that others take over what they held.

Each consumer reports with every heartbeat. When the reports stop, its connections decide: Redis
closes those of a killed process at once, and keeps those of a process that is busy or paused.
"""

from __future__ import annotations

from time import monotonic

import redis
from kombu.utils.encoding import bytes_to_str

from tasks.transport.lane import consumer_name


class Liveness:
    """One channel's view of the other consumers."""

    #: Missed heartbeats after which a consumer's connections are looked for.
    SUSPICIOUS_BEATS = 3
    #: Consecutive heartbeats without connections after which a suspect counts as dead.
    ABSENCES = 2

    def __init__(self, heartbeat_interval: float, grace: float) -> None:
        """Store the intervals.

        Args:
          heartbeat_interval: seconds between two reports.
          grace: seconds after a restart of Redis, or after our own reconnect, during which nobody
            counts as dead.
        """
        self._interval = heartbeat_interval
        self._grace = grace
        #: Seconds of silence after which a consumer is suspected.
        self._suspicious_s = self.SUSPICIOUS_BEATS * heartbeat_interval
        # Times are those of `monotonic`.
        self._began_at = float("-inf")
        self._reported_at = float("-inf")
        self._patient_until = float("-inf")
        #: Consecutive heartbeats for which each suspect had no connection.
        self._absences: dict[str, int] = {}

    @property
    def due(self) -> bool:
        """Whether it is time for the next heartbeat."""
        return monotonic() >= self._began_at + self._interval

    def begin(self) -> None:
        """Note that a heartbeat begins."""
        self._began_at = monotonic()

    def dead(
        self, client: redis.Redis, redis_ms: int, lanes: list[list[bytes]]
    ) -> list[dict[str, bytes]]:
        """Return the dead consumers of each lane, with their last reports.

        Args:
          client: tells which connections there are.
          redis_ms: time of the heartbeat by Redis' clock, in milliseconds.
          lanes: for each lane, a flat list of its consumers and their last reports, with our own
            report as it was before this heartbeat.
        """
        reports = [
            {bytes_to_str(name): report for name, report in zip(flat[::2], flat[1::2], strict=True)}
            for flat in lanes
        ]
        # A list: every lane's own report is taken out.
        returning = any([each.pop(consumer_name(), None) is not None for each in reports])
        self._note_report(returning)
        dead = self._find(client, redis_ms, reports)
        return [{name: each[name] for name in each.keys() & dead} for each in reports]

    def _note_report(self, returning: bool) -> None:
        first = self._reported_at == float("-inf")
        silent = not first and self._began_at - self._reported_at > self._suspicious_s
        # After a silence others may not have been able to report either. When a new channel finds a
        # report of this process, its connection was lost, and perhaps those of others.
        if silent or (first and returning):
            self._patient_until = self._began_at + self._grace
        self._reported_at = self._began_at

    def _find(
        self, client: redis.Redis, redis_ms: int, reports: list[dict[str, bytes]]
    ) -> set[str]:
        suspects, dead = set(), set()
        for name, (reported_ms, lease_ms) in _newest(reports).items():
            silence_ms = redis_ms - reported_ms
            if silence_ms > lease_ms:
                dead.add(name)
            elif silence_ms > self._suspicious_s * 1000:
                suspects.add(name)
        if suspects:
            suspects -= {connection["name"] for connection in client.client_list()}
        self._absences = {name: self._absences.get(name, 0) + 1 for name in suspects}
        dead |= {name for name, times in self._absences.items() if times >= self.ABSENCES}
        return set() if dead and self._is_patient(client) else dead

    def _is_patient(self, client: redis.Redis) -> bool:
        """Return whether everyone may be on the way back: then nobody counts as dead."""
        if monotonic() < self._patient_until:
            return True
        return int(client.info("server")["uptime_in_seconds"]) < self._grace


def _newest(reports: list[dict[str, bytes]]) -> dict[str, tuple[int, int]]:
    """Return the newest report of each consumer: its time and lease, in milliseconds.

    A consumer that has stopped consuming one lane still reports for its others.
    """
    newest: dict[str, tuple[int, int]] = {}
    for name, report in (item for lane in reports for item in lane.items()):
        reported_ms, lease_ms = map(int, report.split())
        newest[name] = max(newest.get(name, (0, 0)), (reported_ms, lease_ms))
    return newest
