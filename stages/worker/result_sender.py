"""What leaves a worker: its part of the work to the next stage, results and failures to whoever asked.

Everything here runs on the loop. Whatever stands in the way of an answer, the one who waits for it is told: a request
that neither goes on nor fails would be in nobody's hands until its lease runs out.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from typing import Any

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.dispatch.channel import Line
from brokers.dispatch.stage_client import Lost, Outbox
from brokers.errors import NoWorker, WireError
from brokers.protocol.codec import Packet, refusal
from brokers.protocol.messages import JSON, Activation, Body, Control, Failure, ReplyTo, Result, Task
from brokers.protocol.result_json import describe, time_spent, to_bytes
from brokers.protocol.transport import Properties
from stages.worker.batch_runner import Done, Failed, NothingGiven, Outcome
from stages.worker.telemetry import Account

log = logging.getLogger(__name__)

# How long a task waits for room at the next stage before its owner is told to try again.
ROOM_WAIT_S = 30.0
# A failure's reason is one line, and goes into logs and onto results topics: of an exception's text so much.
REASON_CHARACTERS = 1000


@dataclass(frozen=True, slots=True)
class Detour:
    """Where an executor has passed a request on to, and what."""

    stage: str
    body: Body


def reason_of(error: BaseException) -> str:
    """What an exception says of itself, in one line that is not endless: it may be of anybody's making."""
    try:
        # What a KeyError says is the bare key.
        said = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    except Exception as problem:  # noqa: BLE001 - whoever waits is told of the first mistake all the same
        said = f"its own text could not be made: {type(problem).__name__}"
    line = " ".join(said.split())
    return line if len(line) <= REASON_CHARACTERS else f"{line[:REASON_CHARACTERS]}... ({len(line)} characters)"


