"""What can go wrong where a part is trained, one class a failure, in the branches of `brokers.errors`."""

from __future__ import annotations

from dataclasses import dataclass

from brokers.errors import SparseError, UsageError, WireError

# The pipeline file ------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class BadTrainingConfig(UsageError):
    """An optimizer or a loss that cannot be had, or that does not take its settings."""

    name: str
    problem: str
    key: str = "training"

    def __str__(self) -> str:
        return f"{self.key.rpartition('.')[2]} {self.name!r}: {self.problem}"


# Messages ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class UnknownForward(WireError):
    """A gradient for a forward that is not here: it came late, twice, or to the wrong worker."""

    request: str

    def __str__(self) -> str:
        return f"no forward of request {self.request} is kept: the gradient is late, a twin, or not for this worker"


@dataclass(eq=False)
class StaleTerm(WireError):
    """A message of a term that is over, or has not come: its step was given up."""

    retry = True

    expected: int
    actual: int

    def __str__(self) -> str:
        return f"it is of term {self.actual}, this worker is in term {self.expected}"


@dataclass(eq=False)
class WorkerOnStandby(WireError):
    """A message for who trains a stage in a term, to one that does not: another has taken its place."""

    retry = True

    term: int

    def __str__(self) -> str:
        return f"this worker stands by in term {self.term}: it trains nothing"


@dataclass(eq=False)
class BadGradient(WireError):
    """A gradient of another shape than what it is the gradient of."""

    name: str
    expected: tuple[int, ...]
    actual: tuple[int, ...]

    def __str__(self) -> str:
        return f"the gradient of {self.name!r} must have the shape {list(self.expected)}, has {list(self.actual)}"


@dataclass(eq=False)
class BadStep(WireError):
    """A micro-batch that does not fit the others of its step."""

    problem: str

    def __str__(self) -> str:
        return self.problem


@dataclass(eq=False)
class StaleStep(WireError):
    """A step that is not the next one of its source: what the source knew of the pipeline was old."""

    retry = True

    source: str
    expected: int
    actual: int

    def __str__(self) -> str:
        return f"the next step of source {self.source!r} is {self.expected} (from 0), not {self.actual}"


@dataclass(eq=False)
class TooManySources(WireError):
    """A source that has not trained the pipeline yet, where as many have as a record can name."""

    limit: int

    def __str__(self) -> str:
        return f"{self.limit} sources have trained this pipeline: go on as one of them, with --name"


@dataclass(eq=False)
class VersionGone(WireError):
    """Weights were asked for of a version that this worker has no longer."""

    version: object

    def __str__(self) -> str:
        return f"version {self.version!r} is neither in memory nor on disk"


@dataclass(eq=False)
class BadLabels(WireError):
    """Labels that the loss cannot take."""

    problem: str

    def __str__(self) -> str:
        return self.problem


# Steps ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class TooManyForwards(SparseError):
    """More forwards without their gradient than a step can have."""

    limit: int

    def __str__(self) -> str:
        return f"{self.limit} forwards wait for their gradient already"


@dataclass(eq=False)
class NotFinite(SparseError):
    """A loss, or a parameter, that is not a number any more."""

    what: str
    number: int

    def __str__(self) -> str:
        return (
            f"{self.what} in step {self.number} (from 0): try a lower learning rate, a longer warmup, "
            "or look at the data of that step; the last checkpoint is from before"
        )


# Checkpoints ------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class CannotCheckpoint(SparseError):
    """A checkpoint that could not be written; those before it are whole."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"no checkpoint at {self.path}: {self.problem}; those before it are whole"


@dataclass(eq=False)
class StaleWriter(SparseError):
    """Another worker of the stage has written a checkpoint in a later term: this one has nothing to write or remove."""

    path: str
    term: int
    later: int

    def __str__(self) -> str:
        return f"another worker has written to {self.path} in term {self.later}, this one is of term {self.term}"


@dataclass(eq=False)
class ForeignCheckpoint(UsageError):
    """A checkpoint of another model, cut or optimizer, or one that cannot be read."""

    key = "training.checkpoints"

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path} is no checkpoint of this stage: {self.problem}; name another folder, or move it away"
