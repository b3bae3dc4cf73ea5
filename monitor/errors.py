"""What can go wrong while watching and running."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from brokers.errors import SparseError, UsageError


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
class CannotServe(UsageError):
    """An address that is none of this machine's, or a port that not everybody may use."""

    host: str
    port: int
    reason: str

    def __str__(self) -> str:
        return f"cannot listen at {self.host}, port {self.port}: {self.reason[:1].lower()}{self.reason[1:]}"


@dataclass(eq=False)
class MonitorBrokerUnreachable(SparseError):
    """The broker that a daemon shall watch does not answer: no mistake of a person, it may come up later."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False)
class BadStore(SparseError):
    """A file or server of telemetry that cannot be read or written."""

    where: str
    problem: str

    def __str__(self) -> str:
        return f"telemetry in {self.where}: {self.problem}"


@dataclass(eq=False)
class NoSamples(SparseError):
    """A run of which nothing can be measured."""

    what: str  # requests, or steps
    ended: int
    counted: int
    warm_up: int

    def __str__(self) -> str:
        if not self.ended:
            return f"the run has no samples: none of its {self.what} is in its telemetry"
        if self.counted:
            return f"the run has no samples: none of the {self.counted} {self.what} after its warm-up has a result"
        return f"the run has no samples: its warm-up of {self.warm_up} takes all {self.ended} {self.what}"


@dataclass(eq=False)
class BadManifest(UsageError):
    """A manifest that cannot be read."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: no manifest of a benchmark: {self.problem}"


@dataclass(eq=False)
class SocketTaken(UsageError):
    """A socket on which a living monitor hears events already."""

    path: str

    def __str__(self) -> str:
        return (
            f"{self.path}: a monitor that runs listens on this socket: stop it, or choose another with --socket "
            "(and SPARSE_MONITOR for those who send)"
        )


@dataclass(eq=False)
class BadSocket(UsageError):
    """A path at which no socket can be made."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: events cannot be heard there: {self.problem}"


@dataclass(eq=False)
class BadCollector(UsageError):
    """An address of no collector of traces."""

    address: str

    def __str__(self) -> str:
        return f"--traces {self.address!r}: expected the address of a collector, such as http://127.0.0.1:4318"


@dataclass(eq=False)
class ExtraMissing(UsageError):
    """Something was asked for that comes with an extra of the distribution."""

    what: str
    extra: str

    def __str__(self) -> str:
        return f"{self.what} needs more packages: pip install 'sparse-mqtt[{self.extra}]'"


@dataclass(eq=False)
class BadSetting(UsageError):
    """An environment variable whose value cannot be used; `problem` never holds a secret."""

    variable: str
    problem: str

    def __str__(self) -> str:
        return f"{self.variable}: {self.problem}"
