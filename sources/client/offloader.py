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

from brokers.config.pipeline_file import Pipeline, broker_address, load_pipeline
from brokers.config.schema import LOCAL
from brokers.dispatch.channel import Line
from brokers.dispatch.presence import SourceLoad
from brokers.dispatch.stage_client import Outbox
from brokers.errors import DeadlinePassed, Disconnected, NoBroker, NoWorker, RequestError
from brokers.mqtt.client_identity import transport_to
from brokers.protocol.messages import (
    Content,
    Control,
    Failure,
    Message,
    Priority,
    ReplyTo,
    Result,
    Task,
    new_request_id,
)
from brokers.protocol.stage_timing import Hop
from brokers.protocol.topics import source_inbox
from brokers.protocol.traceparent import TraceContext
from brokers.protocol.transport import Transport
from sources.client.adaptive_concurrency import Saturation
from sources.client.inflight_limit import Window
from sources.client.pending_request import Flight
from sources.client.places import Places
from sources.client.request_table import Flights, note
from sources.client.source_presence import Pace, Standing
from sources.client.telemetry import client_of, name_of, tell_end
from sources.conversion import like, to_content

log = logging.getLogger(__name__)

# The wait for a worker with room ends at the deadline by itself, and says why; this is for the sending after it.
_SEND_GRACE_S = 0.05
# How long a request without a deadline waits for any worker to be up and have room.
ROOM_WAIT_S = 60.0
# Beyond what is being computed, so many are on their way for each worker of the widest stage, so that none waits for
# its next task: one that the worker has already, and one that is coming (tests/bench/dispatch.py).
ON_THEIR_WAY = 2


