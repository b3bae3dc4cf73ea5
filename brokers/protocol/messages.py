"""What processes say to one another: frozen values, legal on construction, that know nothing of bytes.

Task        a source (or any MQTT client) asks the first stage
Activation  a stage passes its part of the work on to the next
Result      the last stage answers the source
Failure     any stage answers the source that it could not
Control     a worker tells the one who sent it work that it has room again
Gradient    a worker that trains answers an activation with what it would have liked to be otherwise
Step        sources and workers agree on what becomes of a step of training: see brokers/protocol/training.py
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from brokers.errors import property_error
from brokers.protocol.safetensors_codec import TensorView
from brokers.protocol.stage_timing import HOPS_KEY, Hop
from brokers.protocol.topics import is_valid_reply_topic
from brokers.protocol.traceparent import TraceContext
from brokers.protocol.transport import Buffer

REQUEST_ID_BYTES = 16
# What a Message Expiry Interval can still say, in seconds of four bytes (MQTT 5.0 section 3.3.2.3.3).
DEADLINE_LIMIT_MS = 1000.0 * 0xFFFF_FFFF
# What a foreign client may have as Correlation Data: it goes along from stage to stage, twice as long in hexadecimal.
ECHO_LIMIT_BYTES = 256
SAFETENSORS = "application/x-safetensors"
JSON = "application/json"
JPEG = "image/jpeg"
PNG = "image/png"


Priority = Literal["interactive", "background"]
# What somebody waits for goes before what nobody does, wherever the two wait together.
PRIORITIES: tuple[Priority, ...] = ("interactive", "background")


def check_priority(priority: str) -> None:
    """Raise `BadProperty` for what is none."""
    if priority not in PRIORITIES:
        raise property_error("priority", f"must be {' or '.join(PRIORITIES)}, is {priority!r}")


def new_request_id() -> bytes:
    """Sixteen random bytes: unique without anybody to ask."""
    return secrets.token_bytes(REQUEST_ID_BYTES)


@dataclass(frozen=True, slots=True)
class TensorContent:
    """Named tensors, and string metadata that travels with them from stage to stage."""

    tensors: Mapping[str, TensorView]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.data.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class BinaryContent:
    """Bytes that are decoded only by the stage that takes them: a JPEG, a PNG, JSON readings."""

    content_type: str
    data: Buffer

    @property
    def nbytes(self) -> int:
        return len(self.data)


Content = TensorContent | BinaryContent


# Brokers end the connection of a client that publishes deeper than this: Mosquitto from 200 levels on.
_TOPIC_LEVELS = 64
_TOPIC_BYTES = 1024


def check_reply_topic(topic: str) -> None:
    """Raise `BadProperty` for a topic that is not one to answer on: its owner's mistake must not cost us our broker."""
    if "+" in topic or "#" in topic or "\0" in topic:
        raise property_error("Response Topic", "must be a topic to publish to, without '+', '#' and null characters")
    if topic.count("/") >= _TOPIC_LEVELS or len(topic.encode()) > _TOPIC_BYTES:
        raise property_error("Response Topic", f"must have at most {_TOPIC_LEVELS} levels and {_TOPIC_BYTES} bytes")
    if not is_valid_reply_topic(topic):
        raise property_error(
            "Response Topic", "must not be a presence topic, a front door or an ingress: none takes answers"
        )


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where the answer goes and in which form; a foreign client's own Correlation Data comes back as `echo`."""

    topic: str
    accept: Literal["safetensors", "json"] = "safetensors"
    echo: bytes = b""

    def __post_init__(self) -> None:
        check_reply_topic(self.topic)


def _check_request(request: bytes, attempt: int) -> None:
    if len(request) != REQUEST_ID_BYTES:
        raise property_error("Correlation Data", f"must be {REQUEST_ID_BYTES} bytes, is {len(request)}")
    if attempt < 1:
        raise property_error("attempt", f"must be 1 or more, is {attempt}")


