"""Messages to bytes and back: pure, total, inverse. The published contract is docs/protocol.md.

Routing stands in MQTT 5 properties, so that a broker, a bridge or a person with mosquitto_sub can read it; shapes and
dtypes stand in the safetensors header; nothing stands in both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, cast

from brokers.errors import BadPayload, WireError, property_error
from brokers.protocol import safetensors_codec as codec
from brokers.protocol.media_type import decode_content
from brokers.protocol.messages import (
    JSON,
    PRIORITIES,
    REQUEST_ID_BYTES,
    SAFETENSORS,
    Activation,
    BinaryContent,
    Content,
    Failure,
    Gradient,
    Message,
    Priority,
    ReplyTo,
    Result,
    StepMessage,
    StepVerb,
    Task,
    TaskDone,
    TensorContent,
    check_priority,
    new_request_id,
)
from brokers.protocol.properties import get_int, get_milliseconds, get_required
from brokers.protocol.stage_timing import HOPS_KEY, Hop, hops_from_json, hops_to_json
from brokers.protocol.traceparent import TRACEPARENT, parse_traceparent
from brokers.protocol.transport import Buffer, Properties

PROTOCOL_VERSION = "1"

# The finest deadline that the wire can say.
_SHORTEST_MS = 0.001


@dataclass(frozen=True, slots=True)
class EncodedMessage:
    """An encoded message: its properties, and its payload in pieces that are sent one after the other."""

    properties: Properties
    buffers: tuple[Buffer, ...]

    @property
    def nbytes(self) -> int:
        return sum(memoryview(piece).nbytes for piece in self.buffers)


# Encode -------------------------------------------------------------------------------------------------------------


def encode(message: Message) -> EncodedMessage:
    """The packet of a message. Tensors' bytes are shared with it, not copied."""
    kind = _KINDS[type(message)]
    user = [("sparse", PROTOCOL_VERSION), ("kind", kind)]
    if message.attempt != 1:
        user.append(("attempt", str(message.attempt)))
    response_topic = ""
    expiry_s = None
    match message:
        case Task():
            response_topic = message.sender_inbox or message.reply_to.topic
            user += _task_properties(message, response_topic)
            expiry_s = None if message.deadline_ms is None else max(1, math.ceil(message.deadline_ms / 1000))
            content_type, pieces = _encode_content(message.content, message.hops)
        case Result():
            content_type, pieces = _encode_content(message.content, message.hops)
        case Failure():
            content_type, pieces = JSON, (json.dumps(message.as_dict()).encode(),)
        case TaskDone():
            user += [("verb", message.verb), ("worker", message.worker)]
            content_type, pieces = "", ()
        case Gradient():
            response_topic = message.sender_inbox
            content_type, pieces = _encode_content(message.content, ())
        case StepMessage():
            response_topic = message.sender_inbox
            user += [("verb", message.verb), ("term", str(message.term))]
            content_type, pieces = JSON, (json.dumps(message.details).encode(),)
    return EncodedMessage(Properties(content_type, message.request_id, response_topic, expiry_s, tuple(user)), pieces)


def _task_properties(task: Task, response_topic: str) -> list[tuple[str, str]]:
    user = []
    if task.reply_to.topic != response_topic:
        user.append(("reply", task.reply_to.topic))
    if task.reply_to.accept != "safetensors":
        user.append(("accept", task.reply_to.accept))
    if task.reply_to.echo:
        user.append(("echo", task.reply_to.echo.hex()))
    if task.source:
        user.append(("source", task.source))
    if task.priority != "interactive":
        user.append(("priority", task.priority))
    if task.deadline_ms is not None:
        user.append(("deadline-ms", f"{max(task.deadline_ms, _SHORTEST_MS):.3f}"))
    if task.trace is not None:
        user.append((TRACEPARENT, task.trace.to_traceparent()))
    return user