class Outlet:
    """Sends what one worker has to say."""

    def __init__(self, line: Line, pipeline: Pipeline, stage: StageTable, worker: str, account: Account) -> None:
        self.failed = 0
        self._account = account
        self.turned_away = 0
        self._line, self._pipeline, self._stage, self._worker = line, pipeline, stage, worker
        self._inbox = pipeline.topics(stage).inbox(worker)
        self._following = pipeline.after(stage)
        self._outboxes: dict[str, Outbox] = {}
        self._errands: set[asyncio.Task[None]] = set()

    # Life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Begin to listen for the workers of the next stage."""
        if self._following:
            await self._outbox(self._following.name)

    def begin(self, errand: Coroutine[Any, Any, None]) -> None:
        """Have something sent by itself."""
        task = asyncio.create_task(errand, name=f"errand-{self._stage.name}")
        self._errands.add(task)
        task.add_done_callback(self._ended)

    async def empty(self) -> None:
        """Wait until everything has been sent; give up when nothing moves for longer than a task may wait for room."""
        while self._errands:
            done, stuck = await asyncio.wait(
                self._errands, timeout=ROOM_WAIT_S + 1, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                log.warning("%d answers could not be sent", len(stuck))
                return

    async def close(self) -> None:
        """Give up what has not been sent, and the listening for workers."""
        for errand in self._errands:
            errand.cancel()
        for outbox in self._outboxes.values():
            await outbox.close()

    def _ended(self, errand: asyncio.Task[None]) -> None:
        self._errands.discard(errand)
        if not errand.cancelled() and (error := errand.exception()):
            log.warning("could not answer: %s", error)

    # On to the next stage, or back to the source -------------------------------------------------------------------

    async def deliver(self, outcome: Outcome, detour: Detour | None) -> None:
        """Pass the work on, or tell that it failed; then say to whoever sent it that there is room again.

        Not before: until the next worker has it, its sender must miss it should this process die.
        """
        task, ended_ns = outcome.job.task, self._account.now_ns()
        try:
            error = await self._pass_on_or_tell(outcome, detour)
            self._account.task(outcome, ended_ns, error, detour.body.nbytes if detour else None)
        finally:
            await self.make_room(task)

    async def _pass_on_or_tell(self, outcome: Outcome, detour: Detour | None) -> str:
        """What it failed of; empty when it is on its way."""
        task = outcome.job.task
        if isinstance(outcome, Failed):
            await self.tell(task, type(outcome.error).__name__, reason_of(outcome.error))
            return type(outcome.error).__name__
        try:
            await self._pass_on(outcome, detour)
        except NoWorker as error:
            await self.tell(task, type(error).__name__, str(error), retry=True)
            return type(error).__name__
        except Exception as error:  # noqa: BLE001 - whatever it was, the one who waits is told
            # Too large, or an executor's own metadata that makes no JSON: another attempt would end as this one did.
            log.warning("could not pass on what stage %s gave: %s", self._stage.name, reason_of(error))
            await self.tell(task, type(error).__name__, reason_of(error))
            return type(error).__name__
        return ""

    async def _pass_on(self, done: Done, detour: Detour | None) -> None:
        task, body = done.job.task, done.body
        target = self._following.name if self._following else None
        if body is None:
            if detour is None:
                raise NothingGiven(self._stage.name, 1)
            target, body = detour.stage, detour.body
        hops = (*task.hops, replace(done.hop, bytes_out=body.nbytes))
        if target is None:
            await self._answer(task.reply, Result(request=task.request, content=body, attempt=task.attempt, hops=hops))
            return
        left_ms = done.job.left_ms(time.monotonic())
        activation = Activation(
            request=task.request,
            content=body,
            reply=task.reply,
            sender=self._inbox,
            source=task.source,
            attempt=task.attempt,
            deadline_ms=None if left_ms is None else max(0.001, left_ms),
            priority=task.priority,
            trace=done.job.trace,
            hops=hops,
        )
        outbox = await self._outbox(target)
        await outbox.send(activation, wait_s=ROOM_WAIT_S if left_ms is None else min(ROOM_WAIT_S, left_ms / 1000))

    async def _outbox(self, stage: str) -> Outbox:
        if stage not in self._outboxes:
            topics = self._pipeline.topics(self._pipeline.find_stage(stage))
            self._outboxes[stage] = Outbox(self._line, topics, self._lost, lease_s=self._pipeline.pipeline.lease_s)
            await self._outboxes[stage].open()
        return self._outboxes[stage]

    def has_room_again(self, control: Control) -> None:
        """A worker further on is done with a request of ours."""
        for outbox in self._outboxes.values():
            outbox.done(control.worker, control.request)

    # Answers ------------------------------------------------------------------------------------------------------

    async def tell(self, task: Task, error: str, reason: str, *, retry: bool = False) -> None:
        """Answer a task with a failure of this stage."""
        self.failed += 1
        await self._answer(task.reply, self._failure(task.request, error, reason, task.attempt, retry))

    async def turn_away(self, task: Task, error: str, reason: str) -> None:
        """Answer a task that this worker does not take: another one may."""
        self.turned_away += 1
        try:
            await self.tell(task, error, reason, retry=True)
        finally:
            await self.make_room(task)

    async def refuse(self, error: WireError, properties: Properties) -> None:
        """Answer what could not be read, if it says whom to answer."""
        if found := refusal(error, properties, self._stage.name, self._worker):
            reply, failure = found
            await self._answer(reply, failure)
            # A foreign client has no sender that waits for room.
            if reply.accept != "json" or reply.topic != properties.response_topic:
                await self._make_room(properties.response_topic, failure.request, failure.attempt)

    async def make_room(self, task: Task) -> None:
        """Tell whoever sent a task that it is done with here."""
        await self._make_room(task.sender, task.request, task.attempt)

    async def _make_room(self, sender: str, request: bytes, attempt: int) -> None:
        if sender:
            await self._line.send(sender, Control(request=request, worker=self._worker, attempt=attempt))

    def _failure(self, request: bytes, error: str, reason: str, attempt: int, retry: bool) -> Failure:
        return Failure(
            request=request,
            stage=self._stage.name,
            worker=self._worker,
            error=error,
            reason=reason,
            attempt=attempt,
            retry=retry,
        )

    def _lost(self, lost: Lost) -> None:
        if lost.why == "died":
            reason = f"worker {lost.worker!r} of the next stage died with this request in hand"
        else:
            reason = f"the connection broke while this request was with worker {lost.worker!r} of the next stage"
        failure = replace(
            self._failure(lost.request, "WorkerLost", reason, lost.attempt, True), stage=lost.stage, worker=lost.worker
        )
        self.begin(self._answer(lost.reply, failure))

    async def _answer(self, reply: ReplyTo, message: Result | Failure) -> None:
        if reply.accept == "safetensors":
            await self._line.send(reply.topic, message)
            return
        found: dict[str, Any]
        if isinstance(message, Failure):
            found = message.as_dict()
        else:
            found = {"request": message.request.hex(), "pipeline": self._pipeline.name, **describe(message.content)}
            found["time"] = time_spent(message.hops)
        await self._line.send_packet(reply.topic, Packet(Properties(JSON, reply.echo), (to_bytes(found),)))