@dataclass(frozen=True, slots=True)
class Answer:
    """A result, and how it came about. `latency_ms` is the round trip, from `ask` to the result."""

    request: bytes
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
        self.retried: Counter[str] = Counter()  # by reason
        self.failed: Counter[str] = Counter()  # by error
        # By reason: what whoever feeds us let go before it became a request. Theirs to say.
        self.drops: Callable[[], Mapping[str, int]] = dict
        # Two sources of one name must not take each other's place at the broker.
        client_id = f"source.{self.name}.{new_request_id()[:4].hex()}"
        self.line = Line(transport or transport_to(self._address(broker), client_id=client_id))
        self._events = client_of(self.pipeline, self.name)
        self._inbox = source_inbox(self.pipeline.source.site or LOCAL, self.name)
        self._lease_s = self.pipeline.pipeline.lease_s
        first = self.pipeline.topics(self.pipeline.stage[0])
        self._flights = Flights(self._lease_s)
        self.counters = self._flights.counters
        self._outbox = Outbox(
            self.line, first, self._flights.lost, lease_s=self._lease_s, on_gap=self._flights.suspect_all
        )
        fixed = window or self.pipeline.source.window
        self.window = Window(lambda: fixed or self._open_window(live))
        self._places = Places(
            self.line, self.pipeline, self._outbox, changed=self.window.resized, died=self._flights.suspect_all
        )
        self._saturation = Saturation(self._places.workers)
        self._standing = Standing(self.line, self.pipeline, self.name, self._load)
        self._pace = Pace()

    def _load(self) -> SourceLoad:
        return SourceLoad(
            requests=self.counters["requests"],
            results=self.counters["results"],
            in_flight=len(self._flights),
            waiting=self.window.waiting,
            window=self.window.size,
            rate=self._pace.rate(time.monotonic()),
            latency_ms=self._pace.latency_ms(),
            dropped=dict(self.drops()),
            retries=dict(self.retried),
            failed=dict(self.failed),
            twins=self.counters["twins"],
        )

    def _open_window(self, live: bool) -> int:
        if live:
            return self._saturation.window(self._places.count + 1)
        return self._places.count + ON_THEIR_WAY * self._places.widest

    def _address(self, broker: str | None) -> str:
        address = broker_address(self.pipeline, self.pipeline.source.site, broker)
        if address is None:
            raise NoBroker(self.pipeline.path, self.pipeline.source.site)
        return address

    async def __aenter__(self) -> Offloader:
        await self.line.open(will=self._standing.will)
        self._events.open()
        self.line.transport.on_reconnect(self._flights.reconnected)
        try:
            await self.line.listen(self._inbox, self._heard, self._flights.garbage)
            await self._outbox.open()
            await self._places.open()
            await self._standing.ask()
            self._standing.open()
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.give_up("the offloader was closed")
        await self._standing.close()
        await self._close()

    async def _close(self) -> None:
        await self._outbox.close()
        await self.line.close()
        await asyncio.to_thread(self._events.close)  # a monitor that is slow may take a second

    async def give_up(self, reason: str) -> None:
        """Have all requests that are in flight raise `Disconnected`, and all to come."""
        self._flights.give_up(Disconnected(self.line.transport.address, reason))
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
        answer = await self.ask(to_content(value), deadline_ms=deadline_ms, priority=priority)
        return like(value, answer.content)

    async def ask(
        self,
        content: Content,
        *,
        source: str = "",
        deadline_ms: float | None = None,
        priority: Priority | None = None,
        entered: bool = False,
        parent: TraceContext | None = None,
    ) -> Answer:
        """Offload encoded content, and return the result as it came, with its hops.

        `entered`: the caller has entered the window already, with `window.enter`; it is left here. `parent`: the span
        that asks for it, of who traces what it does.
        """
        table = self.pipeline.source
        deadline_ms = table.deadline_ms if deadline_ms is None else deadline_ms
        flight = Flight(new_request_id(), time.monotonic(), deadline_ms, priority or table.priority, parent)
        self.counters["requests"] += 1
        try:
            if not entered:
                await self._enter(flight)
            result = await self._fly(flight, content, source or self.name)
        except BaseException as error:
            if isinstance(error, RequestError):
                note(self.failed, name_of(error))
            tell_end(self._events, flight, content, error=error)
            raise
        tell_end(self._events, flight, content, result.hops)
        self.counters["results"] += 1
        latency_ms = 1000 * (time.monotonic() - flight.begun_s)
        self._pace.answered(latency_ms, time.monotonic())
        if flight.attempt == 1:  # else it says how long a fault took
            self._flights.took(latency_ms / 1000)
            self._saturation.learn(result.hops, latency_ms)
        return Answer(flight.request, result.content, result.hops, latency_ms, flight.attempt)

    async def _enter(self, flight: Flight) -> None:
        try:
            async with asyncio.timeout(None if flight.deadline_ms is None else flight.deadline_ms / 1000):
                await self.window.enter(flight.priority)
        except TimeoutError:
            where = "the source, before its turn came"
            raise DeadlinePassed(flight.request.hex(), flight.deadline_ms or 0.0, where) from None

    async def _fly(self, flight: Flight, content: Content, source: str) -> Result:
        """What is in the window, until it has settled one way or the other."""
        self._flights.begin(flight)
        self.window.hold(content.nbytes)
        try:
            return await self._settle(flight, content, source)
        finally:
            self.window.leave(content.nbytes)
            self._flights.end(flight)
            self._outbox.done(flight.worker, flight.request)

    async def _settle(self, flight: Flight, content: Content, source: str) -> Result:
        """Send the request until a result is in; raise when no further attempt would help."""
        while True:
            flight.begin_attempt()
            await self._send(flight, content, source)
            try:
                async with asyncio.timeout(flight.left_s(self._lease_s)):
                    word = await flight.heard.get()
            except TimeoutError:
                if flight.left_s(self._lease_s) <= 0:
                    where = f"the source, after {flight.attempt} attempts"
                    raise DeadlinePassed(flight.request.hex(), flight.deadline_ms or 0.0, where) from None
                flight.fail("", flight.worker, "NoAnswer", f"nothing was heard of it for {self._lease_s:g} s")
                word = flight.heard.get_nowait()
            if isinstance(word, Result):
                return word
            if isinstance(word, Disconnected):
                raise word
            if isinstance(word, Failure):
                await asyncio.sleep(flight.left_s(flight.weigh(word)))
                log.info("request %s: %s at %s: again", flight.request.hex(), word.error, word.worker)
            self.counters["retries"] += 1
            note(self.retried, word if isinstance(word, str) else word.error)
            # The next attempt is another task: what the last one's worker had in hand says nothing of it.
            self._outbox.done(flight.worker, flight.request)

    async def _send(self, flight: Flight, content: Content, source: str) -> None:
        left_s = flight.left_s(ROOM_WAIT_S)
        if left_s <= 0:
            raise DeadlinePassed(flight.request.hex(), flight.deadline_ms or 0.0, "the source, before it was sent")
        task = Task(
            request=flight.request,
            content=content,
            reply=ReplyTo(self._inbox),
            sender=self._inbox,
            source=source,
            attempt=flight.attempt,
            deadline_ms=None if flight.deadline_ms is None else 1000 * left_s,
            priority=flight.priority,
            trace=flight.trace,
        )
        try:
            # While the broker is away sending waits for it: with a deadline, no longer than that.
            async with asyncio.timeout(None if flight.deadline_ms is None else left_s + _SEND_GRACE_S):
                flight.worker = await self._outbox.send(task, wait_s=left_s, avoid=frozenset(flight.avoid))
        except TimeoutError:
            where = f"the source, on the way to {self.line.transport.address}"
            raise DeadlinePassed(flight.request.hex(), flight.deadline_ms or 0.0, where) from None
        except NoWorker:
            if flight.deadline_ms is not None and len(self._outbox):
                where = f"the door of stage {self.pipeline.stage[0].name!r}, whose workers are all full"
                raise DeadlinePassed(flight.request.hex(), flight.deadline_ms, where) from None
            raise

    # Heard --------------------------------------------------------------------------------------------------------

    def _heard(self, topic: str, message: Message) -> None:
        if isinstance(message, Control):
            self._outbox.done(message.worker, message.request)
            return
        self._flights.heard(message)
