"""What can go wrong, one class a failure: each holds the wrong value and the limit, and builds its own line of text.

The three branches say who has to act:

* `UsageError`: a person gave a bad file, argument or environment; commands print the line and exit with 2.
* `WireError`: bytes from the network that are not what docs/protocol.md allows; the sender is told, the receiver lives.
* `RequestError`: a request that was sent and did not succeed; raised where the request was made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


class SparseError(Exception):
    """Base class of all errors that Sparse raises on purpose; `str(error)` is one line for the user.

    `code` names the kind of failure in CamelCase ("NotAVideo"): it is what the wire, `--json` and tests use. `fields`
    hold the wrong value and the limit, by name. A subclass has its own name as its code.
    """

    code: str
    fields: dict[str, Any] = {}  # noqa: RUF012 - never changed: each instance that has fields sets its own

    def __init_subclass__(cls) -> None:
        cls.code = cls.__name__

    def __init__(self, code: str, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.code = code
        self.fields = fields


class UsageError(SparseError):
    """A mistake in a file, an argument or the environment: commands print the line and exit with 2.

    `key` is the place in the pipeline file, such as "source.path", where the mistake stands in one.
    """

    key = ""

    def __init__(self, code: str, message: str, *, key: str = "", **fields: Any) -> None:
        super().__init__(code, message, **fields)
        self.key = key


class WireError(SparseError):
    """A message that breaks docs/protocol.md or cannot be taken: the sender is told, the receiver keeps running.

    `retry`: the sender did nothing wrong, and the same message may be accepted later.
    """

    retry = False

    def __init__(self, code: str, message: str, *, retry: bool = False, **fields: Any) -> None:
        super().__init__(code, message, **fields)
        self.retry = retry


class RequestError(SparseError):
    """A request that did not get its result."""


# A person's mistakes ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class BadFile(UsageError):
    """A file that cannot be used: what is wrong, where in it, and what was expected."""

    path: str
    problem: str
    where: str = ""

    def __str__(self) -> str:
        place = f"{self.path}: {self.where}" if self.where else self.path
        return f"{place}: {self.problem}"


@dataclass(eq=False)
class PortTaken(UsageError):
    """A broker was asked to listen where something listens already."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"port {self.port} on {self.host} is taken: stop what listens there, or choose another with --port"


@dataclass(eq=False)
class BrokerUnreachable(UsageError):
    """No broker answered at the address that was given."""

    address: str
    reason: str

    def __str__(self) -> str:
        return f"no MQTT 5 broker at {self.address}: {self.reason}; start one with `sparse broker`"


@dataclass(eq=False)
class NoBroker(UsageError):
    """Nobody said where the broker is."""

    path: str
    site: str

    def __str__(self) -> str:
        return (
            f"{self.path}: no broker is known for site {self.site!r}: give --broker mqtt://HOST:PORT, "
            f"set SPARSE_BROKER, or add a [[site]] with name and broker"
        )


@dataclass(eq=False)
class BadName(UsageError):
    """A name that cannot be one level of a topic."""

    what: str
    name: str

    def __str__(self) -> str:
        taken = {"pipeline": "; ingress, results and source are taken", "stage": "; source is taken"}
        return (
            f"{self.what} {self.name!r} is not a name: "
            "1 to 64 letters, digits, '_', '-' or '.', none of them '/', '+' or '#'"
            f"{taken.get(self.what, '')}"
        )


# Bytes that break the protocol ------------------------------------------------------------------------------------

# Of a text that came from the network, so much is shown: it may have a megabyte.
_SHOWN_CHARACTERS = 150


def _cut(text: str) -> str:
    shown = _SHOWN_CHARACTERS
    return text if len(text) <= shown else f"{text[:shown]}... ({len(text)} characters)"


@dataclass(eq=False)
class Truncated(WireError):
    """A body shorter than what it says it holds."""

    what: str
    expected_bytes: int
    actual_bytes: int

    def __str__(self) -> str:
        return f"{_cut(self.what)} needs {self.expected_bytes} bytes, {self.actual_bytes} are there"


