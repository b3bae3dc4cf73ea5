"""Who is here, from what anybody may hear: the presence records of workers and sources. Pure."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from brokers.dispatch.presence import Birth, SourceBirth
from brokers.errors import WireError
from brokers.protocol.topics import tells_of_source

# Workers and sources report every second.
LOST_S = 10.0
# Records that are kept of each kind: more than anybody runs, and an end to what a hostile client can make us hold.
RECORDS_LIMIT = 4096
_RECENT_SOURCES = 8


@dataclass(slots=True)
class Roll:
    """The latest of each worker and source. Times are monotonic seconds of the listener.

    Whoever wants to know of their work as well derives from it.
    """

    pipeline: str = ""  # whose work counts; empty: any
    workers: dict[str, Birth] = field(default_factory=dict)  # by presence topic: an id is one stage's own
    sources: dict[str, SourceBirth] = field(default_factory=dict)  # by presence topic
    garbage: int = 0
    _left: deque[SourceBirth] = field(default_factory=lambda: deque(maxlen=_RECENT_SOURCES))
    _heard_s: dict[str, float] = field(default_factory=dict)  # by presence topic
    _alive: set[str] = field(default_factory=set)  # presence topics

    def heard_birth(self, topic: str, payload: bytes, now_s: float, *, retained: bool = False) -> None:
        """A presence topic changed: a record, or nothing when the worker is gone; what is neither is counted.

        `retained`: the broker had kept it, from whenever it was; no sign of life.
        """
        kept: dict[str, Birth] | dict[str, SourceBirth]
        kept, kind = (self.sources, SourceBirth) if tells_of_source(topic) else (self.workers, Birth)
        if not payload:
            left = kept.pop(topic, None)
            if isinstance(left, SourceBirth):
                self._left.append(left)
            self._heard_s.pop(topic, None)
            self._alive.discard(topic)
            return
        try:
            record: Any = self._checked(topic, kind.from_bytes(payload), now_s)
        except WireError:
            self.garbage += 1
            return
        if topic not in kept and len(kept) >= RECORDS_LIMIT:
            self.garbage += 1
            return
        kept[topic] = record
        self._heard_s[topic] = now_s
        if not retained:
            self._alive.add(topic)

    def _checked(self, topic: str, record: Birth | SourceBirth, now_s: float) -> Birth | SourceBirth:
        """What is kept of a record; raises a `WireError` for one that shall not be."""
        return record

    def is_lost(self, topic: str, now_s: float) -> bool:
        """Whether a worker or source has missed ten reports in a row: it is frozen, or its line is."""
        return now_s - self._heard_s[topic] > LOST_S

    @property
    def silent(self) -> set[str]:
        """The topics of workers and sources of which there is a record and nothing else, so far."""
        return (self.workers.keys() | self.sources.keys()) - self._alive

    def troubles(self) -> dict[str, Counter[str]]:
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
    def heard(self) -> int:
        """How much has been heard of the work."""
        return 0

    def heard_result(self, payload: bytes, now_s: float) -> None:
        """Something was published about the work; anybody may publish there, so what cannot be read is counted."""

    def news(self) -> list[str]:
        """What has happened since this was last asked that deserves a line of its own."""
        return []
