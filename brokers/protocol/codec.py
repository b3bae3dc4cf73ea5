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

from brokers.errors import BadPayload, BadProperty, VersionMismatch, WireError
from brokers.protocol import safetensors_codec as codec
from brokers.protocol.media_type import decode_content
from brokers.protocol.messages import (
    JSON,
    PRIORITIES,
    REQUEST_ID_BYTES,
    SAFETENSORS,
    Activation,
    Blob,
    Body,
    Content,
    Control,
    Failure,
    Gradient,
    Message,
    Priority,
    ReplyTo,
    Result,
    Step,
    Task,
    Verb,
    check_priority,
    new_request_id,
)
from brokers.protocol.properties import milliseconds, required, whole
from brokers.protocol.stage_timing import HOPS, Hop, hops_from_json, hops_to_json
from brokers.protocol.traceparent import TRACEPARENT, from_text
from brokers.protocol.transport import Buffer, Properties

VERSION = "1"

# The finest deadline that the wire can say.
_SHORTEST_MS = 0.001


@dataclass(frozen=True, slots=True)
class Packet:
    """An encoded message: its properties, and its payload in pieces that are sent one after the other."""

    properties: Properties
    pieces: tuple[Buffer, ...]

    @property
    def nbytes(self) -> int:
        return sum(memoryview(piece).nbytes for piece in self.pieces)


# Encode -------------------------------------------------------------------------------------------------------------


def encode(message: Message) -> Packet:
    """The packet of a message. Tensors' bytes are shared with it, not copied."""
    kind = type(message).__name__.lower()
    user = [("sparse", VERSION), ("kind", kind)]
    if message.attempt != 1:
        user.append(("attempt", str(message.attempt)))
    response_topic = ""
    expiry_s = None
    match message:
        case Task():
            response_topic = message.sender or message.reply.topic
            user += _task_properties(message, response_topic)
            expiry_s = None if message.deadline_ms is None else max(1, math.ceil(message.deadline_ms / 1000))
            content_type, pieces = _encode_content(message.content, message.hops)
        case Result():
            content_type, pieces = _encode_content(message.content, message.hops)
        case Failure():
            content_type, pieces = JSON, (json.dumps(message.as_dict()).encode(),)
        case Control():
            user += [("verb", message.verb), ("worker", message.worker)]
            content_type, pieces = "", ()
        case Gradient():
            response_topic = message.sender
            content_type, pieces = _encode_content(message.content, ())
        case Step():
            response_topic = message.sender
            user += [("verb", message.verb), ("term", str(message.term))]
            content_type, pieces = JSON, (json.dumps(message.details).encode(),)
    return Packet(Properties(content_type, message.request, response_topic, expiry_s, tuple(user)), pieces)


def _task_properties(task: Task, response_topic: str) -> list[tuple[str, str]]:
    user = []
    if task.reply.topic != response_topic:
        user.append(("reply", task.reply.topic))
    if task.reply.accept != "safetensors":
        user.append(("accept", task.reply.accept))
    if task.reply.echo:
        user.append(("echo", task.reply.echo.hex()))
    if task.source:
        user.append(("source", task.source))
    if task.priority != "interactive":
        user.append(("priority", task.priority))
    if task.deadline_ms is not None:
        user.append(("deadline-ms", f"{max(task.deadline_ms, _SHORTEST_MS):.3f}"))
    if task.trace is not None:
        user.append((TRACEPARENT, task.trace.to_text()))
    return user


def _encode_content(content: Content, hops: tuple[Hop, ...]) -> tuple[str, tuple[Buffer, ...]]:
    if isinstance(content, Blob):
        return content.content_type, (content.data,)
    metadata = {**content.metadata, HOPS: hops_to_json(hops)} if hops else content.metadata
    return SAFETENSORS, tuple(codec.pack(content.tensors, metadata))


# Decode -------------------------------------------------------------------------------------------------------------


def decode(properties: Properties, payload: memoryview) -> Message:
    """The message of a packet; a packet without our version property is a foreign client's task."""
    user = dict(properties.user)
    version = user.get("sparse")
    if version is None:
        return _decode_foreign(properties, user, payload)
    if version != VERSION:
        raise VersionMismatch(VERSION, version)
    kind = required(user, "kind")
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise BadProperty("kind", f"must be one of {', '.join(_DECODERS)}, is {kind!r}")
    return decoder(properties, user, payload)


def answer_address(properties: Properties) -> tuple[bytes, ReplyTo] | None:
    """Whom to tell that a packet could not be read: its request id and its reply address, if it has them."""
    user = dict(properties.user)
    request = properties.correlation if len(properties.correlation) == REQUEST_ID_BYTES else new_request_id()
    for read in (_decode_reply, _plain_reply) if "sparse" in user else (_foreign_reply,):
        with suppress(WireError):
            reply = read(properties, user)
            return (request, reply) if reply.topic else None
    return None


