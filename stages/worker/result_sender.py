"""Sends the results of a worker's tasks: activations to the next stage, results and failures to the requester.

All of it runs on the event loop. Every task ends with a message: a request that is neither passed on nor failed would
be noticed only when its lease ends.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.dispatcher import LostTask
from brokers.dispatch.stage_client import StageClient
from brokers.errors import NoWorker, WireError, error_code
from brokers.protocol.codec import EncodedMessage, make_failure_reply
from brokers.protocol.messages import JSON, Activation, Failure, ReplyTo, Result, Task, TaskDone
from brokers.protocol.result_json import content_to_dict, encode_json, timing_to_dict
from brokers.protocol.transport import Properties
from stages.worker.batch_runner import QueuedTask, no_output_error
from stages.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)

# How long a task waits for credit at the next stage before its owner is asked to try again.
CREDIT_TIMEOUT_S = 30.0
# The reason of a failure is one line in logs and on results topics; an exception's text may be of any length.
REASON_MAX_CHARS = 1000


def failure_reason(error: BaseException) -> str:
    """Format an exception of any origin as one line of limited length."""
    try:
        text = f"no key {error}" if isinstance(error, KeyError) else str(error)
    except Exception as problem:  # noqa: BLE001 - the requester gets the first error all the same
        text = f"its message could not be formatted: {type(problem).__name__}"
    line = " ".join(text.split())
    return line if len(line) <= REASON_MAX_CHARS else f"{line[:REASON_MAX_CHARS]}... ({len(line)} characters)"


class ResultSender:
    """The outgoing messages of one inference worker; counts `failed` and `rejected` tasks in `counters`."""

    def __init__(self, channel: MessageChannel, context: WorkerContext, counters: Counter[str]) -> None:
        self._channel = channel
        self._context = context
        self._stage = context.stage.name
        self._worker = context.worker
        self._counters = counters
        self._next_stage = context.next_stage.name if context.next_stage else None
        self._clients: dict[str, StageClient] = {}
        self._sends: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Start to watch the workers of the next stage."""
        if self._next_stage:
            await self._client(self._next_stage)

    def send_in_background(self, send: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine of this class as a task; its error is logged."""
        task = asyncio.create_task(send, name=f"send-{self._stage}")
        self._sends.add(task)
        task.add_done_callback(self._on_sent)

    async def flush(self) -> None:
        """Wait until everything is sent; give up if nothing is sent for longer than a task may wait for credit."""
        while self._sends:
            done, pending = await asyncio.wait(
                self._sends, timeout=CREDIT_TIMEOUT_S + 1, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                log.warning("%d messages could not be sent", len(pending))
                return

    async def close(self) -> None:
        """Cancel unsent results, and stop watching workers."""
        for send in self._sends:
            send.cancel()
        for client in self._clients.values():
            await client.close()

    def _on_sent(self, send: asyncio.Task[None]) -> None:
        self._sends.discard(send)
        if not send.cancelled() and (error := send.exception()):
            log.warning("could not send a message: %s", error)

    async def deliver(self, queued: QueuedTask) -> None:
        """Send the outputs or the error of a task, then return its credit to its sender.

        In this order: until the next worker has the request, its sender must notice if this process dies.
        """
        ended_ns = self._context.events.now_ns()
        try:
            error = await self._send_outcome(queued)
            self._emit_task(queued, ended_ns, error)
        finally:
            await self.release_credit(queued.task)

    async def _send_outcome(self, queued: QueuedTask) -> str:
        """Send the outputs, or a failure; return the code of the error, empty on success."""
        error: BaseException | None = queued.error
        is_retry = False
        if error is None:
            try:
                await self._send_outputs(queued)
                return ""
            except NoWorker as problem:
                error = problem
                is_retry = True
            except Exception as problem:  # noqa: BLE001 - any error is reported to the requester
                # Too large, or metadata of the executor that cannot be encoded: another attempt would fail as well.
                log.warning("could not send the outputs of stage %s: %s", self._stage, failure_reason(problem))
                error = problem
        await self._send_failure(queued.task, error_code(error), failure_reason(error), retry=is_retry)
        return error_code(error)

    async def _send_outputs(self, queued: QueuedTask) -> None:
        task = queued.task
        if queued.outputs is None:
            raise no_output_error(self._stage, 1)
        hops = (*task.hops, replace(queued.hop, bytes_out=queued.outputs.nbytes))
        target = queued.next_stage or self._next_stage
        if target is None:
            result = Result(request_id=task.request_id, content=queued.outputs, attempt=task.attempt, hops=hops)
            await self._reply(task.reply_to, result)
            return
        remaining_ms = queued.remaining_ms(time.monotonic())
        activation = Activation(
            request_id=task.request_id,
            content=queued.outputs,
            reply_to=task.reply_to,
            sender_inbox=self._context.inbox,
            source=task.source,
            attempt=task.attempt,
            deadline_ms=None if remaining_ms is None else max(0.001, remaining_ms),
            priority=task.priority,
            trace=queued.trace,
            hops=hops,
        )
        timeout_s = CREDIT_TIMEOUT_S if remaining_ms is None else min(CREDIT_TIMEOUT_S, remaining_ms / 1000)
        client = await self._client(target)
        await client.send(activation, timeout_s=timeout_s)

    async def _client(self, stage: str) -> StageClient:
        if stage not in self._clients:
            pipeline = self._context.pipeline
            topics = pipeline.topics(pipeline.find_stage(stage))
            lease_s = pipeline.pipeline.lease_s
            self._clients[stage] = StageClient(self._channel, topics, self._on_lost, lease_s=lease_s)
            await self._clients[stage].open()
        return self._clients[stage]

    def on_task_done(self, message: TaskDone) -> None:
        """A worker of a later stage returns the credit of a request."""
        for client in self._clients.values():
            client.task_done(message.worker, message.request_id)

    def _on_lost(self, lost: LostTask) -> None:
        if lost.cause == "died":
            reason = f"worker {lost.worker!r} of stage {lost.stage!r} died while it had this request"
        else:
            reason = f"the connection broke while worker {lost.worker!r} of stage {lost.stage!r} had this request"
        failure = self._context.failure(lost.request, "WorkerLost", reason, attempt=lost.attempt, retry=True)
        failure = replace(failure, stage=lost.stage, worker=lost.worker)
        self.send_in_background(self._reply(lost.reply, failure))

    def _emit_task(self, queued: QueuedTask, ended_ns: int, error: str) -> None:
        task = queued.task
        hop = queued.hop
        self._context.events.emit(
            "task_processed",
            time_ns=ended_ns,
            request=task.request_id,
            **hop.durations(),
            bytes_in=task.content.nbytes,
            bytes_out=queued.outputs.nbytes if queued.outputs else 0,
            batch=hop.batch,
            error=error,
            trace=queued.trace.trace_id,
            span=queued.trace.span_id,
            parent=task.trace.span_id if task.trace else "",
        )

    async def reject(self, task: Task, code: str, reason: str) -> None:
        """Refuse a task that another worker may accept."""
        self._counters["rejected"] += 1
        try:
            await self._send_failure(task, code, reason, retry=True)
        finally:
            await self.release_credit(task)

    async def reject_malformed(self, error: WireError, properties: Properties) -> None:
        """Answer a message that could not be decoded, if it names a reply topic."""
        if answer := make_failure_reply(error, properties, self._stage, self._worker):
            reply, failure = answer
            await self._reply(reply, failure)
            # A foreign client does not count credits.
            if reply.accept != "json" or reply.topic != properties.response_topic:
                await self._send_task_done(properties.response_topic, failure.request_id, failure.attempt)

    async def release_credit(self, task: Task) -> None:
        """Notify the sender of a task that this worker is done with it."""
        await self._send_task_done(task.sender_inbox, task.request_id, task.attempt)

    async def _send_task_done(self, sender_inbox: str, request: bytes, attempt: int) -> None:
        if sender_inbox:
            await self._channel.send(sender_inbox, TaskDone(request_id=request, worker=self._worker, attempt=attempt))

    async def _send_failure(self, task: Task, code: str, reason: str, *, retry: bool = False) -> None:
        self._counters["failed"] += 1
        failure = self._context.failure(task.request_id, code, reason, attempt=task.attempt, retry=retry)
        await self._reply(task.reply_to, failure)

    async def _reply(self, reply: ReplyTo, message: Result | Failure) -> None:
        if reply.accept == "safetensors":
            await self._channel.send(reply.topic, message)
            return
        if isinstance(message, Failure):
            answer: dict[str, Any] = message.as_dict()
        else:
            answer = {
                "request": message.request_id.hex(),
                "pipeline": self._context.pipeline.name,
                **content_to_dict(message.content),
                "time": timing_to_dict(message.hops),
            }
        packet = EncodedMessage(Properties(JSON, reply.echo), (encode_json(answer),))
        await self._channel.send_packet(reply.topic, packet)
