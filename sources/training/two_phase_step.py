"""One step of training, as its source sees it: micro-batches out; losses, votes, and the commit of all stages.

A step is a transaction. It is *prepared* when each stage has said so, which it does when it has done the backward of
every micro-batch; then all are told to *commit*. If anything comes between, the term ends and all stages go back to a
version that they share, so that no step is ever half taken.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.protocol.messages import (
    Failure,
    Message,
    ReplyTo,
    Result,
    StepMessage,
    Task,
    TensorContent,
    new_request_id,
)
from brokers.protocol.safetensors_codec import from_numpy, to_numpy
from brokers.protocol.traceparent import TraceContext, start_trace
from brokers.protocol.training import LABELS_TENSOR, MICRO_BATCH_KEY, MicroBatch, StepMode, micro_batch_seed
from sources.training.errors import StepFailed, TermOver
from sources.training.membership import MembershipWatcher, TermMembers

NO_COORDINATOR = "nobody conducts the pipeline any more"
INPUT_TENSOR = "input"  # the only tensor of a first stage: it needs no name of the network's


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What a step is made of: inputs (B, ...) and labels (B, ...) for each of its micro-batches.

    `commit` gives what its commit says, when it is said: the run may have been told to end meanwhile.
    """

    number: int
    micro_batches: Sequence[tuple[NDArray[Any], NDArray[Any]]]
    mode: StepMode = "train"
    seed: int = 0
    make_commit_details: Callable[[], Mapping[str, Any]] = dict

    @property
    def rows(self) -> int:
        return sum(len(labels) for _, labels in self.micro_batches)


@dataclass(slots=True, eq=False)
class StepOutcome:
    """What has come of a step so far; losses and hits are in the order of its micro-batches."""

    losses: dict[int, tuple[float, int]] = field(default_factory=dict)  # index -> mean loss, rows
    correct_counts: dict[int, int] = field(default_factory=dict)
    stage_times: dict[str, dict[str, Any]] = field(default_factory=dict)  # by stage, as it was prepared
    committed_versions: dict[str, int] = field(default_factory=dict)  # stage -> version
    elapsed_s: float = 0.0

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.losses.values())

    @property
    def loss(self) -> float:
        """The mean over all rows."""
        return sum(loss * rows for _, (loss, rows) in sorted(self.losses.items())) / max(1, self.rows)

    @property
    def accuracy(self) -> float | None:
        return sum(self.correct_counts.values()) / max(1, self.rows) if self.correct_counts else None


@dataclass(slots=True, eq=False)
class _StepInFlight:
    step: bytes
    requests: dict[bytes, int]
    outcome: StepOutcome = field(default_factory=StepOutcome)
    failure: Failure | None = None