def _encode_content(content: Content, hops: tuple[Hop, ...]) -> tuple[str, tuple[Buffer, ...]]:
    if isinstance(content, BinaryContent):
        return content.content_type, (content.data,)
    metadata = {**content.metadata, HOPS_KEY: hops_to_json(hops)} if hops else content.metadata
    return SAFETENSORS, tuple(codec.pack(content.tensors, metadata))


# Decode -------------------------------------------------------------------------------------------------------------


def decode(properties: Properties, payload: memoryview) -> Message:
    """The message of a packet; a packet without our version property is a foreign client's task."""
    user = dict(properties.user_properties)
    version = user.get("sparse")
    if version is None:
        return _decode_foreign(properties, user, payload)
    check_version(version)
    kind = get_required(user, "kind")
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise property_error("kind", f"must be one of {', '.join(_DECODERS)}, is {kind!r}")
    return decoder(properties, user, payload)


def check_version(version: str) -> None:
    """Raise `WireError` ("VersionMismatch") for a message of another protocol version."""
    if version != PROTOCOL_VERSION:
        message = f"protocol version {PROTOCOL_VERSION} is spoken here, the message is of version {version!r}"
        raise WireError("VersionMismatch", message, expected=PROTOCOL_VERSION, actual=version)


def parse_reply_to(properties: Properties) -> tuple[bytes, ReplyTo] | None:
    """Whom to tell that a packet could not be read: its request id and its reply address, if it has them."""
    user = dict(properties.user_properties)
    request = properties.correlation_data if len(properties.correlation_data) == REQUEST_ID_BYTES else new_request_id()
    for read in (_decode_reply, _plain_reply) if "sparse" in user else (_foreign_reply,):
        with suppress(WireError):
            reply = read(properties, user)
            return (request, reply) if reply.topic else None
    return None


def make_failure_reply(
    error: WireError, properties: Properties, stage: str, worker: str
) -> tuple[ReplyTo, Failure] | None:
    """The failure that answers a packet that could not be read, and where it goes; None where nobody can be told."""
    address = parse_reply_to(properties)
    if address is None:
        return None
    request, reply = address
    try:
        attempt = max(1, get_int(dict(properties.user_properties), "attempt"))
    except WireError:
        attempt = 1
    failure = Failure(
        request_id=request,
        stage=stage,
        worker=worker,
        error=error.code,
        reason=str(error),
        attempt=attempt,
        retry=error.retry,
    )
    return reply, failure


def _decode_foreign(properties: Properties, user: Mapping[str, str], payload: memoryview) -> Task:
    reply = _foreign_reply(properties, {})
    content = decode_content(properties.content_type, payload)
    deadline_ms = None if properties.expiry_s is None else 1000.0 * properties.expiry_s
    trace = parse_traceparent(user.get(TRACEPARENT))
    return Task(request_id=new_request_id(), content=content, reply_to=reply, deadline_ms=deadline_ms, trace=trace)


def _foreign_reply(properties: Properties, user: Mapping[str, str]) -> ReplyTo:
    return ReplyTo(properties.response_topic, "json", properties.correlation_data)


def _plain_reply(properties: Properties, user: Mapping[str, str]) -> ReplyTo:
    return ReplyTo(user.get("reply", properties.response_topic))


def _decode_task(properties: Properties, user: Mapping[str, str], payload: memoryview) -> Task:
    kind = Activation if user["kind"] == "activation" else Task
    content = decode_content(properties.content_type, payload)
    hops: tuple[Hop, ...] = ()
    if isinstance(content, TensorContent) and HOPS_KEY in content.metadata:
        metadata = dict(content.metadata)
        hops = hops_from_json(metadata.pop(HOPS_KEY))
        content = replace(content, metadata=metadata)
    return kind(
        request_id=properties.correlation_data,
        content=content,
        reply_to=_decode_reply(properties, user),
        sender_inbox=properties.response_topic,
        source=user.get("source", ""),
        attempt=get_int(user, "attempt"),
        deadline_ms=get_milliseconds(user, "deadline-ms"),
        priority=_decode_priority(user),
        trace=parse_traceparent(user.get(TRACEPARENT)),
        hops=hops,
    )


