"""The messages between sources and workers: frozen values, valid on construction, independent of their encoding.

Task         from a source, or any MQTT client, to the first stage
Activation   from a stage to the next one: the tensors that crossed the cut
Result       from the last stage to the source
Failure      from any stage to the source, in place of a result
TaskDone     from a worker to the sender of a task: a slot is free again (credit-based flow control)
Gradient     training: the loss gradient with respect to an activation, sent back to the worker that produced it
StepMessage  training: two-phase commit of a step, and terms (see brokers/protocol/training.py)

Constructors raise `WireError` ("BadProperty") for values that docs/protocol.md does not allow.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from brokers.errors import BadPayload, property_error
from brokers.protocol import safetensors_codec
from brokers.protocol.safetensors_codec import TensorView
from brokers.protocol.stage_timing import HOPS_KEY, Hop
from brokers.protocol.topics import is_valid_reply_topic
from brokers.protocol.traceparent import TraceContext
from brokers.protocol.transport import Buffer

REQUEST_ID_BYTES = 16
# The largest Message Expiry Interval, four bytes of seconds (MQTT 5.0 section 3.3.2.3.3).
DEADLINE_LIMIT_MS = 1000.0 * 0xFFFF_FFFF
# Correlation Data of a foreign client; stages pass it on as hexadecimal, which is twice as long.
ECHO_LIMIT_BYTES = 256
JSON_INTEGER_LIMIT = 1 << 53  # integers that JSON readers can represent exactly
# Mosquitto closes the connection of a client that publishes to a topic of 200 levels or more.
_TOPIC_LEVELS = 64
_TOPIC_BYTES = 1024

SAFETENSORS = "application/x-safetensors"
JSON = "application/json"
JPEG = "image/jpeg"
PNG = "image/png"

Priority = Literal["interactive", "background"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)  # in the order in which queues serve them

StepVerb = Literal[
    "prepared", "commit", "committed", "abort", "quiesce", "quiesced", "restore", "restored", "fetch_weights"
]
STEP_VERBS: tuple[StepVerb, ...] = get_args(StepVerb)


def check_priority(priority: str) -> None:
    """Raise `WireError` ("BadProperty") for an unknown priority."""
    if priority not in PRIORITIES:
        raise property_error("priority", f"must be {' or '.join(PRIORITIES)}, is {priority!r}")


def new_request_id() -> bytes:
    """Return sixteen random bytes, unique without coordination."""
    return secrets.token_bytes(REQUEST_ID_BYTES)


@dataclass(frozen=True, slots=True)
class TensorContent:
    """Named tensors, and string metadata that stages pass on with them."""

    tensors: Mapping[str, TensorView]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.data.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class BinaryContent:
    """A payload that only the stage that uses it decodes: a JPEG, a PNG, readings as JSON."""

    content_type: str
    data: Buffer

    @property
    def nbytes(self) -> int:
        return len(self.data)


Content = TensorContent | BinaryContent


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """The topic and format of the reply; `echo` is a foreign client's Correlation Data, returned with it."""

    topic: str
    accept: Literal["safetensors", "json"] = "safetensors"
    echo: bytes = b""

    def __post_init__(self) -> None:
        _check_reply_topic(self.topic)


def _check_reply_topic(topic: str) -> None:
    """Refuse topics to which a reply would break the protocol, or make the broker close our connection."""
    if "+" in topic or "#" in topic or "\0" in topic:
        raise property_error("Response Topic", "must be a topic to publish to, without '+', '#' and null characters")
    if topic.count("/") >= _TOPIC_LEVELS or len(topic.encode()) > _TOPIC_BYTES:
        raise property_error("Response Topic", f"must have at most {_TOPIC_LEVELS} levels and {_TOPIC_BYTES} bytes")
    if not is_valid_reply_topic(topic):
        raise property_error("Response Topic", "must not be a presence topic, a shared task topic or an ingress topic")


@dataclass(frozen=True, slots=True, kw_only=True)
class _MessageBase:
    """The id of the request that a message is about, and the attempt, counted from 1."""

    request_id: bytes
    attempt: int = 1

    def __post_init__(self) -> None:
        if len(self.request_id) != REQUEST_ID_BYTES:
            raise property_error("Correlation Data", f"must be {REQUEST_ID_BYTES} bytes, is {len(self.request_id)}")
        if self.attempt < 1:
            raise property_error("attempt", f"must be 1 or more, is {self.attempt}")


