"""Runs the operations of steps in the compute thread, sends their outputs, and keeps the versions of the part."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from brokers.dispatch.channel import MessageChannel
from brokers.errors import SparseError, WireError
from brokers.protocol.messages import Activation, Gradient, Message, Result, StepMessage, TensorContent
from brokers.protocol.safetensors_codec import from_array, from_torch, to_torch
from brokers.protocol.training import LABELS_TENSOR, SOURCES_LIMIT, SourceProgress, TrainingStatus
from stages.loading.network_digest import NETWORK_KEY, check_network
from stages.training.checkpoints import Checkpoint, CheckpointStore, ForeignCheckpoint
from stages.training.part_trainer import MicroBatchMetrics, NotFinite, PartTrainer, model_state_dict
from stages.training.step_queue import Backward, Commit, Forward, StepOperation
from stages.training.telemetry import TrainingTelemetry
from stages.worker.worker_context import WorkerContext

log = logging.getLogger(__name__)

_FLUSH_TIMEOUT_S = 2.0
# Calls a function with its arguments in the compute thread of the worker.
RunInThread = Callable[..., Awaitable[Any]]


class SendQueue:
    """Sends messages in order, in the background, while the worker computes. Bounded by the messages of one step."""

    def __init__(self, channel: MessageChannel) -> None:
        self._channel = channel
        self._queue: asyncio.Queue[tuple[str, Message]] = asyncio.Queue()
        self._sending: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Start to send."""
        self._sending = asyncio.create_task(self._send_all(), name="send-queue")

    def send(self, topic: str, message: Message) -> None:
        """Queue a message. A message that cannot be sent is logged; its receiver notices that it is missing."""
        self._queue.put_nowait((topic, message))

    async def close(self) -> None:
        """Send the queued messages, for at most two seconds, and end."""
        if self._sending is None:
            return
        try:
            async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                await self._queue.join()
        except TimeoutError:
            log.warning("%d messages could not be sent", self._queue.qsize())
        self._sending.cancel()
        await asyncio.gather(self._sending, return_exceptions=True)
        self._sending = None

    async def _send_all(self) -> None:
        while True:
            topic, message = await self._queue.get()
            try:
                await self._channel.send(topic, message)
            except SparseError as error:
                log.warning("could not send a %s: %s", type(message).__name__, error)
            finally:
                self._queue.task_done()


