"""The error classes of Sparse, by who has to react: the user, the sender of a message, or the caller of a request.

Each error has a `code`, which names the kind of failure, and is one of

* `UsageError`: the user made a mistake; commands print the message and exit with status 2.
* `WireError`: a peer sent a malformed or unacceptable message; it gets a failure reply, the receiver keeps running.
* `RequestError`: a request did not get its result; raised where the request was made.

A subclass exists where code catches it by name or where it is public API. All other failures are raised as
`UsageError(code, message, **fields)` or `WireError(code, message, **fields)` where they occur.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

# Wire errors quote text from the network, which may be a megabyte long: both ends of the message are enough.
_MESSAGE_LIMIT_CHARACTERS = 400


class SparseError(Exception):
    """Base class of all errors that Sparse raises on purpose; `str(error)` is one line for the user.

    `code` is the kind of failure in CamelCase ("NotAVideo"): the wire, `--json` and tests use it. `fields` hold the
    wrong value and the limit by name, such as `expected_bytes`. A subclass with its own constructor uses its
    class name as its code.
    """

    def __init__(self, code: str, message: str, **fields: Any) -> None:
        # Exception.__init__ is not called: `args` stay those of the constructor, which copy and pickle need.
        self.code = code
        self.message = message
        self.fields = fields

    def __str__(self) -> str:
        return self.message


def error_code(error: BaseException) -> str:
    """Return the `code` of a `SparseError`, the class name of any other exception."""
    return error.code if isinstance(error, SparseError) else type(error).__name__


def describe_error(error: BaseException) -> str:
    """Return class and message of an exception as one line; only the message where that says enough."""
    message = " ".join(str(error).split())
    return message if message and isinstance(error, SparseError | OSError) else f"{type(error).__name__}: {message}"


class UsageError(SparseError):
    """A mistake in a file, an argument or the environment.

    `key` is the place in the pipeline file, such as "source.path", where the mistake is in one.
    """

    def __init__(self, code: str, message: str, *, key: str = "", **fields: Any) -> None:
        super().__init__(code, message, **fields)
        self.key = key


class BadFile(UsageError):
    """A file that cannot be used: its `path`, the `problem`, and the `key` in it where it is a pipeline file."""

    def __init__(self, path: str, problem: str, key: str = "") -> None:
        place = f"{path}: {key}" if key else path
        super().__init__(type(self).__name__, f"{place}: {problem}", key=key, path=path, problem=problem)
        self.path = path
        self.problem = problem


class PortTaken(UsageError):
    """Another process listens on the `port` of this `host`."""

    def __init__(self, host: str, port: int) -> None:
        message = f"port {port} on {host} is taken: stop the process that listens there, or choose another with --port"
        super().__init__(type(self).__name__, message, host=host, port=port)


class BrokerUnreachable(UsageError):
    """No MQTT 5 broker accepted a connection at `address`; `reason_code` is that of its CONNACK, 0 without one."""

    def __init__(self, address: str, reason: str, reason_code: int = 0) -> None:
        message = f"no MQTT 5 broker at {address}: {reason}; start one with `sparse broker`"
        super().__init__(type(self).__name__, message, address=address, reason=reason)
        self.address = address
        self.reason = reason
        self.reason_code = reason_code


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return " (did you mean 'x'?)" for the known name that is most like `name`, empty if none is."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


class WireError(SparseError):
    """A message that breaks docs/protocol.md or cannot be accepted.

    `retry`: the sender made no mistake, and the same message may be accepted later.
    """

    def __init__(self, code: str, message: str, *, retry: bool = False, **fields: Any) -> None:
        if len(message) > _MESSAGE_LIMIT_CHARACTERS:
            half = _MESSAGE_LIMIT_CHARACTERS // 2
            message = f"{message[:half]} ... {message[-half:]} ({len(message)} characters)"
        super().__init__(code, message, **fields)
        self.retry = retry


class TooLarge(WireError):
    """Larger than a limit: refused before it is sent, or before memory is allocated for it."""

    def __init__(self, what: str, limit_bytes: int, actual_bytes: int) -> None:
        message = f"{what} has {actual_bytes} bytes, the limit is {limit_bytes}"
        super().__init__(type(self).__name__, message, limit_bytes=limit_bytes, actual_bytes=actual_bytes)


class BadPayload(WireError):
    """A well-framed payload whose content is wrong: a damaged JPEG, JSON that is not a list of numbers."""

    def __init__(self, content_type: str, problem: str) -> None:
        super().__init__(type(self).__name__, f"payload of type {content_type}: {problem}", content_type=content_type)
        self.problem = problem


def first_mistake(error: ValidationError) -> str:
    """Return place and kind of the first mistake that pydantic found, without the text that was received."""
    mistake = error.errors(include_url=False, include_input=False)[0]
    return "".join(f"{level}: " for level in mistake["loc"]) + mistake["msg"]


def property_error(name: str, problem: str) -> WireError:
    """Return the error for an MQTT property, or a metadata key, that is missing or has a forbidden value."""
    return WireError("BadProperty", f"property {name!r} {problem}", name=name)


class RequestError(SparseError):
    """A request that did not get its result."""


class RequestFailed(RequestError):
    """A worker could not do its part of a request; `error` is the code of the failure there, `reason` its message."""

    def __init__(self, request: str, stage: str, worker: str, error: str, reason: str) -> None:
        message = f"request {request} failed at stage {stage!r}, worker {worker!r}: {error}: {reason}"
        super().__init__(type(self).__name__, message)
        self.request = request
        self.stage = stage
        self.worker = worker
        self.error = error
        self.reason = reason


class DeadlinePassed(RequestError):
    """No result arrived within the deadline of the request; `where` it passed."""

    def __init__(self, request: str, deadline_ms: float, where: str) -> None:
        message = f"request {request} had {deadline_ms:g} ms, which passed at {where}"
        super().__init__(type(self).__name__, message, where=where)
        self.request = request
        self.deadline_ms = deadline_ms


class NoWorker(RequestError):
    """No worker of the stage had a free slot within `waited_s` seconds."""

    def __init__(self, pipeline: str, stage: str, waited_s: float) -> None:
        message = (
            f"no worker of stage {stage!r} of pipeline {pipeline!r} came up within {waited_s:g} s: "
            f"start one with `sparse stage FILE {stage}`"
        )
        super().__init__(type(self).__name__, message, pipeline=pipeline, stage=stage, waited_s=waited_s)


class Disconnected(RequestError):
    """The connection to the broker was closed while a call still waited on it."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(type(self).__name__, f"the connection to {address} ended: {reason}", address=address)
