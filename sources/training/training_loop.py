"""A training run, as its source drives it: epochs of steps, evaluations, and back to where the stages are.

The checkpoints of the stages say how many steps of which source are in a version: so the source itself keeps nothing.
Whatever is lost, it goes on from what the pipeline says, and what a step is made of is a function of its number.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.protocol.messages import TensorContent
from brokers.protocol.training import SourceProgress
from sources.datasets.batches import Batches, split_micro_batches
from sources.datasets.dataset import Dataset
from sources.training.errors import CannotTrain, NobodyTrains, OtherSettings, StepFailed, TermOver, TrainedAlready
from sources.training.lr_schedule import learning_rate
from sources.training.membership import MembershipWatcher, TermMembers
from sources.training.two_phase_step import StepOutcome, StepPlan, StepRunner

log = logging.getLogger(__name__)

TrainingEventDict = dict[str, Any]

# How long a run waits for all stages to be up, and for a problem of theirs to be mended (a folder that is mounted).
MEMBERS_WAIT_S = 120.0
PROBLEM_WAIT_S = 5.0
# A step that is given up again and again is not the stages' misfortune any more.
MAX_CONSECUTIVE_TERMS = 20
# A worker renews its record each second: what it says of versions may be as old as that.
_RECORD_S = 0.3
# Evaluation batches go in pieces of so many micro-batches: each has its turn among the steps of other sources.
_EVALUATE_MICROS = 16
# Settings of a data set that are longer stand as their digest in the record of whoever trains, which must stay small.
_OWN_CHARACTERS = 100


class TrainingLoop:
    """Trains a pipeline on a data set until its epochs are done, or `leave` is set. `tell` gets each event."""

    def __init__(
        self,
        pipeline: Pipeline,
        dataset: Dataset,
        name: str,
        line: MessageChannel,
        inbox: str,
        tell: Callable[[TrainingEventDict], None],
        *,
        resume: bool = False,
    ) -> None:
        self._pipeline, self._name, self._tell, self._resume = pipeline, name, tell, resume
        table, seed = pipeline.training, pipeline.pipeline.seed
        self._table = table
        self._seed = seed
        examples = dataset.train()
        self._batches = Batches(
            examples,
            table.batch,
            seed,
            shuffle=table.shuffle,
            augment=table.augment,
            horizontal_flip=dataset.horizontal_flip,
        )
        self._test = Batches(dataset.test(), table.batch, shuffle=False)
        self.membership = MembershipWatcher(pipeline)
        self.step_runner = StepRunner(line, pipeline, name, inbox, self.membership)
        self.stop_requested = asyncio.Event()
        self.completed_steps = 0  # steps that are in the pipeline's version
        self.completed_micro_batches = 0
        self._settings = _settings(pipeline, len(examples))
        self._version: int | None = None  # of the last step that was done here
        self._terms_in_a_row = 0

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self._table.epochs * self._batches.steps_per_epoch

    # The run ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Train to the end. Raises `StepFailed`, `CannotTrain`, `NobodyTrains`, `TrainedAlready`, `OtherSettings`."""
        crew = await self._crew()
        self.completed_steps = self._begin(crew)
        evaluated = -1
        while not self.stop_requested.is_set():
            try:
                if self._is_evaluated(self.completed_steps) and evaluated != self.completed_steps:
                    await self._evaluate(crew)
                    evaluated = self.completed_steps
                if self.completed_steps >= self.total_steps:
                    break
                await self._step(crew)
                self._terms_in_a_row = 0
            except TermOver as over:
                crew = await self._again(over, crew)
        log.info("%d of %d steps are done", self.completed_steps, self.total_steps)

    async def fetch_weights(self) -> dict[str, TensorContent]:
        """The weights of each stage, all of one version: that of the last step, as long as it is there."""
        crew = await self._crew()
        for _ in range(MAX_CONSECUTIVE_TERMS):
            version = self._version if self._version is not None else crew.version
            try:
                found = [
                    await self.step_runner.fetch_weights(crew, stage.name, version) for stage in self._pipeline.stage
                ]
            except TermOver as over:
                crew = await self._again(over, crew)
                continue
            if None not in found:
                return {stage.name: body for stage, body in zip(self._pipeline.stage, found, strict=True) if body}
            self._version, crew = None, await self._crew()  # others train on: what there is now, then
            await asyncio.sleep(_RECORD_S)
        raise CannotTrain(self._pipeline.name, "its weights change faster than they can be fetched")

    def _begin(self, crew: TermMembers) -> int:
        progress = crew.progress.get(self._name, SourceProgress(steps=0))
        if not progress.steps:
            return 0
        if not self._resume:
            raise TrainedAlready(self._name, progress.steps)
        if differences := _differences(progress.settings, self._settings):
            raise OtherSettings(differences)
        self._tell({"event": "resumed", "step": progress.steps, "version": crew.version})
        return progress.steps

    async def _crew(self, after: int = -1) -> TermMembers:
        """The crew that trains now; waits for one, and a lease for one of a term after this."""
        begin_s = time.monotonic()
        problem_s: float | None = None
        while True:
            crew, now_s = self.membership.members, time.monotonic()
            if crew is not None and set(crew.workers) != {stage.name for stage in self._pipeline.stage}:
                theirs, ours = ", ".join(crew.workers), ", ".join(stage.name for stage in self._pipeline.stage)
                raise CannotTrain(self._pipeline.name, f"its stages are {theirs}, this file has {ours}")
            if crew is not None and (crew.term > after or now_s - begin_s > self._pipeline.pipeline.lease_s):
                return crew
            problem_s = (problem_s or now_s) if self.membership.problem else None
            if problem_s is not None and now_s - problem_s > PROBLEM_WAIT_S:
                raise CannotTrain(self._pipeline.name, self.membership.problem)
            if now_s - begin_s > MEMBERS_WAIT_S:
                raise NobodyTrains(self._pipeline.name, MEMBERS_WAIT_S)
            if self.stop_requested.is_set() and now_s - begin_s > 1.0:
                raise TermOver("the run was told to end")
            self.membership.changed.clear()
            try:
                async with asyncio.timeout(0.5):
                    await self.membership.changed.wait()
            except TimeoutError:
                continue

    async def _again(self, over: TermOver, former: TermMembers) -> TermMembers:
        """A term is over: go on from where the next one begins."""
        begin_s, before = time.monotonic(), self.completed_steps
        self._terms_in_a_row += 1
        if self._terms_in_a_row > MAX_CONSECUTIVE_TERMS:
            raise CannotTrain(
                self._pipeline.name, f"step {self.completed_steps} was given up {MAX_CONSECUTIVE_TERMS} times: {over}"
            )
        crew = await self._crew(after=former.term)
        self._version = None
        self.completed_steps = crew.progress.get(self._name, SourceProgress(steps=0)).steps
        self._tell(
            {
                "event": "rolled_back",
                "step": self.completed_steps,
                "from_step": before,
                "version": crew.version,
                "why": crew.reason or str(over),
                "waited_ms": round(1000 * (time.monotonic() - begin_s), 1),
            }
        )
        return crew

    # A step -------------------------------------------------------------------------------------------------------

    async def _step(self, crew: TermMembers) -> None:
        number, table = self.completed_steps, self._table
        inputs, labels = self._batches.batch(number)
        rate = learning_rate(table, number, self._batches.steps_per_epoch)
        last = number + 1 == self.total_steps

        def commit() -> Mapping[str, Any]:
            return {"lr": rate, "settings": self._settings, "checkpoint": last or self.stop_requested.is_set()}

        plan = StepPlan(number, split_micro_batches(inputs, labels, table.micro_batches), "train", self._seed, commit)
        outcome = StepOutcome()
        try:
            await self.step_runner.run_step(crew, plan, outcome)
        except StepFailed as failed:
            self._tell_failure(failed)
            raise
        self.completed_steps, self._version = number + 1, max(outcome.committed_versions.values())
        self.completed_micro_batches += len(plan.micro_batches)
        self._tell(self._step_event(plan, outcome, rate))

    def _step_event(self, plan: StepPlan, outcome: StepOutcome, rate: float) -> TrainingEventDict:
        stages = [_stage_times(outcome.stage_times[stage.name]) for stage in self._pipeline.stage]
        step_ms = 1000 * outcome.elapsed_s
        busiest = max(sum(stage[name] for name in ("decode_ms", "compute_ms", "encode_ms")) for stage in stages)
        return {
            "event": "step",
            "step": plan.number + 1,
            "steps": self.total_steps,
            "epoch": plan.number // self._batches.steps_per_epoch,
            "epochs": self._table.epochs,
            "version": max(outcome.committed_versions.values()),
            "loss": outcome.loss,
            "accuracy": outcome.accuracy,
            "lr": rate,
            "rows": plan.rows,
            "micro_batches": len(plan.micro_batches),
            "step_ms": round(step_ms, 3),
            "rows_per_s": round(plan.rows / outcome.elapsed_s, 2),
            # What is left of the step when the busiest stage's work is taken off: filling, draining, and the network.
            "time": {"stages": stages, "idle_ms": round(max(0.0, step_ms - busiest), 3)},
        }

    def _tell_failure(self, failed: StepFailed) -> None:
        told = {"error": failed.error, "reason": failed.reason, "stage": failed.stage, "worker": failed.worker}
        self._tell({"event": "failed", "step": failed.number, **told})

    # Evaluation ---------------------------------------------------------------------------------------------------

    def _is_evaluated(self, step: int) -> bool:
        epochs, rest = divmod(step, self._batches.steps_per_epoch)
        every = self._table.evaluate_every
        return bool(every and step and not rest and (epochs % every == 0 or step == self.total_steps))

    async def _evaluate(self, crew: TermMembers) -> None:
        begin_s = time.monotonic()
        losses, correct, rows, counted = 0.0, 0, 0, False
        batches = range(self._test.steps_per_epoch)
        for first in batches[::_EVALUATE_MICROS]:
            micros = [self._test.batch(index) for index in batches[first : first + _EVALUATE_MICROS]]
            outcome = StepOutcome()
            await self.step_runner.run_step(crew, StepPlan(self.completed_steps, micros, "evaluate"), outcome)
            losses += outcome.loss * outcome.rows
            rows += outcome.rows
            correct += sum(outcome.correct_counts.values())
            counted = counted or bool(outcome.correct_counts)
        self._tell(
            {
                "event": "evaluation",
                "step": self.completed_steps,
                "epoch": self.completed_steps // self._batches.steps_per_epoch - 1,
                "loss": losses / rows,
                "accuracy": correct / rows if counted else None,
                "rows": rows,
                "elapsed_ms": round(1000 * (time.monotonic() - begin_s), 1),
            }
        )