class StepRunner:
    """Does steps, one at a time. Give what comes to the source's inbox to `heard`."""

    def __init__(
        self, line: MessageChannel, pipeline: Pipeline, name: str, inbox: str, watch: MembershipWatcher
    ) -> None:
        self._line, self._pipeline, self._name, self._inbox, self._watch = line, pipeline, name, inbox, watch
        self._in_hand: _StepInFlight | None = None
        self._collected: dict[bytes, Result | Failure | None] = {}
        self._broken = False

    # Heard --------------------------------------------------------------------------------------------------------

    def on_message(self, topic: str, message: Message) -> None:
        """A message came. What belongs to no step in hand is of one that was given up."""
        hand = self._in_hand
        match message:
            case Result(content=TensorContent()) | Failure() if message.request_id in self._collected:
                self._collected[message.request_id] = message
            case Result() if hand and message.request_id in hand.requests:
                self._judged(hand, message)
            case StepMessage(verb="prepared") if hand and message.request_id == hand.step:
                hand.outcome.stage_times[str(message.details.get("stage"))] = dict(message.details)
            case StepMessage(verb="committed") if hand and message.request_id == hand.step:
                hand.outcome.committed_versions[str(message.details.get("stage"))] = int(
                    message.details.get("version", 0)
                )
            case Failure() if hand and (message.request_id in hand.requests or message.request_id == hand.step):
                hand.failure = message
        self._watch.changed.set()

    def _judged(self, hand: _StepInFlight, result: Result) -> None:
        if not isinstance(result.content, TensorContent):
            return
        found = {name: to_numpy(tensor) for name, tensor in result.content.tensors.items()}
        index = hand.requests[result.request_id]
        hand.outcome.losses[index] = float(found["loss"]), int(found["rows"])
        if "correct" in found:
            hand.outcome.correct_counts[index] = int(found["correct"])

    def on_connection_lost(self) -> None:
        """Our connection broke: what was on its way may be lost."""
        self._broken = True
        self._watch.reset()

    # A step -------------------------------------------------------------------------------------------------------

    async def run_step(self, crew: TermMembers, plan: StepPlan, outcome: StepOutcome) -> None:
        """Do one step; `outcome` is filled as it goes. Raises `TermOver`, or `StepFailed`, which nobody can mend."""
        hand = self._in_hand = _StepInFlight(new_request_id(), {}, outcome)
        self._broken = False
        begin_s = time.monotonic()
        try:
            await self._send(crew, plan, hand)
            await self._until(crew, plan, lambda: len(outcome.losses) == len(plan.micro_batches))
            if plan.mode == "train":
                stages = len(self._pipeline.stage)
                await self._until(crew, plan, lambda: len(outcome.stage_times) == stages)
                await self._commit(crew, plan, hand)
                await self._until(crew, plan, lambda: len(outcome.committed_versions) == stages)
        finally:
            outcome.elapsed_s = time.monotonic() - begin_s
            self._in_hand = None

    async def _send(self, crew: TermMembers, plan: StepPlan, hand: _StepInFlight) -> None:
        stays = self._pipeline.training.labels == "stay"
        first, last = (self._watch.worker_inbox(crew, self._pipeline.stage[index].name) for index in (0, -1))
        trace = start_trace(hand.step)  # one for the whole step: who watches sees its micro-batches side by side
        for index, (inputs, labels) in enumerate(plan.micro_batches):
            micro = MicroBatch(
                step=hand.step.hex(),
                term=crew.term,
                index=index,
                count=len(plan.micro_batches),
                rows=plan.rows,
                number=plan.number,
                seed=micro_batch_seed(plan.seed, plan.number, index),
                mode=plan.mode,
            )
            request = new_request_id()
            hand.requests[request] = index
            tensors, targets = {INPUT_TENSOR: from_numpy(inputs)}, {LABELS_TENSOR: from_numpy(labels)}
            if stays and len(self._pipeline.stage) > 1:
                await self._line.send(last, self._task(request, targets, micro, trace))
            else:
                tensors |= targets
            await self._line.send(first, self._task(request, tensors, micro, trace))

    def _task(self, request: bytes, tensors: Mapping[str, Any], micro: MicroBatch, trace: TraceContext) -> Task:
        body, reply = TensorContent(tensors, {MICRO_BATCH_KEY: micro.to_json()}), ReplyTo(self._inbox)
        return Task(
            request_id=request, content=body, reply_to=reply, sender_inbox=self._inbox, source=self._name, trace=trace
        )

    async def _commit(self, crew: TermMembers, plan: StepPlan, hand: _StepInFlight) -> None:
        details = {"source": self._name, **plan.make_commit_details()}
        word = StepMessage(
            request_id=hand.step, verb="commit", term=crew.term, sender_inbox=self._inbox, details=details
        )
        # The first stage last: should we die in between, whoever conducts has the step in hand still, and gives it up.
        for stage in reversed(self._pipeline.stage):
            await self._line.send(self._watch.worker_inbox(crew, stage.name), word)

    async def _until(self, crew: TermMembers, plan: StepPlan, done: Any) -> None:
        """Wait until something is so; raise when it will not be in this term."""
        hand, lease_s = self._in_hand, self._pipeline.pipeline.lease_s
        assert hand is not None
        while True:
            self._watch.changed.clear()
            now = self._watch.members
            if self._broken:
                await self._abandon(crew, hand, f"the connection of source {self._name} broke")
            if hand.failure is not None:
                await self._failed(crew, plan, hand, hand.failure)
            if done():
                return
            if now is None or now.term != crew.term:
                raise TermOver(now.reason if now else NO_COORDINATOR)
            try:
                async with asyncio.timeout(lease_s):
                    await self._watch.changed.wait()
            except TimeoutError:
                await self._abandon(crew, hand, f"source {self._name} has heard nothing of its step for {lease_s:g} s")

    async def _failed(self, crew: TermMembers, plan: StepPlan, hand: _StepInFlight, failure: Failure) -> None:
        told = f"{failure.error} at stage {failure.stage}, worker {failure.worker}"
        try:
            await self._abandon(crew, hand, told)
        except TermOver:
            if failure.retry:
                raise
            raise StepFailed(plan.number, failure.stage, failure.worker, failure.error, failure.reason) from None

    async def _abandon(self, crew: TermMembers, hand: _StepInFlight, why: str) -> None:
        word = StepMessage(
            request_id=hand.step, verb="abort", term=crew.term, sender_inbox=self._inbox, details={"reason": why}
        )
        await self._line.send(self._watch.coordinator_inbox(crew), word)
        raise TermOver(why)

    # Weights ------------------------------------------------------------------------------------------------------

    async def fetch_weights(self, crew: TermMembers, stage: str, version: int) -> TensorContent | None:
        """The weights of a stage at a version; None where it is not there any more. Raises `TermOver`."""
        request = new_request_id()
        self._collected[request] = None
        self._broken = False
        word = StepMessage(
            request_id=request,
            verb="fetch_weights",
            term=crew.term,
            sender_inbox=self._inbox,
            details={"version": version},
        )
        try:
            await self._line.send(self._watch.worker_inbox(crew, stage), word)
            while (found := self._collected[request]) is None:
                self._watch.changed.clear()
                now = self._watch.members
                if now is None or now.term != crew.term or self._broken:
                    raise TermOver(now.reason if now else NO_COORDINATOR)
                try:
                    async with asyncio.timeout(self._pipeline.pipeline.lease_s):
                        await self._watch.changed.wait()
                except TimeoutError:
                    raise TermOver(f"stage {stage} did not send its weights") from None
            return found.content if isinstance(found, Result) and isinstance(found.content, TensorContent) else None
        finally:
            del self._collected[request]
