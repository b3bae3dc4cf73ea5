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
from brokers.protocol.messages import Activation, Body, Failure, Gradient, Result, Step
from brokers.protocol.safetensors_codec import from_array, from_torch, to_torch
from brokers.protocol.training import LABELS, SOURCES_LIMIT, Progress, Standing
from brokers.telemetry.client import EventClient
from stages.training.checkpoints import Checkpoints, Version
from stages.training.errors import ForeignCheckpoint, NotFinite, StaleStep, TooManySources, VersionGone
from stages.training.part_trainer import Judged, Learner, model_state
from stages.training.send_queue import Post
from stages.training.step_queue import Backward, Commit, Forward, Work
from stages.training.step_timing import Times
from stages.training.telemetry import Account

log = logging.getLogger(__name__)

T = TypeVar("T")


class Execution:
    """One part, its versions in memory and on disk, and the thread that computes."""

    def __init__(
        self,
        pipeline: Pipeline,
        stage: StageTable,
        worker: str,
        learner: Learner,
        post: Post,
        checkpoints: Callable[[str], Checkpoints],
        events: EventClient | None = None,
    ) -> None:
        self.crew: dict[str, str] = {}
        self._pipeline, self._stage, self._worker = pipeline, stage, worker
        self._learner, self._post = learner, post
        self._inbox = pipeline.topics(stage).inbox(worker)
        self._next = pipeline.after(stage)
        self._make_checkpoints = checkpoints
        self._checkpoints: Checkpoints
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"compute-{stage.name}")
        self._progress: dict[str, Progress] = {}
        self._since = 0  # the last term that told what is in memory to be a version
        self._times = Times()
        self._account = Account(events, self._times)

    async def start(self) -> str:
        """Build the part and see what checkpoints there are; what tells the part from others.

        Raises `ForeignCheckpoint`, and whatever is wrong with the model or its recipe.
        """
        fingerprint = await self._in_thread(self._learner.start)
        self._checkpoints = self._make_checkpoints(fingerprint)
        self._checkpoints.check()
        return fingerprint

    @property
    def term(self) -> int:
        """The newest term of its checkpoints: in none before it would they be changed."""
        return self._checkpoints.term

    def stop(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def standing(self, term: int, breaks: int) -> Standing:
        """How far the part has come."""
        return Standing(
            term=term,
            version=self._learner.version,
            since=self._since,
            kept=self._checkpoints.versions[-8:],
            breaks=breaks,
            progress=self._progress,
            saved=len(self._learner.saved),
        )

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    # A step ---------------------------------------------------------------------------------------------------------

    async def do(self, work: Work) -> None:
        """One operation of the step in hand. Raises whatever the network, the loss or the optimizer raises."""
        with self._account.doing(work):
            match work:
                case Forward():
                    await self._forward(work)
                case Backward():
                    await self._backward(work)
                case Commit():
                    await self._commit(work)

    def prepared(self, work: Forward | Backward, term: int) -> None:
        """Tell the step's source that this stage has done all that it has to do for it, and how long that took."""
        details = {"stage": self._stage.name, "worker": self._worker, **self._times.take()}
        word = Step(request=bytes.fromhex(work.micro.step), verb="prepared", term=term, details=details)
        self._post.send(work.task.reply.topic, word)

    async def abandon(self) -> None:
        """Let go of the step in hand: everything is as the last version left it."""
        self._times.take()
        self._account.forget()
        await self._in_thread(self._learner.abandon)

    async def _forward(self, work: Forward) -> None:
        task = work.task
        assert isinstance(task.content, Body)
        self._check_number(task.source, work)
        with self._times.measure("decode_ms"):
            tensors = {name: to_torch(tensor) for name, tensor in task.content.tensors.items()}
            if work.labels is not None:
                tensors[LABELS] = to_torch(work.labels)
        self._times.add("bytes_in", task.content.nbytes)
        self._times.add("tasks", 1)
        with self._times.measure("forward_ms"):
            given = await self._in_thread(self._learner.forward, work.micro, task.request, tensors)
        if isinstance(given, Judged):
            self._post.send(task.reply.topic, Result(request=task.request, content=_said(given)))
            return
        assert self._next is not None
        body = self._encoded(given, task.content.metadata)
        onward = Activation(
            request=task.request,
            content=body,
            reply=task.reply,
            sender=self._inbox,
            source=task.source,
            trace=self._account.trace(task),
        )
        self._post.send(self._pipeline.topics(self._next).inbox(self.crew[self._next.name]), onward)

    def _check_number(self, source: str, work: Forward) -> None:
        """A source that does not know how far it is, or has a twin, must not have a step done twice, or left out."""
        if work.micro.mode == "evaluate":
            return
        done = self._progress[source].steps if source in self._progress else 0
        if work.micro.number != done:
            raise StaleStep(source, done, work.micro.number)
        if source not in self._progress and len(self._progress) >= SOURCES_LIMIT:
            raise TooManySources(SOURCES_LIMIT)

    async def _backward(self, work: Backward) -> None:
        gradients = None
        if work.gradient is not None:
            with self._times.measure("decode_ms"):
                gradients = {name: to_torch(tensor) for name, tensor in work.gradient.content.tensors.items()}
            self._times.add("bytes_in", work.gradient.content.nbytes)
        with self._times.measure("backward_ms"):
            given = await self._in_thread(self._learner.backward, work.request, gradients)
        if isinstance(work.task, Activation):
            gradient = Gradient(request=work.request, content=self._encoded(given), sender=self._inbox)
            self._post.send(work.task.sender, gradient)

    def _encoded(self, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> Body:
        with self._times.measure("encode_ms"):
            body = Body({name: from_torch(tensor) for name, tensor in tensors.items()}, metadata or {})
        self._times.add("bytes_out", body.nbytes)
        return body

    async def _commit(self, work: Commit) -> None:
        word = work.word
        with self._times.measure("commit_ms"):
            version = await self._in_thread(self._learner.commit, work.lr)
        self._progress = {**self._progress, work.source: work.progress}
        if word.details.get("checkpoint") or version % self._pipeline.training.checkpoint_every == 0:
            # Even where one of this number is: a worker that was frozen may have written what was given up meanwhile.
            await self._write(version)
        told = {"stage": self._stage.name, "worker": self._worker, "version": version}
        self._post.send(word.sender, Step(request=word.request, verb="committed", term=word.term, details=told))

    # Versions -------------------------------------------------------------------------------------------------------

    async def keep_version(self) -> None:
        """Write the version in memory as a checkpoint, unless it is there. Raises `CannotCheckpoint`, `NotFinite`."""
        version = self._learner.version
        if version is None or version == 0 or version in self._checkpoints.versions:
            return
        await self._write(version)

    async def _write(self, version: int) -> None:
        tensors = await self._in_thread(self._learner.tensors, version)
        await self._in_thread(self._checkpoints.save, Version(version, tensors, self._progress, self._since))

    async def leave_version(self) -> None:
        """Leave the version in memory behind: whoever takes over goes on from there."""
        try:
            await self.keep_version()
        except SparseError as error:
            log.warning("worker %s leaves no checkpoint behind: %s", self._worker, error)

    def forget_version(self) -> None:
        """Another worker trains the part from here on: what is in memory is nobody's version, and not to be written."""
        self._learner.version = None
        self.crew = {}

    async def restore(self, version: int, term: int, since: int) -> None:
        """Be at this version. Raises what reading or writing a checkpoint raises.

        It is on disk afterwards, here as on all stages: the one before it is never needed any more. Memory of a term
        before `since` is not the version of its number: the others gave that up, and have done other steps up to there.
        """
        if self._learner.version != version or (version and self._since != since):
            found = None if version == 0 else await self._in_thread(self._checkpoints.load, version)
            await self._in_thread(self._learner.restore, version, found.tensors if found else None)
            self._progress = dict(found.progress) if found else {}
        self._since = term
        self._checkpoints.drop_after(version, term)
        try:
            await self.keep_version()
        except NotFinite:
            self._learner.version = None  # of no use to anybody: next time, to one before it
            raise

    async def send_weights(self, word: Step) -> None:
        """Answer with the part's state, by the names of the uncut network: of a version that is here, or as it is."""
        version = word.details.get("version")
        try:
            if version is None or version == self._learner.version:
                state = self._learner.weights()
            else:
                state = model_state((await self._in_thread(self._checkpoints.load, int(version))).tensors)
        except ForeignCheckpoint:
            gone = VersionGone(version)
            failure = Failure(
                request=word.request,
                stage=self._stage.name,
                worker=self._worker,
                error=type(gone).__name__,
                reason=str(gone),
            )
            self._post.send(word.sender, failure)
        else:
            body = Body({name: from_array(tensor) for name, tensor in state.items()})
            self._post.send(word.sender, Result(request=word.request, content=body))


def _said(judged: Judged) -> Body:
    """What the source hears of a micro-batch: `loss` and `rows`, and `correct` where labels are classes."""
    import numpy as np

    found = {"loss": np.float64(judged.loss), "rows": np.int64(judged.rows)}
    if judged.correct is not None:
        found["correct"] = np.int64(judged.correct)
    return Body({name: from_array(np.asarray(value)) for name, value in found.items()})