@dataclass(eq=False)
class TrailingBytes(WireError):
    """A body longer than what its header describes."""

    expected_bytes: int
    actual_bytes: int

    def __str__(self) -> str:
        return f"the header describes {self.expected_bytes} bytes of tensors, {self.actual_bytes} follow it"


@dataclass(eq=False)
class BadHeader(WireError):
    """A safetensors header that cannot be read."""

    problem: str

    def __str__(self) -> str:
        return f"bad safetensors header: {_cut(self.problem)}"


@dataclass(eq=False)
class UnknownDtype(WireError):
    """A dtype that is not one of safetensors', or that the receiver cannot hold."""

    tensor: str
    dtype: str

    def __str__(self) -> str:
        return f"tensor {_cut(self.tensor)!r} has the dtype {_cut(self.dtype)!r}, which this receiver does not know"


@dataclass(eq=False)
class ShapeMismatch(WireError):
    """A tensor whose shape and dtype ask for another number of bytes than it has."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    expected_bytes: int
    actual_bytes: int

    def __str__(self) -> str:
        return (
            f"tensor {_cut(self.tensor)!r} of dtype {self.dtype} and shape {list(self.shape)} needs "
            f"{self.expected_bytes} bytes, its offsets give {self.actual_bytes}"
        )


@dataclass(eq=False)
class BadProperty(WireError):
    """An MQTT property that is missing or has a value the protocol does not allow."""

    name: str
    problem: str

    def __str__(self) -> str:
        return f"property {self.name!r} {_cut(self.problem)}"


@dataclass(eq=False)
class VersionMismatch(WireError):
    """A message of another protocol version."""

    expected: str
    actual: str

    def __str__(self) -> str:
        return f"protocol version {self.expected} is spoken here, the message is of version {_cut(self.actual)!r}"


@dataclass(eq=False)
class TooLarge(WireError):
    """Something larger than a limit: refused before it is sent, or before memory is set aside for it."""

    what: str
    limit_bytes: int
    actual_bytes: int

    def __str__(self) -> str:
        return f"{self.what} has {self.actual_bytes} bytes, at most {self.limit_bytes} can go"


@dataclass(eq=False)
class BadChunk(WireError):
    """A chunk that does not fit the message it says it belongs to: most often, one before it was lost."""

    retry = True

    problem: str

    def __str__(self) -> str:
        return f"bad chunk: {_cut(self.problem)}"


@dataclass(eq=False)
class Incomplete(WireError):
    """A chunked message whose missing chunks did not come in time."""

    retry = True

    expected_bytes: int
    actual_bytes: int
    waited_s: float

    def __str__(self) -> str:
        return f"{self.actual_bytes} of {self.expected_bytes} bytes came, and no more for {self.waited_s:g} s"


@dataclass(eq=False)
class BadPayload(WireError):
    """A payload that is well framed and still is not what it says: a JPEG that is none, JSON that is not numbers."""

    content_type: str
    problem: str

    def __str__(self) -> str:
        return f"payload of type {_cut(self.content_type)}: {_cut(self.problem)}"


# Requests ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class RequestFailed(RequestError):
    """A worker could not do its part of a request, and said why."""

    request: str
    stage: str
    worker: str
    error: str
    reason: str

    def __str__(self) -> str:
        place = f"stage {self.stage!r}, worker {self.worker!r}"
        return f"request {self.request} failed at {place}: {self.error}: {self.reason}"


@dataclass(eq=False)
class DeadlinePassed(RequestError):
    """No result came in the time that the request was given."""

    request: str
    deadline_ms: float
    where: str

    def __str__(self) -> str:
        return f"request {self.request} had {self.deadline_ms:g} ms, which passed at {self.where}"


@dataclass(eq=False)
class NoWorker(RequestError):
    """No worker of the stage is up, and none came in the time allowed."""

    pipeline: str
    stage: str
    waited_s: float

    def __str__(self) -> str:
        return (
            f"no worker of stage {self.stage!r} of pipeline {self.pipeline!r} came up within {self.waited_s:g} s: "
            f"start one with `sparse stage FILE {self.stage}`"
        )


@dataclass(eq=False)
class Disconnected(RequestError):
    """The line to the broker was closed while something still waited on it."""

    address: str
    reason: str

    def __str__(self) -> str:
        return f"the connection to {self.address} ended: {self.reason}"
