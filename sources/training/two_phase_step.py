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
from brokers.dispatch.channel import Line
from brokers.protocol.messages import Body, Failure, Message, ReplyTo, Result, Step, Task, new_request_id
from brokers.protocol.safetensors_codec import from_numpy, to_numpy
from brokers.protocol.traceparent import TraceContext, root_of
from brokers.protocol.training import LABELS, MICRO, MicroBatch, Mode, micro_seed
from sources.training.errors import StepFailed, TermOver
from sources.training.membership import Crew, CrewWatch

NOBODY = "nobody conducts the pipeline any more"
INPUT = "input"  # the only tensor of a first stage: it needs no name of the network's


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step is made of: inputs (B, ...) and labels (B, ...) for each of its micro-batches.

    `commit` gives what its commit says, when it is said: the run may have been told to end meanwhile.
    """

    number: int
    micros: Sequence[tuple[NDArray[Any], NDArray[Any]]]
    mode: Mode = "train"
    seed: int = 0
    commit: Callable[[], Mapping[str, Any]] = dict

    @property
    def rows(self) -> int:
        return sum(len(labels) for _, labels in self.micros)


@dataclass(slots=True, eq=False)
class Outcome:
    """What has come of a step so far; losses and hits are in the order of its micro-batches."""

    losses: dict[int, tuple[float, int]] = field(default_factory=dict)  # index -> mean loss, rows
    correct: dict[int, int] = field(default_factory=dict)
    times: dict[str, dict[str, Any]] = field(default_factory=dict)  # by stage, as it was prepared
    committed: dict[str, int] = field(default_factory=dict)  # stage -> version
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
        return sum(self.correct.values()) / max(1, self.rows) if self.correct else None


@dataclass(slots=True, eq=False)
class _InHand:
    step: bytes
    requests: dict[bytes, int]
    outcome: Outcome = field(default_factory=Outcome)
    failure: Failure | None = None


class Stepper:
    """Does steps, one at a time. Give what comes to the source's inbox to `heard`."""

    def __init__(self, line: Line, pipeline: Pipeline, name: str, inbox: str, watch: CrewWatch) -> None:
        self._line, self._pipeline, self._name, self._inbox, self._watch = line, pipeline, name, inbox, watch
        self._in_hand: _InHand | None = None
        self._collected: dict[bytes, Result | Failure | None] = {}
        self._broken = False

    # Heard --------------------------------------------------------------------------------------------------------

    def heard(self, topic: str, message: Message) -> None:
        """A message came. What belongs to no step in hand is of one that was given up."""
        hand = self._in_hand
        match message:
            case Result(content=Body()) | Failure() if message.request in self._collected:
                self._collected[message.request] = message
            case Result() if hand and message.request in hand.requests:
                self._judged(hand, message)
            case Step(verb="prepared") if hand and message.request == hand.step:
                hand.outcome.times[str(message.details.get("stage"))] = dict(message.details)
            case Step(verb="committed") if hand and message.request == hand.step:
                hand.outcome.committed[str(message.details.get("stage"))] = int(message.details.get("version", 0))
            case Failure() if hand and (message.request in hand.requests or message.request == hand.step):
                hand.failure = message
        self._watch.changed.set()

    def _judged(self, hand: _InHand, result: Result) -> None:
        if not isinstance(result.content, Body):
            return
        found = {name: to_numpy(tensor) for name, tensor in result.content.tensors.items()}
        index = hand.requests[result.request]
        hand.outcome.losses[index] = float(found["loss"]), int(found["rows"])
        if "correct" in found:
            hand.outcome.correct[index] = int(found["correct"])

    def broken(self) -> None:
        """Our connection broke: what was on its way may be lost."""
        self._broken = True
        self._watch.forget()

    # A step -------------------------------------------------------------------------------------------------------

    async def do(self, crew: Crew, plan: Plan, outcome: Outcome) -> None:
        """Do one step; `outcome` is filled as it goes. Raises `TermOver`, or `StepFailed`, which nobody can mend."""
        hand = self._in_hand = _InHand(new_request_id(), {}, outcome)
        self._broken = False
        begin_s = time.monotonic()
        try:
            await self._send(crew, plan, hand)
            await self._until(crew, plan, lambda: len(outcome.losses) == len(plan.micros))
            if plan.mode == "train":
                stages = len(self._pipeline.stage)
                await self._until(crew, plan, lambda: len(outcome.times) == stages)
                await self._commit(crew, plan, hand)
                await self._until(crew, plan, lambda: len(outcome.committed) == stages)
        finally:
            outcome.elapsed_s = time.monotonic() - begin_s
            self._in_hand = None

    async def _send(self, crew: Crew, plan: Plan, hand: _InHand) -> None:
        stays = self._pipeline.training.labels == "stay"
        first, last = (self._watch.inbox(crew, self._pipeline.stage[index].name) for index in (0, -1))
        trace = root_of(hand.step)  # one for the whole step: who watches sees its micro-batches side by side
        for index, (inputs, labels) in enumerate(plan.micros):
            micro = MicroBatch(
                step=hand.step.hex(),
                term=crew.term,
                index=index,
                count=len(plan.micros),
                rows=plan.rows,
                number=plan.number,
                seed=micro_seed(plan.seed, plan.number, index),
                mode=plan.mode,
            )
            request = new_request_id()
            hand.requests[request] = index
            tensors, targets = {INPUT: from_numpy(inputs)}, {LABELS: from_numpy(labels)}
            if stays and len(self._pipeline.stage) > 1:
                await self._line.send(last, self._task(request, targets, micro, trace))
            else:
                tensors |= targets
            await self._line.send(first, self._task(request, tensors, micro, trace))

    def _task(self, request: bytes, tensors: Mapping[str, Any], micro: MicroBatch, trace: TraceContext) -> Task:
        body, reply = Body(tensors, {MICRO: micro.to_text()}), ReplyTo(self._inbox)
        return Task(request=request, content=body, reply=reply, sender=self._inbox, source=self._name, trace=trace)

    async def _commit(self, crew: Crew, plan: Plan, hand: _InHand) -> None:
        details = {"source": self._name, **plan.commit()}
        word = Step(request=hand.step, verb="commit", term=crew.term, sender=self._inbox, details=details)
        # The first stage last: should we die in between, whoever conducts has the step in hand still, and gives it up.
        for stage in reversed(self._pipeline.stage):
            await self._line.send(self._watch.inbox(crew, stage.name), word)

    async def _until(self, crew: Crew, plan: Plan, done: Any) -> None:
        """Wait until something is so; raise when it will not be in this term."""
        hand, lease_s = self._in_hand, self._pipeline.pipeline.lease_s
        assert hand is not None
        while True:
            self._watch.changed.clear()
            now = self._watch.crew
            if self._broken:
                await self._abandon(crew, hand, f"the connection of source {self._name} broke")
            if hand.failure is not None:
                await self._failed(crew, plan, hand, hand.failure)
            if done():
                return
            if now is None or now.term != crew.term:
                raise TermOver(now.why if now else NOBODY)
            try:
                async with asyncio.timeout(lease_s):
                    await self._watch.changed.wait()
            except TimeoutError:
                await self._abandon(crew, hand, f"source {self._name} has heard nothing of its step for {lease_s:g} s")

    async def _failed(self, crew: Crew, plan: Plan, hand: _InHand, failure: Failure) -> None:
        told = f"{failure.error} at stage {failure.stage}, worker {failure.worker}"
        try:
            await self._abandon(crew, hand, told)
        except TermOver:
            if failure.retry:
                raise
            raise StepFailed(plan.number, failure.stage, failure.worker, failure.error, failure.reason) from None

    async def _abandon(self, crew: Crew, hand: _InHand, why: str) -> None:
        word = Step(request=hand.step, verb="abandon", term=crew.term, sender=self._inbox, details={"why": why})
        await self._line.send(self._watch.conductor_inbox(crew), word)
        raise TermOver(why)

    # Weights ------------------------------------------------------------------------------------------------------

    async def collect(self, crew: Crew, stage: str, version: int) -> Body | None:
        """The weights of a stage at a version; None where it is not there any more. Raises `TermOver`."""
        request = new_request_id()
        self._collected[request] = None
        self._broken = False
        word = Step(request=request, verb="collect", term=crew.term, sender=self._inbox, details={"version": version})
        try:
            await self._line.send(self._watch.inbox(crew, stage), word)
            while (found := self._collected[request]) is None:
                self._watch.changed.clear()
                now = self._watch.crew
                if now is None or now.term != crew.term or self._broken:
                    raise TermOver(now.why if now else NOBODY)
                try:
                    async with asyncio.timeout(self._pipeline.pipeline.lease_s):
                        await self._watch.changed.wait()
                except TimeoutError:
                    raise TermOver(f"stage {stage} did not send its weights") from None
            return found.content if isinstance(found, Result) and isinstance(found.content, Body) else None
        finally:
            del self._collected[request]