def _check_content(content: Content, hops: tuple[Hop, ...]) -> None:
    if isinstance(content, BinaryContent):
        if hops:
            raise property_error(HOPS_KEY, f"travels with tensors only, not with {content.content_type}")
    elif HOPS_KEY in content.metadata:
        raise property_error(HOPS_KEY, "is written by the stages themselves, not by those who use them")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The first hop of a request. `sender` is where its worker reports that it has room again.

    `trace` is the span that asks for it.
    """

    request_id: bytes
    content: Content
    reply_to: ReplyTo
    sender_inbox: str = ""
    source: str = ""
    attempt: int = 1
    deadline_ms: float | None = None
    priority: Priority = "interactive"
    trace: TraceContext | None = None
    hops: tuple[Hop, ...] = ()

    def __post_init__(self) -> None:
        _check_request(self.request_id, self.attempt)
        _check_content(self.content, self.hops)
        check_reply_topic(self.sender_inbox)
        if len(self.reply_to.echo) > ECHO_LIMIT_BYTES:
            problem = f"of a foreign client must be at most {ECHO_LIMIT_BYTES} bytes, is {len(self.reply_to.echo)}"
            raise property_error("Correlation Data", problem)
        if self.deadline_ms is not None and not 0 <= self.deadline_ms <= DEADLINE_LIMIT_MS:
            raise property_error("deadline-ms", f"must be 0 to {DEADLINE_LIMIT_MS:.0f}, is {self.deadline_ms}")
        check_priority(self.priority)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation(Task):
    """A further hop: the values that crossed the cut. Its `sender` is the inbox of the worker that has the forward."""

    def __post_init__(self) -> None:
        Task.__post_init__(self)
        if not isinstance(self.content, TensorContent):
            raise property_error(
                "Content Type", f"of an activation must be {SAFETENSORS}, is {self.content.content_type}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The answer, with what each hop took."""

    request_id: bytes
    content: Content
    attempt: int = 1
    hops: tuple[Hop, ...] = ()

    def __post_init__(self) -> None:
        _check_request(self.request_id, self.attempt)
        _check_content(self.content, self.hops)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A stage could not do its part: `error` is the class of the failure, `reason` one line for a person.

    `retry` says that another worker, or this one later, may well succeed (it was full, it is leaving).
    """

    request_id: bytes
    stage: str
    worker: str
    error: str
    reason: str
    attempt: int = 1
    retry: bool = False

    def __post_init__(self) -> None:
        _check_request(self.request_id, self.attempt)

    def as_dict(self) -> dict[str, object]:
        return {
            "request": self.request_id.hex(),
            "error": self.error,
            "reason": self.reason,
            "stage": self.stage,
            "worker": self.worker,
            "retry": self.retry,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDone:
    """`done`: the worker has finished with this request and has room for another."""

    request_id: bytes
    worker: str
    verb: Literal["done"] = "done"
    attempt: int = 1

    def __post_init__(self) -> None:
        _check_request(self.request_id, self.attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient:
    """The gradients of a loss with respect to what an activation held, by its names: for the keeper of the forward."""

    request_id: bytes
    content: TensorContent
    sender_inbox: str = ""
    attempt: int = 1

    def __post_init__(self) -> None:
        _check_request(self.request_id, self.attempt)
        check_reply_topic(self.sender_inbox)


StepVerb = Literal[
    "prepared", "commit", "committed", "abort", "quiesce", "quiesced", "restore", "restored", "fetch_weights"
]
STEP_VERBS: tuple[StepVerb, ...] = get_args(StepVerb)
# No clock and no count reaches further than JSON's whole numbers do.
JSON_INTEGER_LIMIT = 1 << 53


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMessage:
    """A word about a step. `request` is the step's id, `term` the term it belongs to, `sender` who may be answered."""

    request_id: bytes
    verb: StepVerb
    term: int
    sender_inbox: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 1

    def __post_init__(self) -> None:
        _check_request(self.request_id, self.attempt)
        check_reply_topic(self.sender_inbox)
        if self.verb not in STEP_VERBS:
            raise property_error("verb", f"must be one of {', '.join(STEP_VERBS)}, is {self.verb!r}")
        if not 0 <= self.term < JSON_INTEGER_LIMIT:
            raise property_error("term", f"must be 0 to {JSON_INTEGER_LIMIT - 1}, is {self.term}")


Message = Task | Activation | Result | Failure | TaskDone | Gradient | StepMessage
