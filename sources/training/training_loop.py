"""The training loop of a source: epochs of steps and evaluations, with rollback to what the stages have committed.

The source keeps no state. The checkpoints of the stages contain the number of steps of each source, and a step is a
function of its number: after any failure the loop continues from the steps that the pipeline reports.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.channel import MessageChannel
from brokers.errors import RequestError, UsageError
from brokers.protocol.messages import TensorContent
from brokers.protocol.training import SourceProgress, TrainingStatus
from sources.datasets.dataset import Batches, Dataset, split_micro_batches
from sources.training.run_checks import check_labels, check_micro_batches
from sources.training.run_settings import learning_rate, relevant_settings, settings_differences
from sources.training.two_phase_step import MembershipWatcher, Step, StepFailed, StepRunner, TermOver

log = logging.getLogger(__name__)

TrainingEventDict = dict[str, Any]

# How long to wait until all stages are up, and for a problem of theirs to be fixed (a folder that is not mounted yet).
MEMBERS_WAIT_S = 120.0
PROBLEM_WAIT_S = 5.0
# A step that is aborted in this many terms in a row has a cause that another term does not remove.
MAX_CONSECUTIVE_TERMS = 20
# Presence records are renewed each second: a reported version may be as old as that.
_VERSION_RETRY_S = 0.3
# Evaluation is split into steps of this many micro-batches, so that steps of other sources are served in between.
_EVALUATION_MICRO_BATCHES = 16
_MEMBERS_POLL_S = 0.5


class TrainingLoop:
    """Trains a pipeline on a data set until its epochs are done or `stop_requested` is set.

    `on_event` is called with each event: "step", "evaluation", "resumed", "rolled_back", "failed". Raises what the data
    set, `Batches` and `check_labels` raise.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        dataset: Dataset,
        name: str,
        channel: MessageChannel,
        on_event: Callable[[TrainingEventDict], None],
        *,
        resume: bool = False,
    ) -> None:
        self.membership = MembershipWatcher(pipeline, channel.transport)
        self.step_runner = StepRunner(channel, pipeline, name, self.membership)
        self.stop_requested = asyncio.Event()
        self.completed_steps = 0  # committed by the pipeline
        self.completed_micro_batches = 0
        self._pipeline = pipeline
        self._table = pipeline.training
        self._seed = pipeline.pipeline.seed
        self._name = name
        self._channel = channel
        self._on_event = on_event
        self._resume = resume
        examples = dataset.train()
        self._batches = Batches(
            examples,
            self._table.batch,
            self._seed,
            shuffle=self._table.shuffle,
            augment=self._table.augment,
            horizontal_flip=dataset.horizontal_flip,
            drop_last=self._table.drop_last,
        )
        tests = dataset.test()
        self._test_batches = Batches(tests, self._table.batch, shuffle=False)
        for labels in (examples.labels, tests.labels):
            check_labels(self._table, labels)
        self._settings = relevant_settings(pipeline, len(examples))
        self._version: int | None = None  # that our last step made
        self._consecutive_terms = 0

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self._table.epochs * self._batches.steps_per_epoch

    async def open(self) -> None:
        """Subscribe to the responses and to the presence of the stages; the channel must be open."""
        await self._channel.subscribe(self.step_runner.inbox, self.step_runner.on_message)
        await self.membership.open()
        self._channel.transport.on_reconnect(self.step_runner.on_reconnect)

    async def close(self) -> None:
        await self.membership.close()

    def stop(self) -> None:
        """Stop after the current step, which then includes a checkpoint."""
        self.stop_requested.set()
        self.membership.changed.set()

    async def run(self) -> None:
        """Train to the end.

        Raises `StepFailed`; `RequestError`: "StagesMissing" if not all stages are up, "CannotTrain"; `UsageError`:
        "AlreadyTrained" without `resume`, "SettingsChanged" with it, "TooFewRows" in a micro-batch; `TermOver` when
        stopped without a coordinator.
        """
        term = await self._wait_for_term()
        self.completed_steps = self._first_step(term)
        check_micro_batches(self._table, len(self._batches.examples), term.min_rows)
        evaluated_step = -1
        while not self.stop_requested.is_set():
            try:
                if self._is_evaluation_due() and evaluated_step != self.completed_steps:
                    await self._evaluate(term)
                    evaluated_step = self.completed_steps
                if self.completed_steps >= self.total_steps:
                    break
                await self._run_step(term)
                self._consecutive_terms = 0
            except TermOver as over:
                term = await self._resume_after_rollback(over, term)
        log.info("%d of %d steps are done", self.completed_steps, self.total_steps)

    async def fetch_weights(self) -> dict[str, TensorContent]:
        """The weights of all stages at one version: that of our last step if they have it, else the newest."""
        term = await self._wait_for_term()
        for _ in range(MAX_CONSECUTIVE_TERMS):
            version = (term.version or 0) if self._version is None else self._version
            parts: dict[str, TensorContent] = {}
            try:
                for stage in self._pipeline.stage:
                    if (part := await self.step_runner.fetch_weights(term, stage.name, version)) is not None:
                        parts[stage.name] = part
            except TermOver as over:
                term = await self._resume_after_rollback(over, term)
                continue
            if len(parts) == len(self._pipeline.stage):
                return parts
            self._version = None  # other sources have trained on
            term = await self._wait_for_term()
            await asyncio.sleep(_VERSION_RETRY_S)
        raise self._cannot_train("its weights change faster than they can be fetched")

    def _progress(self, term: TrainingStatus) -> SourceProgress:
        return term.progress.get(self._name, SourceProgress(steps=0))

    def _first_step(self, term: TrainingStatus) -> int:
        progress = self._progress(term)
        if not progress.steps:
            return 0
        if not self._resume:
            message = (
                f"source {self._name!r} has trained {progress.steps} steps of this pipeline already: continue with "
                "--resume, or start again with another folder of checkpoints or another --name"
            )
            raise UsageError("AlreadyTrained", message, steps=progress.steps)
        if differences := settings_differences(progress.settings, self._settings):
            message = f"cannot resume, the run began with other settings: {'; '.join(differences)}"
            raise UsageError("SettingsChanged", message, differences=differences)
        self._on_event({"event": "resumed", "step": progress.steps, "version": term.version or 0})
        return progress.steps

    async def _wait_for_term(self, after: int = -1) -> TrainingStatus:
        """Wait for a term, and for a lease at most for a later one than `after`."""
        begin_s = time.monotonic()
        problem_since_s: float | None = None
        while True:
            term, now_s = self.membership.term, time.monotonic()
            waited_s = now_s - begin_s
            if term is not None:
                self._check_stages(term)
                if term.term > after or waited_s > self._pipeline.pipeline.lease_s:
                    return term
            problem_since_s = (problem_since_s or now_s) if self.membership.problem else None
            if problem_since_s is not None and now_s - problem_since_s > PROBLEM_WAIT_S:
                raise self._cannot_train(self.membership.problem)
            if waited_s > MEMBERS_WAIT_S:
                message = (
                    f"the stages of pipeline {self._pipeline.name!r} were not all up within {MEMBERS_WAIT_S:g} s: "
                    "`sparse status` shows which are, `sparse stage FILE NAME` starts one"
                )
                raise RequestError("StagesMissing", message, waited_s=MEMBERS_WAIT_S)
            if self.stop_requested.is_set() and waited_s > 1.0:
                raise TermOver("the run was stopped")
            self.membership.changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_MEMBERS_POLL_S):
                    await self.membership.changed.wait()

    def _check_stages(self, term: TrainingStatus) -> None:
        names = [stage.name for stage in self._pipeline.stage]
        if set(term.members) != set(names):
            raise self._cannot_train(f"its stages are {', '.join(term.members)}, this file has {', '.join(names)}")

    def _cannot_train(self, problem: str) -> RequestError:
        return RequestError("CannotTrain", f"pipeline {self._pipeline.name!r} cannot be trained: {problem}")

    async def _resume_after_rollback(self, over: TermOver, previous: TrainingStatus) -> TrainingStatus:
        """Wait for the next term, and continue from the steps that its version has."""
        begin_s, before = time.monotonic(), self.completed_steps
        self._consecutive_terms += 1
        if self._consecutive_terms > MAX_CONSECUTIVE_TERMS:
            raise self._cannot_train(f"step {before} was aborted {MAX_CONSECUTIVE_TERMS} times: {over}")
        term = await self._wait_for_term(after=previous.term)
        self._version = None
        self.completed_steps = self._progress(term).steps
        self._on_event(
            {
                "event": "rolled_back",
                "step": self.completed_steps,
                "from_step": before,
                "version": term.version or 0,
                "why": term.term_reason or str(over),
                "waited_ms": round(1000 * (time.monotonic() - begin_s), 1),
            }
        )
        return term

    async def _run_step(self, term: TrainingStatus) -> None:
        number = self.completed_steps
        inputs, labels = self._batches.batch(number)
        rate = learning_rate(self._table, number, self._batches.steps_per_epoch)

        def commit_details() -> Mapping[str, Any]:
            is_last = number + 1 == self.total_steps or self.stop_requested.is_set()
            return {"lr": rate, "settings": self._settings, "checkpoint": is_last}

        micro_batches = split_micro_batches(inputs, labels, self._table.micro_batches)
        step = Step(number, micro_batches, "train", self._seed, commit_details)
        try:
            await self.step_runner.run_step(term, step)
        except StepFailed as failed:
            failure = {name: getattr(failed.failure, name) for name in ("error", "reason", "stage", "worker")}
            self._on_event({"event": "failed", "step": number, **failure})
            raise
        self.completed_steps = number + 1
        self._version = max(step.committed_versions.values())
        self.completed_micro_batches += len(micro_batches)
        self._on_event(self._step_event(step, rate))

    def _step_event(self, step: Step, rate: float) -> TrainingEventDict:
        stages = [_stage_times(step.stage_times[stage.name]) for stage in self._pipeline.stage]
        step_ms = 1000 * step.elapsed_s
        busiest_ms = max(stage["decode_ms"] + stage["compute_ms"] + stage["encode_ms"] for stage in stages)
        return {
            "event": "step",
            "step": step.number + 1,
            "steps": self.total_steps,
            "epoch": step.number // self._batches.steps_per_epoch,
            "epochs": self._table.epochs,
            "version": self._version,
            "loss": step.loss,
            "accuracy": step.accuracy,
            "lr": rate,
            "rows": step.rows,
            "micro_batches": len(step.micro_batches),
            "step_ms": round(step_ms, 3),
            "rows_per_s": round(step.rows / step.elapsed_s, 2),
            # Idle: the busiest stage waited for the pipeline to fill and to drain, and for the network.
            "time": {"stages": stages, "idle_ms": round(max(0.0, step_ms - busiest_ms), 3)},
        }

    def _is_evaluation_due(self) -> bool:
        step, interval = self.completed_steps, self._table.evaluate_every
        epochs, rest = divmod(step, self._batches.steps_per_epoch)
        return bool(interval and step and not rest and (epochs % interval == 0 or step == self.total_steps))

    async def _evaluate(self, term: TrainingStatus) -> None:
        begin_s = time.monotonic()
        count = self._test_batches.steps_per_epoch
        whole = Step(self.completed_steps, [self._test_batches.batch(index) for index in range(count)], "evaluate")
        for first in range(0, count, _EVALUATION_MICRO_BATCHES):
            step = Step(whole.number, whole.micro_batches[first : first + _EVALUATION_MICRO_BATCHES], "evaluate")
            await self.step_runner.run_step(term, step)
            whole.losses |= {first + index: loss for index, loss in step.losses.items()}
            whole.correct_counts |= {first + index: correct for index, correct in step.correct_counts.items()}
        self._on_event(
            {
                "event": "evaluation",
                "step": self.completed_steps,
                "epoch": self.completed_steps // self._batches.steps_per_epoch - 1,
                "loss": whole.loss,
                "accuracy": whole.accuracy,
                "rows": whole.rows,
                "elapsed_ms": round(1000 * (time.monotonic() - begin_s), 1),
            }
        )


def _stage_times(details: Mapping[str, Any]) -> dict[str, Any]:
    """The times that a stage reported for a step, with their sum as `compute_ms`."""
    times: dict[str, Any] = {name: value for name, value in details.items() if isinstance(value, str | int | float)}
    for name in ("queue_ms", "decode_ms", "encode_ms", "forward_ms", "backward_ms", "commit_ms"):
        times.setdefault(name, 0.0)
    times["compute_ms"] = round(times["forward_ms"] + times["backward_ms"] + times["commit_ms"], 3)
    return times