def refusal(error: WireError, properties: Properties, stage: str, worker: str) -> tuple[ReplyTo, Failure] | None:
    """The failure that answers a packet that could not be read, and where it goes; None where nobody can be told."""
    address = answer_address(properties)
    if address is None:
        return None
    request, reply = address
    try:
        attempt = max(1, whole(dict(properties.user), "attempt"))
    except WireError:
        attempt = 1
    failure = Failure(
        request=request,
        stage=stage,
        worker=worker,
        error=type(error).__name__,
        reason=str(error),
        attempt=attempt,
        retry=error.retry,
    )
    return reply, failure


def _decode_foreign(properties: Properties, user: Mapping[str, str], payload: memoryview) -> Task:
    reply = _foreign_reply(properties, {})
    content = decode_content(properties.content_type, payload)
    deadline_ms = None if properties.expiry_s is None else 1000.0 * properties.expiry_s
    trace = from_text(user.get(TRACEPARENT))
    return Task(request=new_request_id(), content=content, reply=reply, deadline_ms=deadline_ms, trace=trace)


def _foreign_reply(properties: Properties, user: Mapping[str, str]) -> ReplyTo:
    return ReplyTo(properties.response_topic, "json", properties.correlation)


def _plain_reply(properties: Properties, user: Mapping[str, str]) -> ReplyTo:
    return ReplyTo(user.get("reply", properties.response_topic))


def _decode_task(properties: Properties, user: Mapping[str, str], payload: memoryview) -> Task:
    kind = Activation if user["kind"] == "activation" else Task
    content = decode_content(properties.content_type, payload)
    hops: tuple[Hop, ...] = ()
    if isinstance(content, Body) and HOPS in content.metadata:
        metadata = dict(content.metadata)
        hops = hops_from_json(metadata.pop(HOPS))
        content = replace(content, metadata=metadata)
    return kind(
        request=properties.correlation,
        content=content,
        reply=_decode_reply(properties, user),
        sender=properties.response_topic,
        source=user.get("source", ""),
        attempt=whole(user, "attempt"),
        deadline_ms=milliseconds(user, "deadline-ms"),
        priority=_decode_priority(user),
        trace=from_text(user.get(TRACEPARENT)),
        hops=hops,
    )


def _decode_reply(properties: Properties, user: Mapping[str, str]) -> ReplyTo:
    accept = user.get("accept", "safetensors")
    if accept not in ("safetensors", "json"):
        raise BadProperty("accept", f"must be safetensors or json, is {accept!r}")
    try:
        echo = bytes.fromhex(user.get("echo", ""))
    except ValueError:
        raise BadProperty("echo", "must be hexadecimal") from None
    topic = user.get("reply", properties.response_topic)
    if not topic:
        raise BadProperty("Response Topic", "is missing: there is nowhere to answer")
    return ReplyTo(topic, cast(Literal["safetensors", "json"], accept), echo)


def _decode_priority(user: Mapping[str, str]) -> Priority:
    priority = user.get("priority", PRIORITIES[0])
    check_priority(priority)
    return cast(Priority, priority)


def _decode_result(properties: Properties, user: Mapping[str, str], payload: memoryview) -> Result:
    task = _decode_task(replace(properties, response_topic="-"), {**user, "kind": "task"}, payload)
    return Result(request=task.request, content=task.content, attempt=task.attempt, hops=task.hops)


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
        request=properties.correlation,
        attempt=whole(user, "attempt"),
        retry=fields["retry"],
        **{word: fields[word] for word in words},
    )


def _decode_control(properties: Properties, user: Mapping[str, str], payload: memoryview) -> Control:
    verb = required(user, "verb")
    if verb != "done":
        raise BadProperty("verb", f"must be done, is {verb!r}")
    worker = required(user, "worker")
    return Control(request=properties.correlation, worker=worker, verb="done", attempt=whole(user, "attempt"))


def _decode_gradient(properties: Properties, user: Mapping[str, str], payload: memoryview) -> Gradient:
    content = decode_content(properties.content_type or SAFETENSORS, payload)
    if not isinstance(content, Body):
        raise BadProperty("Content Type", f"of a gradient must be {SAFETENSORS}, is {content.content_type}")
    attempt = whole(user, "attempt")
    return Gradient(request=properties.correlation, content=content, sender=properties.response_topic, attempt=attempt)


def _decode_step(properties: Properties, user: Mapping[str, str], payload: memoryview) -> Step:
    try:
        details = json.loads(bytes(payload).decode())
    except (ValueError, RecursionError):
        details = None
    if not isinstance(details, dict):
        raise BadPayload(JSON, "a word about a step needs a JSON object")
    return Step(
        request=properties.correlation,
        verb=cast(Verb, required(user, "verb")),
        term=whole(user, "term", default=None, digits=16),
        sender=properties.response_topic,
        details=details,
        attempt=whole(user, "attempt"),
    )


_DECODERS: dict[str, Callable[[Properties, Mapping[str, str], memoryview], Message]] = {
    "task": _decode_task,
    "activation": _decode_task,
    "result": _decode_result,
    "failure": _decode_failure,
    "control": _decode_control,
    "gradient": _decode_gradient,
    "step": _decode_step,
}
