"""Errors of stages that code reacts to by name; all others are `UsageError` or `WireError` with a code of their own."""

from __future__ import annotations

from dataclasses import dataclass

from brokers.errors import SparseError, UsageError


@dataclass(eq=False)
class WorkerConflict(UsageError):
    """A worker that cannot join its stage: one of the same id is up, or one with another model."""

    worker: str
    problem: str

    def __str__(self) -> str:
        return f"worker {self.worker!r} cannot join: {self.problem}"


@dataclass(eq=False)
class RowsDoNotMatch(SparseError):
    """A batch whose answer cannot be split: the executor's rows are not independent."""

    tensor: str
    expected_rows: int
    actual_rows: int

    def __str__(self) -> str:
        return (
            f"a batch of {self.expected_rows} rows gave {self.actual_rows} in {self.tensor!r}: "
            "an executor whose rows depend on one another must not be batchable"
        )


@dataclass(eq=False)
class BadDevice(UsageError):
    """A GPU that is asked for and is not there."""

    key = "stage.device"

    device: str
    available: int

    def __str__(self) -> str:
        return f"device {self.device!r}: this machine has {self.available} CUDA devices; use 'auto' or 'cpu'"
