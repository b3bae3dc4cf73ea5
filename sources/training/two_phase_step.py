"""One training step as its source runs it, a two-phase commit over all stages, and the members of the pipeline.

The source sends the micro-batches. A stage is *prepared* once it has done the backward pass of each of them; when all
stages are prepared, the source sends them *commit*. If anything fails before, the term ends and all stages return to
a version that they have in common: a step is applied on all stages or on none.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.dispatch.worker_registry import PresenceListener
from brokers.errors import RequestError, SparseError
from brokers.protocol.messages import (
    Failure,
    Message,
    ReplyTo,
    Result,
    StepMessage,
    StepVerb,
    Task,
    TensorContent,
    new_request_id,
)
from brokers.protocol.safetensors_codec import from_numpy, to_numpy
from brokers.protocol.topics import source_inbox_topic
from brokers.protocol.traceparent import start_trace
from brokers.protocol.training import (
    LABELS_TENSOR,
    MICRO_BATCH_KEY,
    MicroBatch,
    StepMode,
    TrainingStatus,
    micro_batch_seed,
)
from brokers.protocol.transport import Transport
from sources.datasets.dataset import Inputs, Labels, named_inputs


class TermOver(SparseError):
    """The term of the current step has ended: the step must be repeated in the next term."""

    def __init__(self, reason: str) -> None:
        super().__init__("TermOver", reason)


class MembershipWatcher:
    """Follows the presence records of the first stage's workers. `changed` is set when the members may have changed."""

    def __init__(self, pipeline: Pipeline, transport: Transport) -> None:
        self.changed = asyncio.Event()
        self._pipeline = pipeline
        self._presence = PresenceListener(transport, lambda event: self.changed.set(), reset_on_reconnect=True)

    async def open(self) -> None:
        await self._presence.subscribe(self._pipeline.topics(self._pipeline.stage[0]).presence_filter)

    async def close(self) -> None:
        await self._presence.close()

    @property
    def term(self) -> TrainingStatus | None:
        """The newest term, with its members, as its coordinator reports it; None while there is no coordinator."""
        coordinators = [status for status in self._statuses() if status.members]
        return max(coordinators, key=lambda status: status.term, default=None)

    @property
    def problem(self) -> str:
        """Why the pipeline cannot be trained, as the first stage reports it; empty if it can."""
        return next((status.problem for status in self._statuses() if status.problem), "")

    def _statuses(self) -> Iterator[TrainingStatus]:
        now_s = time.monotonic()
        for entry in self._presence.registry.workers.values():
            if entry.record.training is not None and not entry.is_silent(now_s):
                yield entry.record.training

    def worker_inbox(self, term: TrainingStatus, stage: str) -> str:
        """The inbox topic of the worker of a stage."""
        return self._pipeline.topics(self._pipeline.find_stage(stage)).inbox(term.members[stage])


class StepFailed(RequestError):
    """A stage could not do its part of step `number`, and would fail again."""

    def __init__(self, number: int, failure: Failure) -> None:
        place = f"stage {failure.stage!r}, worker {failure.worker!r}"
        super().__init__("StepFailed", f"step {number} failed at {place}: {failure.error}: {failure.reason}")
        self.failure = failure


class _Stalled(Exception):
    """The step cannot be completed in this term, which must be ended."""


