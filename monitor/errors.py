"""The error classes of the monitor and of runs that code catches by name; all others are plain `UsageError`s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from brokers.errors import SparseError, UsageError


class BadStore(SparseError):
    """A telemetry file or server (`store`) that cannot be read or written."""

    def __init__(self, store: str, problem: str) -> None:
        super().__init__("BadStore", f"telemetry in {store}: {problem}", store=store, problem=problem)
        self.problem = problem


class NoSamples(SparseError):
    """A run without a single measured sample."""

    def __init__(self, problem: str, **fields: int) -> None:
        super().__init__("NoSamples", f"the run has no samples: {problem}", **fields)


class SocketUnavailable(UsageError):
    """The event socket cannot be opened; code "SocketTaken" (another monitor uses it) or "BadSocket"."""


def extra_missing(feature: str, extra: str) -> UsageError:
    """The error for a feature whose packages come with an optional extra of the distribution."""
    message = f"{feature} needs more packages: pip install 'sparse-mqtt[{extra}]'"
    return UsageError("ExtraMissing", message, feature=feature, extra=extra)


@dataclass(eq=False)
class ProcessRefused(UsageError):
    """A process of a run that found a mistake in what it was given, in its own words."""

    STATUS: ClassVar[int] = 2

    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(eq=False)
class BrokerGone(SparseError):
    """The broker of a run that ended before its time and cannot be had back."""

    kind: str
    address: str
    last_line: str
    problem: str

    def __str__(self) -> str:
        said = f" ({self.last_line})" if self.last_line else ""
        return f"the {self.kind} broker at {self.address} ended{said} and cannot be started again: {self.problem}"


@dataclass(eq=False)
class ProcessEnded(SparseError):
    """A process of a run that ended before its time, and the last thing it said."""

    name: str
    status: int
    last_line: str
    log: str

    def __str__(self) -> str:
        how = f"signal {-self.status}" if self.status < 0 else f"status {self.status}"
        return f"{self.name} ended with {how}: {self.last_line or 'it said nothing'} (its log: {self.log})"


@dataclass(eq=False)
class CannotResume(UsageError):
    """A folder that holds no training to go on with."""

    folder: str
    problem: str

    def __str__(self) -> str:
        return f"cannot resume {self.folder}: {self.problem}"


@dataclass(eq=False)
class NotARun(UsageError):
    """Something that was to be reported on, and has no telemetry."""

    what: str
    problem: str

    def __str__(self) -> str:
        return f"cannot report on {self.what}: {self.problem}"


@dataclass(eq=False)
class CannotCompare(UsageError):
    """Runs that have no figure in common."""

    inference: str
    training: str

    def __str__(self) -> str:
        return (
            f"cannot compare {self.inference!r} with {self.training!r}: the first is of inference, the second of "
            "training, and they have no figure in common; make a report of each"
        )


@dataclass(eq=False)
class MonitorBrokerUnreachable(SparseError):
    """The broker that a daemon shall watch does not answer: no mistake of a person, it may come up later."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False)
class BadManifest(UsageError):
    """A manifest that cannot be read."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: no manifest of a benchmark: {self.problem}"
