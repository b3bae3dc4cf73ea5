"""The operations of steps, done: in a thread of its own, timed, and what comes of them sent to where it belongs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import StageTable
from brokers.errors import SparseError
from brokers.protocol.messages import Activation, Failure, Gradient, Result, StepMessage, TensorContent
from brokers.protocol.safetensors_codec import from_array, from_torch, to_torch
from brokers.protocol.training import LABELS_TENSOR, SOURCES_LIMIT, SourceProgress, TrainingStatus
from brokers.telemetry.client import EventClient
from stages.training.checkpoints import Checkpoint, CheckpointStore
from stages.training.errors import ForeignCheckpoint, NotFinite, StaleStep, TooManySources, VersionGone
from stages.training.part_trainer import MicroBatchMetrics, PartTrainer, model_state_dict
from stages.training.send_queue import SendQueue
from stages.training.step_queue import Backward, Commit, Forward, StepOperation
from stages.training.step_timing import StepTimings
from stages.training.telemetry import TrainingTelemetry

log = logging.getLogger(__name__)

T = TypeVar("T")


class StepExecutor:
    """One part, its versions in memory and on disk, and the thread that computes."""

    def __init__(
        self,
        pipeline: Pipeline,
        stage: StageTable,
        worker: str,
        learner: PartTrainer,
        post: SendQueue,
        checkpoints: Callable[[str], CheckpointStore],
        events: EventClient | None = None,
    ) -> None:
        self.members: dict[str, str] = {}
        self._pipeline, self._stage, self._worker = pipeline, stage, worker
        self._part_trainer, self._post = learner, post
        self._inbox = pipeline.topics(stage).inbox(worker)
        self._next = pipeline.next_stage(stage)
        self._make_checkpoints = checkpoints
        self._checkpoints: CheckpointStore
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"compute-{stage.name}")
        self._progress: dict[str, SourceProgress] = {}
        self._restored_term = 0  # the last term that told what is in memory to be a version
        self._times = StepTimings()
        self._account = TrainingTelemetry(events, self._times)

    async def start(self) -> str:
        """Build the part and see what checkpoints there are; what tells the part from others.

        Raises `ForeignCheckpoint`, and whatever is wrong with the model or its recipe.
        """
        fingerprint = await self._in_thread(self._part_trainer.start)
        self._checkpoints = self._make_checkpoints(fingerprint)
        self._checkpoints.check()
        return fingerprint

    @property
    def checkpoint_term(self) -> int:
        """The newest term of its checkpoints: in none before it would they be changed."""
        return self._checkpoints.term

    def stop(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def training_status(self, term: int, breaks: int) -> TrainingStatus:
        """How far the part has come."""
        return TrainingStatus(
            term=term,
            version=self._part_trainer.version,
            restored_term=self._restored_term,
            checkpoints=self._checkpoints.versions[-8:],
            disconnects=breaks,
            progress=self._progress,
            pending_forwards=len(self._part_trainer.activations),
        )

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    # A step ---------------------------------------------------------------------------------------------------------

    async def execute(self, work: StepOperation) -> None:
        """One operation of the step in hand. Raises whatever the network, the loss or the optimizer raises."""
        with self._account.record_operation(work):
            match work:
                case Forward():
                    await self._forward(work)
                case Backward():
                    await self._backward(work)
                case Commit():
                    await self._commit(work)

    def send_prepared(self, work: Forward | Backward, term: int) -> None:
        """Tell the step's source that this stage has done all that it has to do for it, and how long that took."""
        details = {"stage": self._stage.name, "worker": self._worker, **self._times.pop_sums()}
        word = StepMessage(request_id=bytes.fromhex(work.micro_batch.step), verb="prepared", term=term, details=details)
        self._post.send(work.task.reply_to.topic, word)

    async def abort(self) -> None:
        """Let go of the step in hand: everything is as the last version left it."""
        self._times.pop_sums()
        self._account.reset()
        await self._in_thread(self._part_trainer.abort)

    async def _forward(self, work: Forward) -> None:
        task = work.task
        assert isinstance(task.content, TensorContent)
        self._check_number(task.source, work)
        with self._times.measure("decode_ms"):
            tensors = {name: to_torch(tensor) for name, tensor in task.content.tensors.items()}
            if work.labels is not None:
                tensors[LABELS_TENSOR] = to_torch(work.labels)
        self._times.add("bytes_in", task.content.nbytes)
        self._times.add("tasks", 1)
        with self._times.measure("forward_ms"):
            given = await self._in_thread(self._part_trainer.forward, work.micro_batch, task.request_id, tensors)
        if isinstance(given, MicroBatchMetrics):
            self._post.send(task.reply_to.topic, Result(request_id=task.request_id, content=_said(given)))
            return
        assert self._next is not None
        body = self._encoded(given, task.content.metadata)
        onward = Activation(
            request_id=task.request_id,
            content=body,
            reply_to=task.reply_to,
            sender_inbox=self._inbox,
            source=task.source,
            trace=self._account.trace_context(task),
        )
        self._post.send(self._pipeline.topics(self._next).inbox(self.members[self._next.name]), onward)

    def _check_number(self, source: str, work: Forward) -> None:
        """A source that does not know how far it is, or has a twin, must not have a step done twice, or left out."""
        if work.micro_batch.mode == "evaluate":
            return
        done = self._progress[source].steps if source in self._progress else 0
        if work.micro_batch.number != done:
            raise StaleStep(source, done, work.micro_batch.number)
        if source not in self._progress and len(self._progress) >= SOURCES_LIMIT:
            raise TooManySources(SOURCES_LIMIT)

    async def _backward(self, work: Backward) -> None:
        gradients = None
        if work.gradient is not None:
            with self._times.measure("decode_ms"):
                gradients = {name: to_torch(tensor) for name, tensor in work.gradient.content.tensors.items()}
            self._times.add("bytes_in", work.gradient.content.nbytes)
        with self._times.measure("backward_ms"):
            given = await self._in_thread(self._part_trainer.backward, work.request_id, gradients)
        if isinstance(work.task, Activation):
            gradient = Gradient(request_id=work.request_id, content=self._encoded(given), sender_inbox=self._inbox)
            self._post.send(work.task.sender_inbox, gradient)

    def _encoded(self, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> TensorContent:
        with self._times.measure("encode_ms"):
            body = TensorContent({name: from_torch(tensor) for name, tensor in tensors.items()}, metadata or {})
        self._times.add("bytes_out", body.nbytes)
        return body

    async def _commit(self, work: Commit) -> None:
        word = work.message
        with self._times.measure("commit_ms"):
            version = await self._in_thread(self._part_trainer.commit, work.lr)
        self._progress = {**self._progress, work.source: work.progress}
        if word.details.get("checkpoint") or version % self._pipeline.training.checkpoint_every == 0:
            # Even where one of this number is: a worker that was frozen may have written what was given up meanwhile.
            await self._write(version)
        told = {"stage": self._stage.name, "worker": self._worker, "version": version}
        self._post.send(
            word.sender_inbox, StepMessage(request_id=word.request_id, verb="committed", term=word.term, details=told)
        )

    # Versions -------------------------------------------------------------------------------------------------------

    async def save_checkpoint(self) -> None:
        """Write the version in memory as a checkpoint, unless it is there. Raises `CannotCheckpoint`, `NotFinite`."""
        version = self._part_trainer.version
        if version is None or version == 0 or version in self._checkpoints.versions:
            return
        await self._write(version)

    async def _write(self, version: int) -> None:
        tensors = await self._in_thread(self._part_trainer.checkpoint_tensors, version)
        await self._in_thread(self._checkpoints.save, Checkpoint(version, tensors, self._progress, self._restored_term))

    async def try_save_checkpoint(self) -> None:
        """Leave the version in memory behind: whoever takes over goes on from there."""
        try:
            await self.save_checkpoint()
        except SparseError as error:
            log.warning("worker %s leaves no checkpoint behind: %s", self._worker, error)

    def discard_version(self) -> None:
        """Another worker trains the part from here on: what is in memory is nobody's version, and not to be written."""
        self._part_trainer.version = None
        self.members = {}

    async def restore(self, version: int, term: int, since: int) -> None:
        """Be at this version. Raises what reading or writing a checkpoint raises.

        It is on disk afterwards, here as on all stages: the one before it is never needed any more. Memory of a term
        before `since` is not the version of its number: the others gave that up, and have done other steps up to there.
        """
        if self._part_trainer.version != version or (version and self._restored_term != since):
            found = None if version == 0 else await self._in_thread(self._checkpoints.load, version)
            await self._in_thread(self._part_trainer.restore, version, found.tensors if found else None)
            self._progress = dict(found.progress) if found else {}
        self._restored_term = term
        self._checkpoints.delete_after(version, term)
        try:
            await self.save_checkpoint()
        except NotFinite:
            self._part_trainer.version = None  # of no use to anybody: next time, to one before it
            raise

    async def send_weights(self, word: StepMessage) -> None:
        """Answer with the part's state, by the names of the uncut network: of a version that is here, or as it is."""
        version = word.details.get("version")
        try:
            if version is None or version == self._part_trainer.version:
                state = self._part_trainer.weights()
            else:
                state = model_state_dict((await self._in_thread(self._checkpoints.load, int(version))).tensors)
        except ForeignCheckpoint:
            gone = VersionGone(version)
            failure = Failure(
                request_id=word.request_id,
                stage=self._stage.name,
                worker=self._worker,
                error=gone.code,
                reason=str(gone),
            )
            self._post.send(word.sender_inbox, failure)
        else:
            body = TensorContent({name: from_array(tensor) for name, tensor in state.items()})
            self._post.send(word.sender_inbox, Result(request_id=word.request_id, content=body))


def _said(judged: MicroBatchMetrics) -> TensorContent:
    """What the source hears of a micro-batch: `loss` and `rows`, and `correct` where labels are classes."""
    import numpy as np

    found = {"loss": np.float64(judged.loss), "rows": np.int64(judged.rows)}
    if judged.correct is not None:
        found["correct"] = np.int64(judged.correct)
    return TensorContent({name: from_array(np.asarray(value)) for name, value in found.items()})
