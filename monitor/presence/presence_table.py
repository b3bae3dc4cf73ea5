"""Who is here, from what anybody may hear: the presence records of workers and sources. Pure."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from brokers.dispatch.presence import SourceRecord, WorkerRecord
from brokers.errors import WireError
from brokers.protocol.topics import is_source_presence

# Workers and sources report every second.
LOST_AFTER_S = 10.0
# Records that are kept of each kind: more than anybody runs, and an end to what a hostile client can make us hold.
RECORDS_LIMIT = 4096
_RECENT_SOURCES = 8


@dataclass(slots=True)
class PresenceTable:
    """The latest of each worker and source. Times are monotonic seconds of the listener.

    Whoever wants to know of their work as well derives from it.
    """

    pipeline: str = ""  # whose work counts; empty: any
    workers: dict[str, WorkerRecord] = field(default_factory=dict)  # by presence topic: an id is one stage's own
    sources: dict[str, SourceRecord] = field(default_factory=dict)  # by presence topic
    rejected: int = 0
    _left: deque[SourceRecord] = field(default_factory=lambda: deque(maxlen=_RECENT_SOURCES))
    _last_seen_s: dict[str, float] = field(default_factory=dict)  # by presence topic
    _confirmed: set[str] = field(default_factory=set)  # presence topics

    def on_presence(self, topic: str, payload: bytes, now_s: float, *, retained: bool = False) -> None:
        """A presence topic changed: a record, or nothing when the worker is gone; what is neither is counted.

        `retained`: the broker had kept it, from whenever it was; no sign of life.
        """
        kept: dict[str, WorkerRecord] | dict[str, SourceRecord]
        kept, kind = (self.sources, SourceRecord) if is_source_presence(topic) else (self.workers, WorkerRecord)
        if not payload:
            left = kept.pop(topic, None)
            if isinstance(left, SourceRecord):
                self._left.append(left)
            self._last_seen_s.pop(topic, None)
            self._confirmed.discard(topic)
            return
        try:
            record: Any = self._validate(topic, kind.from_bytes(payload), now_s)
        except WireError:
            self.rejected += 1
            return
        if topic not in kept and len(kept) >= RECORDS_LIMIT:
            self.rejected += 1
            return
        kept[topic] = record
        self._last_seen_s[topic] = now_s
        if not retained:
            self._confirmed.add(topic)

    def _validate(self, topic: str, record: WorkerRecord | SourceRecord, now_s: float) -> WorkerRecord | SourceRecord:
        """What is kept of a record; raises a `WireError` for one that shall not be."""
        return record

    def is_lost(self, topic: str, now_s: float) -> bool:
        """Whether a worker or source has missed ten reports in a row: it is frozen, or its line is."""
        return now_s - self._last_seen_s[topic] > LOST_AFTER_S

    @property
    def unconfirmed_topics(self) -> set[str]:
        """The topics of workers and sources of which there is a record and nothing else, so far."""
        return (self.workers.keys() | self.sources.keys()) - self._confirmed

    def problem_counts(self) -> dict[str, Counter[str]]:
        """What the sources, those that have left too, say was `retried`, `dropped` and `failed`, by reason, in sum."""
        found: dict[str, Counter[str]] = {"retried": Counter(), "dropped": Counter(), "failed": Counter()}
        for birth in (*self._left, *self.sources.values()):
            found["retried"].update(birth.load.retries)
            found["dropped"].update(birth.load.dropped)
            found["failed"].update(birth.load.failed)
        return found

    def stages_up(self) -> set[str]:
        """The stages that have a worker."""
        return {birth.stage for birth in self.workers.values() if birth.state == "up"}

    @property
    def results_received(self) -> int:
        """How much has been heard of the work."""
        return 0

    def on_result(self, payload: bytes, now_s: float) -> None:
        """Something was published about the work; anybody may publish there, so what cannot be read is counted."""

    def pop_notices(self) -> list[str]:
        """What has happened since this was last asked that deserves a line of its own."""
        return []
