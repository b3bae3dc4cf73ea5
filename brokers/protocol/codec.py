"""Encode messages as MQTT properties and payload, and decode them; docs/protocol.md is the specification.

`encode` and `decode` are inverse functions, except that a task without `sender_inbox` is decoded with its reply topic
as one. Routing is in the MQTT 5 properties, where brokers, bridges and tools such as mosquitto_sub can read it; shapes
and dtypes are in the safetensors header; nothing is in both.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from brokers.errors import BadPayload, WireError, property_error
from brokers.protocol import safetensors_codec
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
    decode_content,
    new_request_id,
)
from brokers.protocol.stage_timing import HOPS_KEY, Hop, hops_from_json, hops_to_json
from brokers.protocol.traceparent import TRACEPARENT, parse_traceparent
from brokers.protocol.transport import Buffer, Properties

PROTOCOL_VERSION = "1"
_SHORTEST_DEADLINE_MS = 0.001  # the smallest deadline that can be encoded

_UserProperties = Mapping[str, str]
_Fields = dict[str, Any]  # the fields of all messages
_Decoder = Callable[[_Fields, Properties, _UserProperties, memoryview], Message]


@dataclass(frozen=True, slots=True)
class EncodedMessage:
    """The properties of a message, and its payload as consecutive buffers."""

    properties: Properties
    buffers: tuple[Buffer, ...]

    @property
    def nbytes(self) -> int:
        return sum(memoryview(buffer).nbytes for buffer in self.buffers)


def encode(message: Message) -> EncodedMessage:
    """Encode a message. The buffers share memory with its tensors."""
    user = [("sparse", PROTOCOL_VERSION), ("kind", _KINDS[type(message)])]
    if message.attempt != 1:
        user.append(("attempt", str(message.attempt)))
    content_type = ""
    buffers: tuple[Buffer, ...] = ()
    response_topic = ""
    expiry_s = None
    match message:
        case Task():
            response_topic = message.sender_inbox or message.reply_to.topic
            user += _task_properties(message, response_topic)
            expiry_s = None if message.deadline_ms is None else max(1, math.ceil(message.deadline_ms / 1000))
            content_type, buffers = _encode_content(message.content, message.hops)
        case Result():
            content_type, buffers = _encode_content(message.content, message.hops)
        case Failure():
            content_type, buffers = JSON, (json.dumps(message.as_dict()).encode(),)
        case TaskDone():
            user += [("verb", "done"), ("worker", message.worker)]
        case Gradient():
            response_topic = message.sender_inbox
            content_type, buffers = _encode_content(message.content)
        case StepMessage():
            response_topic = message.sender_inbox
            user += [("verb", message.verb), ("term", str(message.term))]
            content_type, buffers = JSON, (json.dumps(message.details).encode(),)
    return EncodedMessage(Properties(content_type, message.request_id, response_topic, expiry_s, tuple(user)), buffers)


def _task_properties(task: Task, response_topic: str) -> list[tuple[str, str]]:
    """Return the user properties of a task; those with their default value are left out."""
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
        user.append(("deadline-ms", f"{max(task.deadline_ms, _SHORTEST_DEADLINE_MS):.3f}"))
    if task.trace is not None:
        user.append((TRACEPARENT, task.trace.to_traceparent()))
    return user


def _encode_content(content: Content, hops: tuple[Hop, ...] = ()) -> tuple[str, tuple[Buffer, ...]]:
    if isinstance(content, BinaryContent):
        return content.content_type, (content.data,)
    metadata = {**content.metadata, HOPS_KEY: hops_to_json(hops)} if hops else content.metadata
    return SAFETENSORS, tuple(safetensors_codec.pack(content.tensors, metadata))


def decode(properties: Properties, payload: memoryview) -> Message:
    """Decode a message; one without our version property is the task of a foreign client. Raises `WireError`."""
    user = dict(properties.user_properties)
    if "sparse" not in user:
        return _decode_foreign_task(properties, user, payload)
    check_version(user["sparse"])
    kind = _get_required(user, "kind")
    decoder = _DECODERS.get(kind)
    if decoder is None:
        raise property_error("kind", f"must be one of {', '.join(_DECODERS)}, is {kind!r}")
    common = {"request_id": properties.correlation_data, "attempt": _get_int(user, "attempt")}
    return decoder(common, properties, user, payload)


def check_version(version: object) -> None:
    """Raise `WireError` ("VersionMismatch") for a message of another protocol version."""
    if version != PROTOCOL_VERSION:
        message = f"expected protocol version {PROTOCOL_VERSION}, got {version!r}"
        raise WireError("VersionMismatch", message, expected=PROTOCOL_VERSION, actual=version)


def make_failure_reply(
    error: WireError, properties: Properties, stage: str, worker: str
) -> tuple[ReplyTo, Failure] | None:
    """Return the reply to a message that could not be decoded, and its address; None if the message has no address."""
    user = dict(properties.user_properties)
    reply_to = _parse_reply_address(properties, user)
    if reply_to is None:
        return None
    has_id = len(properties.correlation_data) == REQUEST_ID_BYTES
    try:
        attempt = max(1, _get_int(user, "attempt"))
    except WireError:
        attempt = 1
    failure = Failure(
        request_id=properties.correlation_data if has_id else new_request_id(),
        attempt=attempt,
        stage=stage,
        worker=worker,
        error=error.code,
        reason=str(error),
        retry=error.retry,
    )
    return reply_to, failure


def _parse_reply_address(properties: Properties, user: _UserProperties) -> ReplyTo | None:
    try:
        if "sparse" not in user:
            reply_to = ReplyTo(properties.response_topic, "json", properties.correlation_data)
        else:
            try:
                reply_to = _decode_reply_to(properties, user)
            except WireError:  # perhaps only its format is malformed
                reply_to = ReplyTo(user.get("reply", properties.response_topic))
    except WireError:
        return None
    return reply_to if reply_to.topic else None


def _decode_foreign_task(properties: Properties, user: _UserProperties, payload: memoryview) -> Task:
    return Task(
        request_id=new_request_id(),
        content=decode_content(properties.content_type, payload),
        reply_to=ReplyTo(properties.response_topic, "json", properties.correlation_data),
        deadline_ms=None if properties.expiry_s is None else 1000.0 * properties.expiry_s,
        trace=parse_traceparent(user.get(TRACEPARENT)),
    )


def _decode_task(common: _Fields, properties: Properties, user: _UserProperties, payload: memoryview) -> Task:
    message_class = Activation if user["kind"] == "activation" else Task
    content, hops = _decode_content(properties, payload)
    return message_class(
        **common,
        content=content,
        reply_to=_decode_reply_to(properties, user),
        sender_inbox=properties.response_topic,
        source=user.get("source", ""),
        deadline_ms=_get_milliseconds(user, "deadline-ms"),
        priority=cast(Priority, user.get("priority", PRIORITIES[0])),
        trace=parse_traceparent(user.get(TRACEPARENT)),
        hops=hops,
    )


def _decode_content(properties: Properties, payload: memoryview) -> tuple[Content, tuple[Hop, ...]]:
    content = decode_content(properties.content_type, payload)
    if isinstance(content, BinaryContent) or HOPS_KEY not in content.metadata:
        return content, ()
    metadata = dict(content.metadata)
    hops = hops_from_json(metadata.pop(HOPS_KEY))
    return replace(content, metadata=metadata), hops


def _decode_reply_to(properties: Properties, user: _UserProperties) -> ReplyTo:
    accept = user.get("accept", "safetensors")
    if accept not in ("safetensors", "json"):
        raise property_error("accept", f"must be safetensors or json, is {accept!r}")
    try:
        echo = bytes.fromhex(user.get("echo", ""))
    except ValueError:
        raise property_error("echo", "must be hexadecimal") from None
    topic = user.get("reply", properties.response_topic)
    if not topic:
        raise property_error("Response Topic", "is missing: there is no address to reply to")
    return ReplyTo(topic, cast(Literal["safetensors", "json"], accept), echo)


def _decode_result(common: _Fields, properties: Properties, user: _UserProperties, payload: memoryview) -> Result:
    content, hops = _decode_content(properties, payload)
    return Result(**common, content=content, hops=hops)


def _decode_failure(common: _Fields, properties: Properties, user: _UserProperties, payload: memoryview) -> Failure:
    fields = _decode_json_object(payload)
    texts = {name: fields.get(name) for name in ("stage", "worker", "error", "reason")}
    retry = fields.get("retry")
    if not all(isinstance(text, str) for text in texts.values()) or not isinstance(retry, bool):
        raise BadPayload(JSON, "a failure needs error, reason, stage and worker as text, and retry as true or false")
    return Failure(**common, retry=retry, **cast(Any, texts))


def _decode_done(common: _Fields, properties: Properties, user: _UserProperties, payload: memoryview) -> TaskDone:
    verb = _get_required(user, "verb")
    if verb != "done":
        raise property_error("verb", f"must be done, is {verb!r}")
    return TaskDone(**common, worker=_get_required(user, "worker"))


def _decode_gradient(common: _Fields, properties: Properties, user: _UserProperties, payload: memoryview) -> Gradient:
    content = decode_content(properties.content_type or SAFETENSORS, payload)
    if not isinstance(content, TensorContent):
        raise property_error("Content Type", f"of a gradient must be {SAFETENSORS}, is {content.content_type}")
    return Gradient(**common, content=content, sender_inbox=properties.response_topic)


def _decode_step(common: _Fields, properties: Properties, user: _UserProperties, payload: memoryview) -> StepMessage:
    return StepMessage(
        **common,
        verb=cast(StepVerb, _get_required(user, "verb")),
        term=_get_int(user, "term", default=None, max_digits=16),
        sender_inbox=properties.response_topic,
        details=_decode_json_object(payload),
    )


def _decode_json_object(payload: memoryview) -> dict[str, Any]:
    try:
        fields = json.loads(bytes(payload).decode())
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise BadPayload(JSON, "expected a JSON object in UTF-8")
    return fields


# Each message class, its user property `kind`, and its decoder.
_CODECS: tuple[tuple[type, str, _Decoder], ...] = (
    (Task, "task", _decode_task),
    (Activation, "activation", _decode_task),
    (Result, "result", _decode_result),
    (Failure, "failure", _decode_failure),
    (TaskDone, "control", _decode_done),
    (Gradient, "gradient", _decode_gradient),
    (StepMessage, "step", _decode_step),
)
_KINDS = {message_class: kind for message_class, kind, _ in _CODECS}
_DECODERS = {kind: decoder for _, kind, decoder in _CODECS}


_DIGITS = re.compile(r"[0-9]+")
_MILLISECONDS = re.compile(r"[0-9]{1,13}(\.[0-9]{1,9})?")


def _get_required(user: _UserProperties, name: str) -> str:
    if name not in user:
        raise property_error(name, "is missing")
    return user[name]


def _get_int(user: _UserProperties, name: str, *, default: str | None = "1", max_digits: int = 9) -> int:
    text = _get_required(user, name) if default is None else user.get(name, default)
    if len(text) > max_digits or not _DIGITS.fullmatch(text):
        raise property_error(name, f"must be a whole number of at most {max_digits} digits, is {text!r}")
    return int(text)


def _get_milliseconds(user: _UserProperties, name: str) -> float | None:
    text = user.get(name)
    if text is None:
        return None
    if not _MILLISECONDS.fullmatch(text) or float(text) == 0:
        raise property_error(name, f"must be a positive decimal number, is {text!r}")
    return float(text)
