"""The error classes of the monitor and of runs that code catches by name; all others are plain `UsageError`s."""

from brokers.errors import SparseError, UsageError


class BadStore(UsageError):
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


def bad_folder(folder: object, problem: str) -> UsageError:
    """The error for a folder to which results cannot be written."""
    return UsageError("BadFolder", f"{folder}: {problem}", path=str(folder), problem=problem)
