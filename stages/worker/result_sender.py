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
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.stage_client import StageClient
from brokers.dispatch.worker_pool import LostTask
from brokers.errors import NoWorker, WireError, error_code
from brokers.protocol.codec import EncodedMessage, make_failure_reply
from brokers.protocol.messages import JSON, Activation, Failure, ReplyTo, Result, Task, TaskDone, TensorContent
from brokers.protocol.result_json import content_to_dict, encode_json, timing_to_dict
from brokers.protocol.transport import Properties
from stages.worker.batch_runner import Completed, Failed, NoOutput, TaskOutcome
from stages.worker.telemetry import InferenceTelemetry

log = logging.getLogger(__name__)

# How long a task waits for room at the next stage before its owner is told to try again.
CREDIT_TIMEOUT_S = 30.0
# A failure's reason is one line, and goes into logs and onto results topics: of an exception's text so much.
REASON_MAX_CHARS = 1000


@dataclass(frozen=True, slots=True)
class Route:
    """Where an executor has passed a request on to, and what."""

    stage: str
    body: TensorContent


def failure_reason(error: BaseException) -> str:
    """What an exception says of itself, in one line that is not endless: it may be of anybody's making."""
    try:
        # What a KeyError says is the bare key.
        said = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    except Exception as problem:  # noqa: BLE001 - whoever waits is told of the first mistake all the same
        said = f"its own text could not be made: {type(problem).__name__}"
    line = " ".join(said.split())
    return line if len(line) <= REASON_MAX_CHARS else f"{line[:REASON_MAX_CHARS]}... ({len(line)} characters)"


