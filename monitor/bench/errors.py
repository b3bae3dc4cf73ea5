"""What can be wrong with a benchmark that is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from brokers.errors import SparseError, UsageError, did_you_mean


@dataclass(eq=False)
class UnknownSuite(UsageError):
    """A suite that is no file, and none of ours."""

    name: str
    known: tuple[str, ...]

    def __str__(self) -> str:
        near = (
            did_you_mean(self.name, list(self.known))
            or f": expected a pipeline file, or one of {', '.join(self.known)}"
        )
        return f"there is no suite {self.name!r}{near}"


@dataclass(eq=False)
class NoSuite(UsageError):
    """A benchmark of nothing."""

    known: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"which suite? Expected pipeline files, or some of {', '.join(self.known)}; `sparse bench --list` has all"
        )


@dataclass(eq=False)
class NothingLeft(UsageError):
    """A warm-up that takes all there is."""

    suite: str
    what: str  # requests, or steps
    count: int
    warm_up: int

    def __str__(self) -> str:
        return (
            f"{self.suite}: a warm-up of {self.warm_up} leaves nothing of {self.count} {self.what} to measure: "
            f"expected fewer, or more {self.what} (--warm-up, --requests)"
        )


@dataclass(eq=False)
class NoEnd(UsageError):
    """A suite whose runs would never end, or that nothing feeds."""

    suite: str
    problem: str

    def __str__(self) -> str:
        return f"{self.suite}: {self.problem}"


@dataclass(eq=False)
class BadFolder(UsageError):
    """A folder that results cannot be put into."""

    folder: str
    problem: str

    def __str__(self) -> str:
        return f"results cannot be put into {self.folder}: {self.problem}"


@dataclass(eq=False)
class NoSweep(UsageError):
    """A sweep that is not one."""

    problem: str

    def __str__(self) -> str:
        return self.problem


@dataclass(eq=False)
class RunFailed(SparseError):
    """A run of a benchmark that did not end well, and the last thing it said."""

    said: str

    def __str__(self) -> str:
        return self.said