@dataclass(slots=True, eq=False)
class Step:
    """A step and the responses to it.

    Args:
        number: of the source's steps, from 0.
        micro_batches: inputs (B, ...) and labels (B, ...) of each.
        seed: of the run; random layers are seeded from it and the numbers of step and micro-batch.
        make_commit_details: called when the step is committed: by then a stop may have been requested.
    """

    number: int
    micro_batches: Sequence[tuple[Inputs, Labels]]
    mode: StepMode = "train"
    seed: int = 0
    make_commit_details: Callable[[], Mapping[str, Any]] = dict
    step_id: bytes = field(default_factory=new_request_id)
    index_by_request: dict[bytes, int] = field(default_factory=dict)  # request id -> micro-batch
    losses: dict[int, tuple[float, int]] = field(default_factory=dict)  # micro-batch -> mean loss, rows
    correct_counts: dict[int, int] = field(default_factory=dict)  # micro-batch -> correct predictions
    stage_times: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the stages that are prepared
    committed_versions: dict[str, int] = field(default_factory=dict)  # stage -> version
    failure: Failure | None = None
    elapsed_s: float = 0.0

    @property
    def rows(self) -> int:
        return sum(len(labels) for _, labels in self.micro_batches)

    @property
    def loss(self) -> float:
        """The mean loss over all rows, summed in the order of micro-batches: it must be reproducible."""
        return sum(loss * rows for _, (loss, rows) in sorted(self.losses.items())) / max(1, self.rows)

    @property
    def accuracy(self) -> float | None:
        return sum(self.correct_counts.values()) / max(1, self.rows) if self.correct_counts else None


