"""What ends a training run, or a step of it, one class a failure."""

from __future__ import annotations

from dataclasses import dataclass

from brokers.errors import RequestError, SparseError, UsageError


@dataclass(eq=False)
class TermOver(SparseError):
    """The step in hand was given up with its term: it is to be done again in the next one."""

    why: str

    def __str__(self) -> str:
        return self.why


@dataclass(eq=False)
class StepFailed(RequestError):
    """A stage could not do its part of a step, and would not be able to next time."""

    number: int
    stage: str
    worker: str
    error: str
    reason: str

    def __str__(self) -> str:
        return f"step {self.number} failed at stage {self.stage!r}, worker {self.worker!r}: {self.error}: {self.reason}"


@dataclass(eq=False)
class CannotTrain(RequestError):
    """The stages of a pipeline are up, and yet nothing comes of it."""

    pipeline: str
    problem: str

    def __str__(self) -> str:
        return f"pipeline {self.pipeline!r} cannot be trained: {self.problem}"


@dataclass(eq=False)
class NobodyTrains(RequestError):
    """Not every stage has a worker, and none came in the time allowed."""

    pipeline: str
    waited_s: float

    def __str__(self) -> str:
        return (
            f"the stages of pipeline {self.pipeline!r} were not all up within {self.waited_s:g} s: "
            "`sparse status` says who is, `sparse stage FILE NAME` starts one"
        )


@dataclass(eq=False)
class TrainedAlready(UsageError):
    """The pipeline has steps of this source, and nobody said to go on from there."""

    source: str
    steps: int

    def __str__(self) -> str:
        return (
            f"source {self.source!r} has trained {self.steps} steps of this pipeline already: "
            "go on from there with --resume, or begin anew with another folder of checkpoints or another --name"
        )


@dataclass(eq=False)
class OtherSettings(UsageError):
    """A resume with settings under which the former steps were not made."""

    differences: tuple[str, ...]

    def __str__(self) -> str:
        return f"cannot resume, the run began with other settings: {'; '.join(self.differences)}"


@dataclass(eq=False)
class DuplicateSource(UsageError):
    """A source of this name trains the pipeline."""

    source: str

    def __str__(self) -> str:
        return f"a source named {self.source!r} trains this pipeline: stop it, or choose another name with --name"