class ResultSender:
    """Sends what one worker has to say."""

    def __init__(
        self, line: MessageChannel, pipeline: Pipeline, stage: StageTable, worker: str, account: InferenceTelemetry
    ) -> None:
        self.failed = 0
        self._account = account
        self.rejected = 0
        self._line, self._pipeline, self._stage, self._worker = line, pipeline, stage, worker
        self._inbox = pipeline.topics(stage).inbox(worker)
        self._following = pipeline.next_stage(stage)
        self._outboxes: dict[str, StageClient] = {}
        self._errands: set[asyncio.Task[None]] = set()

    # Life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Begin to listen for the workers of the next stage."""
        if self._following:
            await self._outbox(self._following.name)

    def send_in_background(self, errand: Coroutine[Any, Any, None]) -> None:
        """Have something sent by itself."""
        task = asyncio.create_task(errand, name=f"errand-{self._stage.name}")
        self._errands.add(task)
        task.add_done_callback(self._ended)

    async def flush(self) -> None:
        """Wait until everything has been sent; give up when nothing moves for longer than a task may wait for room."""
        while self._errands:
            done, stuck = await asyncio.wait(
                self._errands, timeout=CREDIT_TIMEOUT_S + 1, return_when=asyncio.FIRST_COMPLETED
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

    async def deliver(self, outcome: TaskOutcome, detour: Route | None) -> None:
        """Pass the work on, or tell that it failed; then say to whoever sent it that there is room again.

        Not before: until the next worker has it, its sender must miss it should this process die.
        """
        task, ended_ns = outcome.queued.task, self._account.now_ns()
        try:
            error = await self._pass_on_or_tell(outcome, detour)
            self._account.record_task(outcome, ended_ns, error, detour.body.nbytes if detour else None)
        finally:
            await self.release_credit(task)

    async def _pass_on_or_tell(self, outcome: TaskOutcome, detour: Route | None) -> str:
        """What it failed of; empty when it is on its way."""
        task = outcome.queued.task
        if isinstance(outcome, Failed):
            await self.send_failure(task, type(outcome.error).__name__, failure_reason(outcome.error))
            return type(outcome.error).__name__
        try:
            await self._pass_on(outcome, detour)
        except NoWorker as error:
            await self.send_failure(task, error_code(error), str(error), retry=True)
            return error_code(error)
        except Exception as error:  # noqa: BLE001 - whatever it was, the one who waits is told
            # Too large, or an executor's own metadata that makes no JSON: another attempt would end as this one did.
            log.warning("could not pass on what stage %s gave: %s", self._stage.name, failure_reason(error))
            await self.send_failure(task, error_code(error), failure_reason(error))
            return error_code(error)
        return ""

    async def _pass_on(self, done: Completed, detour: Route | None) -> None:
        task, body = done.queued.task, done.body
        target = self._following.name if self._following else None
        if body is None:
            if detour is None:
                raise NoOutput(self._stage.name, 1)
            target, body = detour.stage, detour.body
        hops = (*task.hops, replace(done.hop, bytes_out=body.nbytes))
        if target is None:
            await self._answer(
                task.reply_to, Result(request_id=task.request_id, content=body, attempt=task.attempt, hops=hops)
            )
            return
        left_ms = done.queued.remaining_ms(time.monotonic())
        activation = Activation(
            request_id=task.request_id,
            content=body,
            reply_to=task.reply_to,
            sender_inbox=self._inbox,
            source=task.source,
            attempt=task.attempt,
            deadline_ms=None if left_ms is None else max(0.001, left_ms),
            priority=task.priority,
            trace=done.queued.trace,
            hops=hops,
        )
        outbox = await self._outbox(target)
        await outbox.send(
            activation, timeout_s=CREDIT_TIMEOUT_S if left_ms is None else min(CREDIT_TIMEOUT_S, left_ms / 1000)
        )

    async def _outbox(self, stage: str) -> StageClient:
        if stage not in self._outboxes:
            topics = self._pipeline.topics(self._pipeline.find_stage(stage))
            self._outboxes[stage] = StageClient(self._line, topics, self._lost, lease_s=self._pipeline.pipeline.lease_s)
            await self._outboxes[stage].open()
        return self._outboxes[stage]

    def credit_released(self, control: TaskDone) -> None:
        """A worker further on is done with a request of ours."""
        for outbox in self._outboxes.values():
            outbox.task_done(control.worker, control.request_id)

    # Answers ------------------------------------------------------------------------------------------------------

    async def send_failure(self, task: Task, error: str, reason: str, *, retry: bool = False) -> None:
        """Answer a task with a failure of this stage."""
        self.failed += 1
        await self._answer(task.reply_to, self._failure(task.request_id, error, reason, task.attempt, retry))

    async def reject(self, task: Task, error: str, reason: str) -> None:
        """Answer a task that this worker does not take: another one may."""
        self.rejected += 1
        try:
            await self.send_failure(task, error, reason, retry=True)
        finally:
            await self.release_credit(task)

    async def reject_malformed(self, error: WireError, properties: Properties) -> None:
        """Answer what could not be read, if it says whom to answer."""
        if found := make_failure_reply(error, properties, self._stage.name, self._worker):
            reply, failure = found
            await self._answer(reply, failure)
            # A foreign client has no sender that waits for room.
            if reply.accept != "json" or reply.topic != properties.response_topic:
                await self._send_release(properties.response_topic, failure.request_id, failure.attempt)

    async def release_credit(self, task: Task) -> None:
        """Tell whoever sent a task that it is done with here."""
        await self._send_release(task.sender_inbox, task.request_id, task.attempt)

    async def _send_release(self, sender: str, request: bytes, attempt: int) -> None:
        if sender:
            await self._line.send(sender, TaskDone(request_id=request, worker=self._worker, attempt=attempt))

    def _failure(self, request: bytes, error: str, reason: str, attempt: int, retry: bool) -> Failure:
        return Failure(
            request_id=request,
            stage=self._stage.name,
            worker=self._worker,
            error=error,
            reason=reason,
            attempt=attempt,
            retry=retry,
        )

    def _lost(self, lost: LostTask) -> None:
        if lost.cause == "died":
            reason = f"worker {lost.worker!r} of the next stage died with this request in hand"
        else:
            reason = f"the connection broke while this request was with worker {lost.worker!r} of the next stage"
        failure = replace(
            self._failure(lost.request, "WorkerLost", reason, lost.attempt, True), stage=lost.stage, worker=lost.worker
        )
        self.send_in_background(self._answer(lost.reply, failure))

    async def _answer(self, reply: ReplyTo, message: Result | Failure) -> None:
        if reply.accept == "safetensors":
            await self._line.send(reply.topic, message)
            return
        found: dict[str, Any]
        if isinstance(message, Failure):
            found = message.as_dict()
        else:
            found = {
                "request": message.request_id.hex(),
                "pipeline": self._pipeline.name,
                **content_to_dict(message.content),
            }
            found["time"] = timing_to_dict(message.hops)
        await self._line.send_packet(reply.topic, EncodedMessage(Properties(JSON, reply.echo), (encode_json(found),)))
