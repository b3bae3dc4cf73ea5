"""The Python API of a pipeline.

    async with Offloader("street.toml") as offload:
        result = await offload(x)

The source owns its requests: each is kept here until its result arrives. It is sent again when its worker is lost, is
full or drains, when the connection breaks, and when there is no response within a lease: at-least-once delivery with
deduplication. Results are matched by request id; the first one counts, later duplicates are dropped and counted.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from brokers.config.pipeline_file import Pipeline, load_pipeline, require_broker_address
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.presence import LatencyPercentiles, SourceLoad, WorkerRecord
from brokers.dispatch.stage_client import StageClient
from brokers.dispatch.worker_registry import PresenceEvent
from brokers.errors import Disconnected, NoWorker, RequestError
from brokers.protocol.messages import Content, Failure, Message, Priority, Result, TaskDone, new_request_id
from brokers.protocol.topics import source_inbox_topic
from brokers.protocol.traceparent import TraceContext
from brokers.protocol.transport import Transport
from brokers.telemetry.client import event_client_from_environment
from brokers.telemetry.recent_results import RecentResults
from sources.client.inflight_limit import AdaptiveConcurrency, InflightLimit, Slot
from sources.client.pending_request import PendingRequest, RequestTable, count_bounded, failure_code
from sources.client.source_presence import SourcePresence, create_source_transport
from sources.conversion import from_content_like, to_content

log = logging.getLogger(__name__)

# Added to the deadline of sending: waiting for a worker with a free slot ends at the deadline with a better error.
_SEND_GRACE_S = 0.05
# Requests without a deadline wait this long for a worker with a free slot.
WORKER_WAIT_S = 60.0
# Requests in flight beyond those that are computed, per worker of the widest stage: one that waits in the worker's
# queue, and one on its way there (measured by tests/bench/dispatch.py).
PREFETCH_PER_WORKER = 2


class Offloader:
    """Sends requests to a pipeline and awaits their results. At most `window` requests are in flight; others wait.

    `pipeline` is a pipeline file or a loaded one. The broker is that of the source's site in the file, or the one that
    `SPARSE_BROKER` names, unless `broker` (an address such as `mqtt://127.0.0.1:1883`) or `transport` is given.
    `window` defaults to that of the file, else it follows the number of workers that are up. A `live` source has no
    more in flight than the workers need to be busy (see `AdaptiveConcurrency`): waiting makes results older.

    Raises `UsageError` ("NoBroker") where no broker is named, and `BrokerUnreachable` and `OperationRefused` on
    entering the context.
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
        self.retries_by_reason: Counter[str] = Counter()
        self.failures_by_error: Counter[str] = Counter()
        # Samples that were dropped before they became requests, by reason; the owner of the input sets it.
        self.get_drop_counts: Callable[[], Mapping[str, int]] = dict
        site = self.pipeline.source.site
        self.channel = MessageChannel(
            transport or create_source_transport(self.name, require_broker_address(self.pipeline, site, broker))
        )
        self._events = event_client_from_environment(
            os.environ, "source", self.name, site=site, pipeline=self.pipeline.name, source=self.name
        )
        self._inbox = source_inbox_topic(site, self.name)
        self._lease_s = self.pipeline.pipeline.lease_s
        self._requests = RequestTable(self._lease_s)
        self.counters = self._requests.counters
        self._first_stage = StageClient(
            self.channel,
            self.pipeline.topics(self.pipeline.stage[0]),
            self._requests.on_task_lost,
            lease_s=self._lease_s,
            on_gap=self._requests.schedule_overdue_retries,
        )
        fixed_window = window or self.pipeline.source.window
        self.inflight_limit = InflightLimit(lambda: fixed_window or self._worker_window(live))
        self._first_stage.presence.add_callback(self._on_presence)
        self._concurrency = AdaptiveConcurrency(lambda stage: len(self._workers_up(stage)))
        self._presence = SourcePresence(self.channel, self.pipeline, self.name, self._load)
        self._recent = RecentResults()

    def _workers_up(self, stage: str | None = None) -> list[WorkerRecord]:
        return self._first_stage.presence.registry.workers_up(time.monotonic(), stage)

    def _worker_window(self, live: bool) -> int:
        """The window for the workers that are up; before the first one for those of the pipeline file."""
        batch_sizes = [(worker.stage, worker.batch_size) for worker in self._workers_up()]
        if not batch_sizes:
            batch_sizes = [(stage.name, stage.max_batch) for stage in self.pipeline.stage for _ in range(stage.workers)]
        concurrency = sum(size for _, size in batch_sizes)
        if live:
            return self._concurrency.limit(concurrency + 1)
        return concurrency + PREFETCH_PER_WORKER * max(Counter(stage for stage, _ in batch_sizes).values())

    def _on_presence(self, event: PresenceEvent) -> None:
        if event.worker is None:
            return
        # A worker of a later stage may have held requests of ours, and the worker that would report them lost may be
        # lost too. The stage client reports those of the first stage.
        is_lost = event.kind == "gap" or (event.kind == "lost" and event.worker.state != "stopped")
        if is_lost and event.worker.stage != self.pipeline.stage[0].name:
            self._requests.schedule_overdue_retries()
        self.inflight_limit.wake_next()

    def _load(self) -> SourceLoad:
        return SourceLoad(
            requests=self.counters["requests"],
            results=self.counters["results"],
            in_flight=len(self._requests),
            waiting=self.inflight_limit.waiting,
            window=self.inflight_limit.limit,
            rate=round(self._recent.rate(time.monotonic()), 2),
            latency_ms=LatencyPercentiles(**self._recent.latency_ms(50, 99)),
            dropped=dict(self.get_drop_counts()),
            retries=dict(self.retries_by_reason),
            failed=dict(self.failures_by_error),
            duplicates=self.counters["duplicates"],
        )

    async def __aenter__(self) -> Offloader:
        await self.channel.open(will=self._presence.will)
        self._events.open()
        self.channel.transport.on_reconnect(self._requests.on_reconnect)
        try:
            await self.channel.subscribe(self._inbox, self._on_message, self._requests.on_malformed)
            await self._first_stage.open()
            later_stages = (self.pipeline.topics(stage) for stage in self.pipeline.stage[1:])
            await self._first_stage.presence.subscribe(*(topics.presence_filter for topics in later_stages))
            await self._presence.start()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.abort("the offloader was closed")
        await self._presence.stop()
        await self._close()

    async def _close(self) -> None:
        await self._first_stage.close()
        await self.channel.close()
        await asyncio.to_thread(self._events.close)  # blocks up to a second on a slow monitor

    async def abort(self, reason: str) -> None:
        """End all requests, present and future, with `Disconnected`."""
        self._requests.fail_all(Disconnected(self.channel.transport.address, reason))
        await self._first_stage.close()

    async def __call__(self, value: Any, *, deadline_ms: float | None = None, priority: Priority | None = None) -> Any:
        """Offload one value and return its result.

        An array or tensor returns one of the same library (a dict of them if the pipeline has several outputs), a dict
        of arrays returns a dict, the bytes of a JPEG or PNG return a dict of the objects or classes found in it.
        `deadline_ms` counts from this call. A `background` request is served after all `interactive` ones, here and at
        every worker. Both default to those of the pipeline file.

        Raises `RequestFailed` (which stage and worker failed, and why), `PoisonRequest`, `DeadlinePassed`, `NoWorker`,
        `Disconnected`, `TooLarge`, and `BadPayload` for any other value.
        """
        request = await self.request(to_content(value), deadline_ms=deadline_ms, priority=priority)
        return from_content_like(value, request.result.content)

    def slot(self, priority: Priority | None = None) -> AbstractAsyncContextManager[Slot]:
        """A slot of the in-flight window, held within `async with`.

        A live source takes its newest sample once it holds a slot, and passes the slot to `request`.
        """
        return self.inflight_limit.slot(priority or self.pipeline.source.priority)

    async def request(
        self,
        content: Content,
        *,
        source: str = "",
        deadline_ms: float | None = None,
        priority: Priority | None = None,
        slot: Slot | None = None,
        parent: TraceContext | None = None,
    ) -> PendingRequest:
        """Offload encoded content; return the request with its `result`, `latency_ms` and number of attempts.

        `source` is the name that stages see, `slot` a slot that the caller holds, `parent` the caller's trace span.
        Raises as `__call__` does.
        """
        table = self.pipeline.source
        deadline_ms = table.deadline_ms if deadline_ms is None else deadline_ms
        request = PendingRequest(content, source or self.name, deadline_ms, priority or table.priority, parent)
        failure: BaseException | None = None
        self.counters["requests"] += 1
        try:
            if slot is None:
                await self._run_in_own_slot(request)
            else:
                await self._run(request, slot)
        except BaseException as error:
            failure = error
            if isinstance(error, RequestError):
                count_bounded(self.failures_by_error, failure_code(error))
            raise
        finally:
            request.latency_ms = 1000 * (time.monotonic() - request.started_s)
            request.emit_done(self._events, failure)
        self.counters["results"] += 1
        self._recent.add(request.latency_ms, time.monotonic())
        if request.attempt == 1:  # the latency of a retried request includes the time to detect the fault
            self._requests.latencies_s.append(request.latency_ms / 1000)
            self._concurrency.observe(request.result.hops, request.latency_ms)
        return request

    async def _run_in_own_slot(self, request: PendingRequest) -> None:
        deadline_s = None if request.deadline_ms is None else request.deadline_ms / 1000
        try:
            async with asyncio.timeout(deadline_s) as timeout, self.slot(request.priority) as slot:
                timeout.reschedule(None)  # the attempts observe the deadline themselves
                await self._run(request, slot)
        except TimeoutError:
            if not timeout.expired():
                raise
            raise request.deadline_passed("the source, while it waited for a slot") from None

    async def _run(self, request: PendingRequest, slot: Slot) -> None:
        self._requests[request.request_id] = request
        slot.add_bytes(request.content.nbytes)
        try:
            request.result = await self._attempt_until_done(request)
        finally:
            del self._requests[request.request_id]
            self._first_stage.task_done(request.worker, request.request_id)

    async def _attempt_until_done(self, request: PendingRequest) -> Result:
        """Send the request until its result arrives; raise when no further attempt would help."""
        while True:
            request.start_attempt()
            await self._send(request)
            try:
                async with asyncio.timeout(request.remaining_s(self._lease_s)):
                    response = await request.responses.get()
            except TimeoutError:
                if request.remaining_s(self._lease_s) <= 0:
                    raise request.deadline_passed(f"the source, after {request.attempt} attempts") from None
                request.fail_attempt("", request.worker, "NoAnswer", f"no response within {self._lease_s:g} s")
                response = request.responses.get_nowait()
            if isinstance(response, Result):
                return response
            if isinstance(response, Disconnected):
                raise response
            if isinstance(response, Failure):
                await asyncio.sleep(request.remaining_s(request.retry_delay(response)))
                log.info("request %s: retry after %s at %s", request.request_id.hex(), response.error, response.worker)
            self.counters["retries"] += 1
            count_bounded(self.retries_by_reason, response if isinstance(response, str) else response.error)
            # Release the slot at the former worker: the next attempt may go to another one.
            self._first_stage.task_done(request.worker, request.request_id)

    async def _send(self, request: PendingRequest) -> None:
        has_deadline = request.deadline_ms is not None
        remaining_s = request.remaining_s(math.inf if has_deadline else WORKER_WAIT_S)
        if remaining_s <= 0:
            raise request.deadline_passed("the source, before it was sent")
        task, avoid = request.make_task(self._inbox), frozenset(request.avoid)
        try:
            # Without a connection, sending waits for the broker; the deadline bounds that too.
            async with asyncio.timeout(remaining_s + _SEND_GRACE_S if has_deadline else None) as timeout:
                request.worker = await self._first_stage.send(task, timeout_s=remaining_s, avoid=avoid)
        except TimeoutError:
            if not timeout.expired():
                raise
            where = f"the source, on the way to {self.channel.transport.address}"
            raise request.deadline_passed(where) from None
        except NoWorker:
            if has_deadline and len(self._first_stage):
                where = f"the source: all workers of stage {self.pipeline.stage[0].name!r} are full"
                raise request.deadline_passed(where) from None
            raise

    def _on_message(self, topic: str, message: Message) -> None:
        if isinstance(message, TaskDone):
            self._first_stage.task_done(message.worker, message.request_id)
        else:
            self._requests.on_message(message)
