"""The Python way in: `async with Offloader("street.toml") as offload: result = await offload(x)`.

The source owns its requests: each is held here until its result is in, and is sent again when the worker that had it
died, was full or was leaving, when the connection broke, or when nothing came for a lease. Results are matched by id;
the first one counts, later twins are dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from brokers.config.pipeline_file import Pipeline, load_pipeline, resolve_broker_address
from brokers.config.schema import LOCAL_SITE
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import SourceLoad
from brokers.dispatch.stage_client import StageClient
from brokers.errors import DeadlinePassed, Disconnected, NoWorker, RequestError, no_broker_error
from brokers.mqtt.client_identity import create_transport
from brokers.protocol.messages import (
    Content,
    Failure,
    Message,
    Priority,
    ReplyTo,
    Result,
    Task,
    TaskDone,
    new_request_id,
)
from brokers.protocol.stage_timing import Hop
from brokers.protocol.topics import source_inbox_topic
from brokers.protocol.traceparent import TraceContext
from brokers.protocol.transport import Transport
from sources.client.adaptive_concurrency import AdaptiveConcurrency
from sources.client.inflight_limit import InflightLimit
from sources.client.pending_request import PendingRequest
from sources.client.places import PipelineWorkers
from sources.client.request_table import RequestTable, count_bounded
from sources.client.source_presence import RecentResultStats, SourcePresence
from sources.client.telemetry import emit_request_done, error_name, make_event_client
from sources.conversion import from_content_like, to_content

log = logging.getLogger(__name__)

# The wait for a worker with room ends at the deadline by itself, and says why; this is for the sending after it.
_SEND_GRACE_S = 0.05
# How long a request without a deadline waits for any worker to be up and have room.
WORKER_WAIT_S = 60.0
# Beyond what is being computed, so many are on their way for each worker of the widest stage, so that none waits for
# its next task: one that the worker has already, and one that is coming (tests/bench/dispatch.py).
PREFETCH_PER_WORKER = 2


@dataclass(frozen=True, slots=True)
class OffloadResult:
    """A result, and how it came about. `latency_ms` is the round trip, from `ask` to the result."""

    request_id: bytes
    content: Content
    hops: tuple[Hop, ...]
    latency_ms: float
    attempts: int


class Offloader:
    """Offloads work to a pipeline. At most `window` requests are in flight; further ones wait their turn.

    Left out, the window follows the workers that are up: start another, and more is in flight. Of a `live` source it is
    no larger than keeps them busy, since what waits gets old.

    `pipeline` is a pipeline file, or one that has been read. The broker is the one the file names for the source's
    site, or `SPARSE_BROKER`, unless `broker` (an address such as `mqtt://127.0.0.1:1883`) or `transport` says
    otherwise.
    """

    def __init__(
        self,
        pipeline: str | Path | Pipeline,
        *,
        broker: str | None = None,
        transport: Transport | None = None,
        name: str | None = None,
        window: int | None = None,
        live: bool = False,
    ) -> None:
        self.pipeline = pipeline if isinstance(pipeline, Pipeline) else load_pipeline(pipeline)
        self.name = name or f"{self.pipeline.source.name}-{new_request_id()[:4].hex()}"
        self.retries_by_reason: Counter[str] = Counter()  # by reason
        self.failures_by_error: Counter[str] = Counter()  # by error
        # By reason: what whoever feeds us let go before it became a request. Theirs to say.
        self.get_drop_counts: Callable[[], Mapping[str, int]] = dict
        # Two sources of one name must not take each other's place at the broker.
        client_id = f"source.{self.name}.{new_request_id()[:4].hex()}"
        self.channel = MessageChannel(transport or create_transport(self._address(broker), client_id=client_id))
        self._events = make_event_client(self.pipeline, self.name)
        self._inbox = source_inbox_topic(self.pipeline.source.site or LOCAL_SITE, self.name)
        self._lease_s = self.pipeline.pipeline.lease_s
        first = self.pipeline.topics(self.pipeline.stage[0])
        self._flights = RequestTable(self._lease_s)
        self.counters = self._flights.counters
        self._outbox = StageClient(
            self.channel,
            first,
            self._flights.on_task_lost,
            lease_s=self._lease_s,
            on_gap=self._flights.schedule_overdue_retries,
        )
        fixed = window or self.pipeline.source.window
        self.inflight_limit = InflightLimit(lambda: fixed or self._open_window(live))
        self._places = PipelineWorkers(
            self.pipeline,
            self._outbox,
            on_change=self.inflight_limit.wake_next,
            on_worker_lost=self._flights.schedule_overdue_retries,
        )
        self._saturation = AdaptiveConcurrency(self._places.worker_count)
        self._standing = SourcePresence(self.channel, self.pipeline, self.name, self._load)
        self._pace = RecentResultStats()

    def _load(self) -> SourceLoad:
        return SourceLoad(
            requests=self.counters["requests"],
            results=self.counters["results"],
            in_flight=len(self._flights),
            waiting=self.inflight_limit.waiting,
            window=self.inflight_limit.limit,
            rate=self._pace.results_per_s(time.monotonic()),
            latency_ms=self._pace.latency_ms(),
            dropped=dict(self.get_drop_counts()),
            retries=dict(self.retries_by_reason),
            failed=dict(self.failures_by_error),
            duplicates=self.counters["duplicates"],
        )

    def _open_window(self, live: bool) -> int:
        if live:
            return self._saturation.limit(self._places.concurrency + 1)
        return self._places.concurrency + PREFETCH_PER_WORKER * self._places.widest_stage_workers

    def _address(self, broker: str | None) -> str:
        address = resolve_broker_address(self.pipeline, self.pipeline.source.site, broker)
        if address is None:
            raise no_broker_error(self.pipeline.path, self.pipeline.source.site)
        return address

    async def __aenter__(self) -> Offloader:
        await self.channel.open(will=self._standing.will)
        self._events.open()
        self.channel.transport.on_reconnect(self._flights.on_reconnect)
        try:
            await self.channel.subscribe(self._inbox, self._heard, self._flights.on_malformed)
            await self._outbox.open()
            await self._places.subscribe()
            await self._standing.announce()
            self._standing.start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.abort("the offloader was closed")
        await self._standing.stop()
        await self._close()

    async def _close(self) -> None:
        await self._outbox.close()
        await self.channel.close()
        await asyncio.to_thread(self._events.close)  # a monitor that is slow may take a second

    async def abort(self, reason: str) -> None:
        """Have all requests that are in flight raise `Disconnected`, and all to come."""
        self._flights.fail_all(Disconnected(self.channel.transport.address, reason))
        await self._outbox.close()

    # Ask ----------------------------------------------------------------------------------------------------------

    async def __call__(self, value: Any, *, deadline_ms: float | None = None, priority: Priority | None = None) -> Any:
        """Offload one value and return its result.

        A tensor or array gives a tensor or array of the same library (a dict of them, if the pipeline gives several); a
        dict of them gives a dict; the bytes of a JPEG or PNG give what was found in it, as a dict. A `background`
        request goes after all that are `interactive`, here and at every worker.

        Raises `RequestFailed` (which stage, which worker, why), `PoisonRequest`, `DeadlinePassed`, `NoWorker`, or
        `TooLarge`.
        """
        answer = await self.request(to_content(value), deadline_ms=deadline_ms, priority=priority)
        return from_content_like(value, answer.content)

    async def request(
        self,
        content: Content,
        *,
        source: str = "",
        deadline_ms: float | None = None,
        priority: Priority | None = None,
        slot_acquired: bool = False,
        parent: TraceContext | None = None,
    ) -> OffloadResult:
        """Offload encoded content, and return the result as it came, with its hops.

        `entered`: the caller has entered the window already, with `window.enter`; it is left here. `parent`: the span
        that asks for it, of who traces what it does.
        """
        table = self.pipeline.source
        deadline_ms = table.deadline_ms if deadline_ms is None else deadline_ms
        flight = PendingRequest(new_request_id(), time.monotonic(), deadline_ms, priority or table.priority, parent)
        self.counters["requests"] += 1
        try:
            if not slot_acquired:
                await self._enter(flight)
            result = await self._fly(flight, content, source or self.name)
        except BaseException as error:
            if isinstance(error, RequestError):
                count_bounded(self.failures_by_error, error_name(error))
            emit_request_done(self._events, flight, content, error=error)
            raise
        emit_request_done(self._events, flight, content, result.hops)
        self.counters["results"] += 1
        latency_ms = 1000 * (time.monotonic() - flight.started_s)
        self._pace.record_result(latency_ms, time.monotonic())
        if flight.attempt == 1:  # else it says how long a fault took
            self._flights.record_latency(latency_ms / 1000)
            self._saturation.observe(result.hops, latency_ms)
        return OffloadResult(flight.request_id, result.content, result.hops, latency_ms, flight.attempt)

    async def _enter(self, flight: PendingRequest) -> None:
        try:
            async with asyncio.timeout(None if flight.deadline_ms is None else flight.deadline_ms / 1000):
                await self.inflight_limit.acquire(flight.priority)
        except TimeoutError:
            where = "the source, before its turn came"
            raise DeadlinePassed(flight.request_id.hex(), flight.deadline_ms or 0.0, where) from None

    async def _fly(self, flight: PendingRequest, content: Content, source: str) -> Result:
        """What is in the window, until it has settled one way or the other."""
        self._flights.add(flight)
        self.inflight_limit.add_bytes(content.nbytes)
        try:
            return await self._settle(flight, content, source)
        finally:
            self.inflight_limit.release(content.nbytes)
            self._flights.remove(flight)
            self._outbox.task_done(flight.worker, flight.request_id)

    async def _settle(self, flight: PendingRequest, content: Content, source: str) -> Result:
        """Send the request until a result is in; raise when no further attempt would help."""
        while True:
            flight.start_attempt()
            await self._send(flight, content, source)
            try:
                async with asyncio.timeout(flight.remaining_s(self._lease_s)):
                    word = await flight.responses.get()
            except TimeoutError:
                if flight.remaining_s(self._lease_s) <= 0:
                    where = f"the source, after {flight.attempt} attempts"
                    raise DeadlinePassed(flight.request_id.hex(), flight.deadline_ms or 0.0, where) from None
                flight.fail_attempt("", flight.worker, "NoAnswer", f"nothing was heard of it for {self._lease_s:g} s")
                word = flight.responses.get_nowait()
            if isinstance(word, Result):
                return word
            if isinstance(word, Disconnected):
                raise word
            if isinstance(word, Failure):
                await asyncio.sleep(flight.remaining_s(flight.retry_delay(word)))
                log.info("request %s: %s at %s: again", flight.request_id.hex(), word.error, word.worker)
            self.counters["retries"] += 1
            count_bounded(self.retries_by_reason, word if isinstance(word, str) else word.error)
            # The next attempt is another task: what the last one's worker had in hand says nothing of it.
            self._outbox.task_done(flight.worker, flight.request_id)

    async def _send(self, flight: PendingRequest, content: Content, source: str) -> None:
        left_s = flight.remaining_s(WORKER_WAIT_S)
        if left_s <= 0:
            raise DeadlinePassed(flight.request_id.hex(), flight.deadline_ms or 0.0, "the source, before it was sent")
        task = Task(
            request_id=flight.request_id,
            content=content,
            reply_to=ReplyTo(self._inbox),
            sender_inbox=self._inbox,
            source=source,
            attempt=flight.attempt,
            deadline_ms=None if flight.deadline_ms is None else 1000 * left_s,
            priority=flight.priority,
            trace=flight.trace,
        )
        try:
            # While the broker is away sending waits for it: with a deadline, no longer than that.
            async with asyncio.timeout(None if flight.deadline_ms is None else left_s + _SEND_GRACE_S):
                flight.worker = await self._outbox.send(task, timeout_s=left_s, avoid=frozenset(flight.avoid))
        except TimeoutError:
            where = f"the source, on the way to {self.channel.transport.address}"
            raise DeadlinePassed(flight.request_id.hex(), flight.deadline_ms or 0.0, where) from None
        except NoWorker:
            if flight.deadline_ms is not None and len(self._outbox):
                where = f"the door of stage {self.pipeline.stage[0].name!r}, whose workers are all full"
                raise DeadlinePassed(flight.request_id.hex(), flight.deadline_ms, where) from None
            raise

    # Heard --------------------------------------------------------------------------------------------------------

    def _heard(self, topic: str, message: Message) -> None:
        if isinstance(message, TaskDone):
            self._outbox.task_done(message.worker, message.request_id)
            return
        self._flights.on_message(message)