def _check_content(content: Content, hops: tuple[Hop, ...]) -> None:
    if isinstance(content, BinaryContent):
        if hops:
            raise property_error(HOPS_KEY, f"travels with tensors only, not with {content.content_type}")
    elif HOPS_KEY in content.metadata:
        raise property_error(HOPS_KEY, "is reserved for the timing that stages add")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task(_MessageBase):
    """A request for the first stage.

    `sender_inbox` is where the worker sends `TaskDone`; `trace` is the span that caused the task; `hops` are the
    timings of earlier stages; `deadline_ms` is the time left when it is sent.
    """

    content: Content
    reply_to: ReplyTo
    sender_inbox: str = ""
    source: str = ""
    deadline_ms: float | None = None
    priority: Priority = "interactive"
    trace: TraceContext | None = None
    hops: tuple[Hop, ...] = ()

    def __post_init__(self) -> None:
        # Not super(): `slots=True` creates a new class, and zero-argument super() refers to the old one.
        _MessageBase.__post_init__(self)
        _check_content(self.content, self.hops)
        _check_reply_topic(self.sender_inbox)
        if len(self.reply_to.echo) > ECHO_LIMIT_BYTES:
            problem = f"of a foreign client must be at most {ECHO_LIMIT_BYTES} bytes, is {len(self.reply_to.echo)}"
            raise property_error("Correlation Data", problem)
        if self.deadline_ms is not None and not 0 <= self.deadline_ms <= DEADLINE_LIMIT_MS:
            raise property_error("deadline-ms", f"must be 0 to {DEADLINE_LIMIT_MS:.0f}, is {self.deadline_ms}")
        check_priority(self.priority)


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation(Task):
    """A request for a later stage: the tensors that crossed the cut.

    In training, `sender_inbox` is the worker that holds the activations saved for the backward pass.
    """

    def __post_init__(self) -> None:
        Task.__post_init__(self)
        if not isinstance(self.content, TensorContent):
            problem = f"of an activation must be {SAFETENSORS}, is {self.content.content_type}"
            raise property_error("Content Type", problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(_MessageBase):
    """The result of a request, with the timing of each stage."""

    content: Content
    hops: tuple[Hop, ...] = ()

    def __post_init__(self) -> None:
        _MessageBase.__post_init__(self)
        _check_content(self.content, self.hops)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure(_MessageBase):
    """A stage could not process the request: `error` is the code, `reason` one line for the user.

    `retry`: another worker, or this one later, may succeed (it was full, it is shutting down).
    """

    stage: str
    worker: str
    error: str
    reason: str
    retry: bool = False

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
class TaskDone(_MessageBase):
    """The worker has finished this task: it has a credit for another one."""

    worker: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradient(_MessageBase):
    """The gradients of the loss with respect to the tensors of an activation, under the same names."""

    content: TensorContent
    sender_inbox: str = ""

    def __post_init__(self) -> None:
        _MessageBase.__post_init__(self)
        _check_reply_topic(self.sender_inbox)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMessage(_MessageBase):
    """A message of the two-phase commit of a training step, or of a term; `request_id` is the id of the step."""

    verb: StepVerb
    term: int
    sender_inbox: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _MessageBase.__post_init__(self)
        _check_reply_topic(self.sender_inbox)
        if self.verb not in STEP_VERBS:
            raise property_error("verb", f"must be one of {', '.join(STEP_VERBS)}, is {self.verb!r}")
        if not 0 <= self.term < JSON_INTEGER_LIMIT:
            raise property_error("term", f"must be 0 to {JSON_INTEGER_LIMIT - 1}, is {self.term}")


Message = Task | Activation | Result | Failure | TaskDone | Gradient | StepMessage


JPEG_SIGNATURE = b"\xff\xd8\xff"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JSON_START = re.compile(rb"[ \t\r\n]*[\[{0-9-]")


def detect_content_type(declared: str, payload: memoryview) -> str:
    """Return the declared content type without its parameters, or the one that the first bytes show.

    Raises `BadPayload` where nothing is declared and the bytes are neither JPEG, PNG, safetensors nor JSON.
    """
    media_type = declared.partition(";")[0].strip().lower()
    if media_type:
        return JPEG if media_type == "image/jpg" else media_type
    head = bytes(payload[:16])
    if head.startswith(JPEG_SIGNATURE):
        return JPEG
    if head.startswith(PNG_SIGNATURE):
        return PNG
    # A safetensors body starts with the length of its header, whose first byte is an opening brace.
    header_bytes = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_bytes <= safetensors_codec.HEADER_LIMIT_BYTES:
        return SAFETENSORS
    if _JSON_START.match(head):
        return JSON
    raise BadPayload("unknown", f"expected JPEG, PNG, safetensors or JSON, the first bytes are {head[:8].hex(' ')!r}")


def decode_content(declared: str, payload: memoryview) -> Content:
    """Return the tensors of a safetensors body, any other payload with its detected type, without copying it."""
    content_type = detect_content_type(declared, payload)
    if content_type == SAFETENSORS:
        return TensorContent(*safetensors_codec.unpack(payload))
    return BinaryContent(content_type, payload)