class StepRunner:
    """Runs one step at a time. Messages of the source's inbox go to `on_message`."""

    def __init__(self, channel: MessageChannel, pipeline: Pipeline, name: str, membership: MembershipWatcher) -> None:
        self.inbox = source_inbox_topic(pipeline.source.site, name)
        self._channel = channel
        self._pipeline = pipeline
        self._name = name
        self._membership = membership
        self._step: Step | None = None
        self._weights: dict[bytes, Result | Failure | None] = {}  # responses to `fetch_weights`
        self._connection_lost = False

    def on_message(self, topic: str, message: Message) -> None:
        """Record a response. Messages of a step that was aborted are ignored."""
        if message.request_id in self._weights and isinstance(message, Result | Failure):
            self._weights[message.request_id] = message
        elif self._step is not None:
            _record_response(self._step, message)
        self._membership.changed.set()

    async def on_reconnect(self) -> None:
        """Messages in transit when the connection broke may be lost."""
        self._connection_lost = True
        self._membership.changed.set()

    async def run_step(self, term: TrainingStatus, step: Step) -> None:
        """Run one step. Raises `TermOver` if it must be repeated, `StepFailed` if it would fail again."""
        self._step = step
        self._connection_lost = False
        begin_s = time.monotonic()
        try:
            await self._send_micro_batches(term, step)
            await self._wait_or_abort(term, step, lambda: len(step.losses) == len(step.micro_batches))
            if step.mode == "train":
                stages = len(self._pipeline.stage)
                await self._wait_or_abort(term, step, lambda: len(step.stage_times) == stages)
                await self._commit(term, step)
                await self._wait_or_abort(term, step, lambda: len(step.committed_versions) == stages)
        finally:
            step.elapsed_s = time.monotonic() - begin_s
            self._step = None

    async def _send_micro_batches(self, term: TrainingStatus, step: Step) -> None:
        first, last = (self._membership.worker_inbox(term, self._pipeline.stage[index].name) for index in (0, -1))
        labels_stay = self._pipeline.training.labels == "stay" and len(self._pipeline.stage) > 1
        trace = start_trace(step.step_id)  # one trace for the step, which shows its micro-batches side by side
        for index, (inputs, labels) in enumerate(step.micro_batches):
            micro_batch = MicroBatch(
                step=step.step_id.hex(),
                term=term.term,
                index=index,
                count=len(step.micro_batches),
                rows=step.rows,
                number=step.number,
                seed=micro_batch_seed(step.seed, step.number, index),
                mode=step.mode,
            )
            request_id = new_request_id()
            step.index_by_request[request_id] = index
            input_tensors = {name: from_numpy(array) for name, array in named_inputs(inputs).items()}
            label_tensors = {LABELS_TENSOR: from_numpy(labels)}
            if labels_stay:
                messages = [(last, label_tensors), (first, input_tensors)]
            else:
                messages = [(first, input_tensors | label_tensors)]
            for inbox, tensors in messages:
                task = Task(
                    request_id=request_id,
                    content=TensorContent(tensors, {MICRO_BATCH_KEY: micro_batch.to_json()}),
                    reply_to=ReplyTo(self.inbox),
                    sender_inbox=self.inbox,
                    source=self._name,
                    trace=trace,
                )
                await self._channel.send(inbox, task)

    async def _commit(self, term: TrainingStatus, step: Step) -> None:
        details = {"source": self._name, **step.make_commit_details()}
        # The first stage last: if this process crashes in between, the coordinator, which is the first stage's worker,
        # still has the step in progress and aborts it.
        for stage in reversed(self._pipeline.stage):
            inbox = self._membership.worker_inbox(term, stage.name)
            await self._send(inbox, step.step_id, "commit", term, **details)

    async def _wait_or_abort(self, term: TrainingStatus, step: Step, is_done: Callable[[], bool]) -> None:
        try:
            await self._wait_in_term(term, lambda: step.failure is not None or is_done())
        except _Stalled as stalled:
            await self._abort(term, step, str(stalled))
            raise TermOver(str(stalled)) from None
        if (failure := step.failure) is not None:
            reason = f"{failure.error} at stage {failure.stage}, worker {failure.worker}"
            await self._abort(term, step, reason)
            raise TermOver(reason) if failure.retry else StepFailed(step.number, failure)

    async def _wait_in_term(self, term: TrainingStatus, is_done: Callable[[], bool]) -> None:
        """Wait for `is_done`. Raises `TermOver` once the term has ended, `_Stalled` where it should be ended."""
        lease_s = self._pipeline.pipeline.lease_s
        while True:
            self._membership.changed.clear()
            if self._connection_lost:
                raise _Stalled(f"the connection of source {self._name} broke")
            if is_done():
                return
            newest = self._membership.term
            if newest is None or newest.term != term.term:
                raise TermOver(newest.term_reason if newest else "the pipeline has no coordinator")
            try:
                async with asyncio.timeout(lease_s):
                    await self._membership.changed.wait()
            except TimeoutError:
                raise _Stalled(f"source {self._name} received no response for {lease_s:g} s") from None

    async def _abort(self, term: TrainingStatus, step: Step, reason: str) -> None:
        coordinator_inbox = self._membership.worker_inbox(term, self._pipeline.stage[0].name)
        await self._send(coordinator_inbox, step.step_id, "abort", term, reason=reason)

    async def _send(self, inbox: str, request_id: bytes, verb: StepVerb, term: TrainingStatus, **details: Any) -> None:
        message = StepMessage(
            request_id=request_id, verb=verb, term=term.term, sender_inbox=self.inbox, details=details
        )
        await self._channel.send(inbox, message)

    async def fetch_weights(self, term: TrainingStatus, stage: str, version: int) -> TensorContent | None:
        """The weights of a stage at a version; None if the stage no longer has them. Raises `TermOver`."""
        request_id = new_request_id()
        self._weights[request_id] = None
        self._connection_lost = False
        try:
            inbox = self._membership.worker_inbox(term, stage)
            await self._send(inbox, request_id, "fetch_weights", term, version=version)
            await self._wait_in_term(term, lambda: self._weights[request_id] is not None)
        except _Stalled as stalled:
            raise TermOver(str(stalled)) from None
        finally:
            response = self._weights.pop(request_id)
        content = response.content if isinstance(response, Result) else None
        return content if isinstance(content, TensorContent) else None


def _record_response(step: Step, message: Message) -> None:
    index = step.index_by_request.get(message.request_id)
    is_of_step = message.request_id == step.step_id
    match message:
        case Result(content=TensorContent() as content) if index is not None:
            values = {name: to_numpy(tensor) for name, tensor in content.tensors.items()}
            step.losses[index] = float(values["loss"]), int(values["rows"])
            if "correct" in values:
                step.correct_counts[index] = int(values["correct"])
        case StepMessage(verb="prepared", details=details) if is_of_step:
            step.stage_times[str(details.get("stage"))] = dict(details)
        case StepMessage(verb="committed", details=details) if is_of_step:
            step.committed_versions[str(details.get("stage"))] = int(details.get("version", 0))
        case Failure() if index is not None or is_of_step:
            step.failure = message