def _decode_reply(properties: Properties, user: Mapping[str, str]) -> ReplyTo:
    accept = user.get("accept", "safetensors")
    if accept not in ("safetensors", "json"):
        raise property_error("accept", f"must be safetensors or json, is {accept!r}")
    try:
        echo = bytes.fromhex(user.get("echo", ""))
    except ValueError:
        raise property_error("echo", "must be hexadecimal") from None
    topic = user.get("reply", properties.response_topic)
    if not topic:
        raise property_error("Response Topic", "is missing: there is nowhere to answer")
    return ReplyTo(topic, cast(Literal["safetensors", "json"], accept), echo)


def _decode_priority(user: Mapping[str, str]) -> Priority:
    priority = user.get("priority", PRIORITIES[0])
    check_priority(priority)
    return cast(Priority, priority)


def _decode_result(properties: Properties, user: Mapping[str, str], payload: memoryview) -> Result:
    task = _decode_task(replace(properties, response_topic="-"), {**user, "kind": "task"}, payload)
    return Result(request_id=task.request_id, content=task.content, attempt=task.attempt, hops=task.hops)


def _decode_failure(properties: Properties, user: Mapping[str, str], payload: memoryview) -> Failure:
    try:
        fields = json.loads(bytes(payload).decode())
    except (ValueError, RecursionError):
        fields = None
    words = ("stage", "worker", "error", "reason")
    is_object = isinstance(fields, dict) and all(isinstance(fields.get(word), str) for word in words)
    if not is_object or not isinstance(fields.get("retry"), bool):
        raise BadPayload(JSON, "a failure needs error, reason, stage and worker, all text, and retry, true or false")
    return Failure(
        request_id=properties.correlation_data,
        attempt=get_int(user, "attempt"),
        retry=fields["retry"],
        **{word: fields[word] for word in words},
    )


def _decode_control(properties: Properties, user: Mapping[str, str], payload: memoryview) -> TaskDone:
    verb = get_required(user, "verb")
    if verb != "done":
        raise property_error("verb", f"must be done, is {verb!r}")
    worker = get_required(user, "worker")
    return TaskDone(
        request_id=properties.correlation_data, worker=worker, verb="done", attempt=get_int(user, "attempt")
    )


def _decode_gradient(properties: Properties, user: Mapping[str, str], payload: memoryview) -> Gradient:
    content = decode_content(properties.content_type or SAFETENSORS, payload)
    if not isinstance(content, TensorContent):
        raise property_error("Content Type", f"of a gradient must be {SAFETENSORS}, is {content.content_type}")
    attempt = get_int(user, "attempt")
    return Gradient(
        request_id=properties.correlation_data, content=content, sender_inbox=properties.response_topic, attempt=attempt
    )


def _decode_step(properties: Properties, user: Mapping[str, str], payload: memoryview) -> StepMessage:
    try:
        details = json.loads(bytes(payload).decode())
    except (ValueError, RecursionError):
        details = None
    if not isinstance(details, dict):
        raise BadPayload(JSON, "a word about a step needs a JSON object")
    return StepMessage(
        request_id=properties.correlation_data,
        verb=cast(StepVerb, get_required(user, "verb")),
        term=get_int(user, "term", default=None, max_digits=16),
        sender_inbox=properties.response_topic,
        details=details,
        attempt=get_int(user, "attempt"),
    )


# The user property `kind` of each class of message.
_KINDS: dict[type, str] = {
    Task: "task",
    Activation: "activation",
    Result: "result",
    Failure: "failure",
    TaskDone: "control",
    Gradient: "gradient",
    StepMessage: "step",
}
_DECODERS: dict[str, Callable[[Properties, Mapping[str, str], memoryview], Message]] = {
    "task": _decode_task,
    "activation": _decode_task,
    "result": _decode_result,
    "failure": _decode_failure,
    "control": _decode_control,
    "gradient": _decode_gradient,
    "step": _decode_step,
}