class StepExecutor:
    """One part, its version in memory, and its checkpoints. `members`: the worker of each stage in this term."""

    def __init__(
        self,
        context: WorkerContext,
        part_trainer: PartTrainer,
        send_queue: SendQueue,
        run_in_thread: RunInThread,
        checkpoint_folder: Path,
    ) -> None:
        self.members: dict[str, str] = {}
        self.progress: dict[str, SourceProgress] = {}  # of each source, in the version in memory
        self.restored_term = 0  # the last term whose coordinator declared the weights in memory to be a version
        self.checkpoints: CheckpointStore
        self._context = context
        self._part_trainer = part_trainer
        self._send_queue = send_queue
        self._in_thread = run_in_thread
        self._checkpoint_folder = checkpoint_folder
        self._telemetry = TrainingTelemetry(context.events)

    async def start(self) -> str:
        """Build the part and open its checkpoints; return the fingerprint of the part and its training recipe.

        Raises `ForeignCheckpoint`, and the errors of loading the model, the optimizer and the loss.
        """
        fingerprint: str = await self._in_thread(self._part_trainer.start)
        self.checkpoints = CheckpointStore(self._checkpoint_folder, fingerprint)
        self.checkpoints.check()
        return fingerprint

    def training_status(self, term: int, disconnects: int) -> TrainingStatus:
        """Return the status of this part for the presence record."""
        return TrainingStatus(
            term=term,
            version=self._part_trainer.version,
            restored_term=self.restored_term,
            checkpoints=self.checkpoints.versions[-8:],
            disconnects=disconnects,
            progress=self.progress,
            pending_forwards=len(self._part_trainer.activations),
            min_rows=self._part_trainer.min_rows,
        )

    async def execute(self, operation: StepOperation) -> None:
        """Run one operation and send its output. Raises the errors of the network, the loss and the optimizer."""
        with self._telemetry.record_operation(operation):
            match operation:
                case Forward():
                    await self._forward(operation)
                case Backward():
                    await self._backward(operation)
                case Commit():
                    await self._commit(operation)

    def send_prepared(self, operation: Forward | Backward, term: int) -> None:
        """Notify the source that this stage is prepared to commit the step, with the durations of its operations."""
        place = {"stage": self._context.stage.name, "worker": self._context.worker}
        details = place | self._telemetry.pop_step_sums()
        step = bytes.fromhex(operation.micro_batch.step)
        prepared = StepMessage(request_id=step, verb="prepared", term=term, details=details)
        self._send_queue.send(operation.task.reply_to.topic, prepared)

    async def abort(self) -> None:
        """Discard the current step: the part is as its version left it."""
        self._telemetry.reset()
        await self._in_thread(self._part_trainer.abort)

    async def _forward(self, operation: Forward) -> None:
        task = operation.task
        assert isinstance(task.content, TensorContent)
        self._check_number(task.source, operation)
        check_network(task.content.metadata, self._part_trainer.network, self._context.stage.name)
        with self._telemetry.measure("decode_ms"):
            tensors = {name: to_torch(tensor) for name, tensor in task.content.tensors.items()}
            if operation.labels is not None:
                tensors[LABELS_TENSOR] = to_torch(operation.labels)
        self._telemetry.add("bytes_in", task.content.nbytes)
        self._telemetry.add("tasks", 1)
        with self._telemetry.measure("forward_ms"):
            outputs = await self._in_thread(self._part_trainer.forward, operation.micro_batch, task.request_id, tensors)
        if isinstance(outputs, MicroBatchMetrics):
            result = Result(request_id=task.request_id, content=_encode_metrics(outputs))
            self._send_queue.send(task.reply_to.topic, result)
            return
        next_stage = self._context.next_stage
        assert next_stage is not None
        activation = Activation(
            request_id=task.request_id,
            content=self._encode(outputs, {**task.content.metadata, NETWORK_KEY: self._part_trainer.network}),
            reply_to=task.reply_to,
            sender_inbox=self._context.inbox,
            source=task.source,
            trace=self._telemetry.trace_context(task),
        )
        next_inbox = self._context.pipeline.topics(next_stage).inbox(self.members[next_stage.name])
        self._send_queue.send(next_inbox, activation)

    def _check_number(self, source: str, operation: Forward) -> None:
        """Raise `WireError` "StaleStep" if the step is not the next one of its source, so that none is run twice."""
        if operation.micro_batch.mode == "evaluate":
            return
        number = operation.micro_batch.number
        expected = self.progress[source].steps if source in self.progress else 0
        if number != expected:
            message = f"the next step of source {source!r} is {expected} (from 0), not {number}"
            raise WireError("StaleStep", message, retry=True, source=source, expected=expected, actual=number)
        if source not in self.progress and len(self.progress) >= SOURCES_LIMIT:
            message = f"{SOURCES_LIMIT} sources have trained this pipeline: continue as one of them, with --name"
            raise WireError("TooManySources", message, limit=SOURCES_LIMIT)

    async def _backward(self, operation: Backward) -> None:
        gradients = None
        if operation.gradient is not None:
            content = operation.gradient.content
            with self._telemetry.measure("decode_ms"):
                gradients = {name: to_torch(tensor) for name, tensor in content.tensors.items()}
            self._telemetry.add("bytes_in", content.nbytes)
        task = operation.task
        with self._telemetry.measure("backward_ms"):
            input_gradients = await self._in_thread(self._part_trainer.backward, task.request_id, gradients)
        if isinstance(task, Activation):
            content = self._encode(input_gradients)
            gradient = Gradient(request_id=task.request_id, content=content, sender_inbox=self._context.inbox)
            self._send_queue.send(task.sender_inbox, gradient)

    def _encode(self, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> TensorContent:
        with self._telemetry.measure("encode_ms"):
            content = TensorContent({name: from_torch(tensor) for name, tensor in tensors.items()}, metadata or {})
        self._telemetry.add("bytes_out", content.nbytes)
        return content

    async def _commit(self, operation: Commit) -> None:
        message = operation.message
        with self._telemetry.measure("commit_ms"):
            version: int = await self._in_thread(self._part_trainer.commit, operation.lr)
        self.progress = {**self.progress, operation.source: operation.progress}
        if message.details.get("checkpoint") or version % self._context.pipeline.training.checkpoint_every == 0:
            # Overwrites a file of this version: a worker that was frozen may have written a rolled-back one meanwhile.
            await self._write_checkpoint(version)
        details = {"stage": self._context.stage.name, "worker": self._context.worker, "version": version}
        committed = StepMessage(request_id=message.request_id, verb="committed", term=message.term, details=details)
        self._send_queue.send(message.sender_inbox, committed)

    async def try_save_checkpoint(self) -> None:
        """Save the version in memory before this worker leaves, so that its successor can continue from it."""
        try:
            await self._save_checkpoint()
        except SparseError as error:
            log.warning("worker %s leaves without a checkpoint of its version: %s", self._context.worker, error)

    async def _save_checkpoint(self) -> None:
        version = self._part_trainer.version
        if version and version not in self.checkpoints.versions:
            await self._write_checkpoint(version)

    async def _write_checkpoint(self, version: int) -> None:
        tensors = await self._in_thread(self._part_trainer.checkpoint_tensors, version)
        await self._in_thread(self.checkpoints.save, Checkpoint(version, tensors, self.progress, self.restored_term))

    def discard_version(self) -> None:
        """Stop training: another worker continues, so the weights in memory are not a version and must not be saved."""
        self._part_trainer.version = None
        self.members = {}

    async def restore(self, version: int, term: int, restored_term: int) -> None:
        """Go to `version`, and have it on disk, as all stages do: older ones are not needed again.

        Memory counts as a version only if it was restored in `restored_term`: the other stages rolled back an earlier
        version of the same number, and have trained differently since. Raises the errors of `CheckpointStore`.
        """
        if self._part_trainer.version != version or (version and self.restored_term != restored_term):
            checkpoint = None if version == 0 else await self._in_thread(self.checkpoints.load, version)
            await self._in_thread(self._part_trainer.restore, version, checkpoint.tensors if checkpoint else None)
            self.progress = dict(checkpoint.progress) if checkpoint else {}
        self.restored_term = term
        self.checkpoints.delete_after(version, term)
        try:
            await self._save_checkpoint()
        except NotFinite:
            self._part_trainer.version = None  # unusable: the next term goes to an earlier version
            raise

    async def send_weights(self, request: StepMessage) -> None:
        """Answer with the part's state, by the names of the unsplit network, of the requested version or the newest.

        Raises `WireError` "VersionGone".
        """
        version = request.details.get("version")
        if version is None or version == self._part_trainer.version:
            state = self._part_trainer.weights()
        else:
            try:
                checkpoint: Checkpoint = await self._in_thread(self.checkpoints.load, int(version))
            except ForeignCheckpoint:
                message = f"version {version!r} is neither in memory nor on disk"
                raise WireError("VersionGone", message, version=version) from None
            state = model_state_dict(checkpoint.tensors)
        content = TensorContent({name: from_array(tensor) for name, tensor in state.items()})
        self._send_queue.send(request.sender_inbox, Result(request_id=request.request_id, content=content))


def _encode_metrics(metrics: MicroBatchMetrics) -> TensorContent:
    """Encode `loss`, `rows` and, where labels are classes, `correct`, as tensors without dimensions."""
    arrays: dict[str, Any] = {"loss": np.float64(metrics.loss), "rows": np.int64(metrics.rows)}
    if metrics.correct is not None:
        arrays["correct"] = np.int64(metrics.correct)
    return TensorContent({name: from_array(np.asarray(value)) for name, value in arrays.items()})
