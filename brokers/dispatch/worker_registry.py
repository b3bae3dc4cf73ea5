"""Registry of the workers and sources that are up: the only code in Sparse that reads presence records.

A worker or source keeps a retained JSON record on its own presence topic, renews it every second, and clears it
with an empty payload, by itself or by its last will (docs/protocol.md, "Presence"). `WorkerRegistry` turns these
publications into events. It is a core that decides: topic, payload, retained flag and time are arguments, so it needs
no network. `PresenceListener` connects a registry to a transport and its event loop.

The rules:

 1. An entry belongs to a topic. A record counts only on the topic of the worker or source that it names.
 2. The first record makes an entry: event `appeared`. A further record of the same process is `updated`.
 3. An empty payload removes the entry: `lost`, reason "removed".
 4. After PRESENCE_TIMEOUT_S without a record the process is frozen or cut off: `lost`, reason "silent". The entry
    stays, marked `is_lost`, until its next record (`appeared`), or until FORGET_AFTER_S.
 5. A record with another process id or instance is from a new process: `lost`, reason "restarted", then `appeared`.
 6. `gap` replaces `updated` when messages to or from the process may have been lost: more than PRESENCE_GAP_S since its
    previous record (a bridge between two sites was down), or another `reconnects` count (it had lost its broker).
 7. A retained record proves only that the process was up at some time. The entry is `is_live` once a record has arrived
    that was published while we listened, and `is_renewed` once such a record has followed an earlier one (when a bridge
    connects, old retained records arrive as if they were published just then).
 8. `reset`, for use after our own connection broke: every entry is `lost`, reason "disconnected", and retained records
    are ignored from then on, since their process may have lost the broker too and not be back.
 9. A payload that is not a record, or whose record belongs on another topic, is `rejected`; the entry of that topic
    stays as it is. It is logged once per topic.
10. There are at most ENTRY_LIMIT workers and as many sources: records on further topics are `rejected`.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

from brokers.dispatch.presence import SourceRecord, WorkerRecord
from brokers.errors import BadPayload, WireError
from brokers.protocol.messages import JSON
from brokers.protocol.topics import is_source_presence, last_level
from brokers.protocol.transport import Delivery, Transport

log = logging.getLogger(__name__)

# Records are renewed every second: ten in a row are missing.
PRESENCE_TIMEOUT_S = 10.0
PRESENCE_GAP_S = 3.0
FORGET_AFTER_S = 300.0
ENTRY_LIMIT = 4096  # more than any deployment has, and a bound on the memory that a hostile client can make us use
_LOGGED_TOPICS_LIMIT = 64  # topics whose first malformed record is logged
_TICK_S = 1.0

PresenceRecord = WorkerRecord | SourceRecord
EventKind = Literal["appeared", "updated", "gap", "lost", "rejected"]
LossReason = Literal["removed", "silent", "restarted", "disconnected"]
R = TypeVar("R", WorkerRecord, SourceRecord)


@dataclass(frozen=True, slots=True)
class PresenceEvent:
    """A change of one entry. `record` is the newest valid record; the last one if `lost`; None if `rejected`."""

    kind: EventKind
    topic: str
    record: PresenceRecord | None = None
    retained: bool = False
    reason: LossReason | None = None  # of `lost`
    error: WireError | None = None  # of `rejected`

    @property
    def name(self) -> str:
        """The worker or source that the topic belongs to."""
        return last_level(self.topic)

    @property
    def worker(self) -> WorkerRecord | None:
        return self.record if isinstance(self.record, WorkerRecord) else None

    @property
    def source(self) -> SourceRecord | None:
        return self.record if isinstance(self.record, SourceRecord) else None


@dataclass(slots=True)
class PresenceEntry(Generic[R]):
    """One worker or source. Times are those that the registry was given, in seconds."""

    record: R
    last_seen_s: float
    is_live: bool
    is_renewed: bool = False
    is_lost: bool = False

    def is_silent(self, now_s: float) -> bool:
        """Whether PRESENCE_TIMEOUT_S have passed since its last record."""
        return self.is_lost or now_s - self.last_seen_s > PRESENCE_TIMEOUT_S


@dataclass(slots=True)
class WorkerRegistry:
    """The newest record of each worker and source, by presence topic, the first to appear first."""

    workers: dict[str, PresenceEntry[WorkerRecord]] = field(default_factory=dict)
    sources: dict[str, PresenceEntry[SourceRecord]] = field(default_factory=dict)
    rejected: int = 0
    _ignore_retained: bool = False
    _logged_topics: set[str] = field(default_factory=set)

    def on_message(self, topic: str, payload: bytes, now_s: float, *, retained: bool = False) -> list[PresenceEvent]:
        """Apply one publication on a presence topic."""
        if is_source_presence(topic):
            return list(self._apply(self.sources, SourceRecord, topic, payload, now_s, retained))
        return list(self._apply(self.workers, WorkerRecord, topic, payload, now_s, retained))

    def tick(self, now_s: float) -> list[PresenceEvent]:
        """Find the processes that have become silent; to be called about once a second."""
        return [*self._expire(self.workers, now_s), *self._expire(self.sources, now_s)]

    def reset(self) -> list[PresenceEvent]:
        """Lose all entries, because our own connection broke, and ignore retained records from now on."""
        self._ignore_retained = True
        return [*self._remove_all(self.workers), *self._remove_all(self.sources)]

    def entries(self) -> list[PresenceEntry[WorkerRecord] | PresenceEntry[SourceRecord]]:
        """All workers, then all sources."""
        return [*self.workers.values(), *self.sources.values()]

    def workers_up(self, now_s: float, stage: str | None = None) -> list[WorkerRecord]:
        """The workers (of one stage) in state "up" that are not silent, the first to appear first."""
        return [
            entry.record
            for entry in self.workers.values()
            if entry.record.state == "up" and stage in (None, entry.record.stage) and not entry.is_silent(now_s)
        ]

    def _apply(
        self,
        entries: dict[str, PresenceEntry[R]],
        record_type: type[R],
        topic: str,
        payload: bytes,
        now_s: float,
        retained: bool,
    ) -> Iterator[PresenceEvent]:
        entry = entries.get(topic)
        if not payload:
            entries.pop(topic, None)
            if entry is not None and not entry.is_lost:
                yield PresenceEvent("lost", topic, entry.record, retained, reason="removed")
            return
        if retained and self._ignore_retained:
            return
        try:
            record = record_type.from_bytes(payload)
            if record.topic != topic:
                raise BadPayload(JSON, f"not a presence record of this topic: it belongs on {record.topic}")
            if entry is None and len(entries) >= ENTRY_LIMIT:
                raise BadPayload(JSON, f"one more presence record than {ENTRY_LIMIT}, which are kept")
        except WireError as error:
            yield self._reject(topic, error, retained)
            return
        if entry is not None and not entry.is_lost and _same_process(entry.record, record):
            has_gap = now_s - entry.last_seen_s > PRESENCE_GAP_S or _reconnects(record) != _reconnects(entry.record)
            entry.record = record
            entry.last_seen_s = now_s
            if not retained:
                entry.is_live = entry.is_renewed = True
            yield PresenceEvent("gap" if has_gap else "updated", topic, record, retained)
            return
        if entry is not None:
            del entries[topic]  # the new process is the last to appear
            if not entry.is_lost:
                yield PresenceEvent("lost", topic, entry.record, retained, reason="restarted")
        entries[topic] = PresenceEntry(record, now_s, is_live=not retained)
        yield PresenceEvent("appeared", topic, record, retained)

    def _reject(self, topic: str, error: WireError, retained: bool) -> PresenceEvent:
        self.rejected += 1
        if topic not in self._logged_topics and len(self._logged_topics) < _LOGGED_TOPICS_LIMIT:
            self._logged_topics.add(topic)
            log.warning("ignored a message on presence topic %s: %s", topic, error)
        return PresenceEvent("rejected", topic, retained=retained, error=error)

    def _remove_all(self, entries: dict[str, PresenceEntry[R]]) -> list[PresenceEvent]:
        events = [
            PresenceEvent("lost", topic, entry.record, reason="disconnected")
            for topic, entry in entries.items()
            if not entry.is_lost
        ]
        entries.clear()
        return events

    def _expire(self, entries: dict[str, PresenceEntry[R]], now_s: float) -> Iterator[PresenceEvent]:
        for topic, entry in list(entries.items()):
            if entry.is_silent(now_s) and not entry.is_lost:
                entry.is_lost = True
                yield PresenceEvent("lost", topic, entry.record, reason="silent")
            if now_s - entry.last_seen_s > FORGET_AFTER_S:
                del entries[topic]


def _same_process(one: PresenceRecord, other: PresenceRecord) -> bool:
    # In containers all process ids are alike, and foreign workers may leave `instance` out: either can differ.
    return (one.pid, one.instance) == (other.pid, other.instance)


def _reconnects(record: PresenceRecord) -> int:
    return record.reconnects if isinstance(record, WorkerRecord) else 0


EventCallback = Callable[[PresenceEvent], None]


class PresenceListener:
    """Keeps a `WorkerRegistry` up to date from a transport, on its event loop, and reports the events.

    Callbacks run on the loop, in the order in which they were added; they must not block. With `reset_on_reconnect` the
    registry is reset when the transport has reconnected: a process that sends tasks must then assume that they were
    lost. A process that only shows the workers leaves it out.
    """

    def __init__(
        self, transport: Transport, on_event: EventCallback | None = None, *, reset_on_reconnect: bool = False
    ) -> None:
        self.registry = WorkerRegistry()
        self._transport = transport
        self._callbacks = [] if on_event is None else [on_event]
        self._reset_on_reconnect = reset_on_reconnect
        self._filters: list[str] = []
        self._changed = asyncio.Event()
        self._ticker: asyncio.Task[None] | None = None
        self._closed = False

    def add_callback(self, on_event: EventCallback) -> None:
        self._callbacks.append(on_event)

    async def subscribe(self, *topic_filters: str) -> None:
        """Listen to presence topics; return when the broker has confirmed. May be called again for further ones."""
        if self._ticker is None:
            if self._reset_on_reconnect:
                self._transport.on_reconnect(self._on_reconnect)
            self._ticker = asyncio.create_task(self._keep_ticking(), name="presence-ticker")
        for topic_filter in topic_filters:
            self._filters.append(topic_filter)
            await self._transport.subscribe(topic_filter, self._on_delivery, qos=1)

    async def wait_for(self, predicate: Callable[[WorkerRegistry], bool], timeout_s: float) -> bool:
        """Wait until `predicate(registry)` holds, and return True; False after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not predicate(self.registry):
                    self._changed.clear()
                    await self._changed.wait()
                return True
        return False

    async def unsubscribe(self) -> None:
        """Stop listening, and end the subscriptions."""
        await self.close()
        for topic_filter in self._filters:
            await self._transport.unsubscribe(topic_filter)

    async def close(self) -> None:
        """Stop listening; the subscriptions end with the transport. May be called twice."""
        self._closed = True
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)

    def tick(self, now_s: float | None = None) -> None:
        """Report the processes that are silent by `now_s` (default: now); done every second by itself."""
        self._report(self.registry.tick(time.monotonic() if now_s is None else now_s))

    def _on_delivery(self, delivery: Delivery) -> None:
        if not self._closed:
            payload = bytes(delivery.payload)
            self._report(self.registry.on_message(delivery.topic, payload, time.monotonic(), retained=delivery.retain))

    async def _on_reconnect(self) -> None:
        if not self._closed:
            self._report(self.registry.reset())

    async def _keep_ticking(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.tick()

    def _report(self, events: list[PresenceEvent]) -> None:
        for event in events:
            for callback in self._callbacks:
                callback(event)
        if events:
            self._changed.set()