def _stage_times(details: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage said of a step, with what it computed in sum."""
    found: dict[str, Any] = {name: item for name, item in details.items() if isinstance(item, str | int | float)}
    for name in ("queue_ms", "decode_ms", "encode_ms", "forward_ms", "backward_ms", "commit_ms"):
        found.setdefault(name, 0.0)
    found["compute_ms"] = round(found["forward_ms"] + found["backward_ms"] + found["commit_ms"], 3)
    return found


def _settings(pipeline: Pipeline, rows: int) -> dict[str, str | int | float | bool | None]:
    """What the steps of a run depend on: with another of these they would be others."""
    table, source = pipeline.training, pipeline.source
    names = ["batch", "micro_batches", "lr", "lr_schedule", "lr_warmup", "shuffle", "augment"]
    if table.lr_schedule == "cosine":
        names.append("epochs")
    if table.lr_schedule == "step":
        names += ["lr_every", "lr_factor"]
    found = {name: getattr(table, name) for name in names}
    own = json.dumps(source.settings, sort_keys=True, default=str)
    if len(own) > _OWN_CHARACTERS:
        own = hashlib.sha256(own.encode()).hexdigest()[:16]
    data = {"kind": source.kind, "limit": source.limit, "source.settings": own, "rows": rows}
    return {**found, "seed": pipeline.pipeline.seed, **data}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    names = [*before, *(name for name in now if name not in before)]
    return tuple(
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names if before.get(name) != now.get(name)
    )
