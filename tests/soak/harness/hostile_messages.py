"""Hostile messages: valid ones of every kind, mutated; and structured ones that hypothesis makes up.

All of it is derived from seeds: the same messages in the same order each time.
"""

from __future__ import annotations

import io
import json
import random
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from brokers.dispatch.presence import WorkerRecord
from brokers.protocol.codec import encode
from brokers.protocol.messages import (
    JPEG,
    JSON,
    PNG,
    SAFETENSORS,
    Activation,
    BinaryContent,
    Failure,
    Gradient,
    Message,
    ReplyTo,
    Result,
    StepMessage,
    StepVerb,
    Task,
    TaskDone,
    TensorContent,
)
from brokers.protocol.safetensors_codec import from_numpy
from brokers.protocol.stage_timing import HOPS_KEY, Hop
from brokers.protocol.training import MICRO_BATCH_KEY, MicroBatch
from brokers.protocol.transport import Properties

# What a field of MQTT can hold at most, and enough of them for a head that nobody reads.
FIELD_BYTES = 65_535
OVERSIZED_USER_PROPERTIES: tuple[tuple[str, str], ...] = (("padding", "p" * 60_000),) * 20


@dataclass(frozen=True, slots=True)
class HostileMessage:
    """One message, without the topic that it goes to."""

    properties: Properties
    payload: bytes
    retain: bool = False


def png_bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of some bytes that says it has billions of pixels."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


def small_image(image_format: str) -> bytes:
    body = io.BytesIO()
    Image.fromarray(np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)).save(body, image_format)
    return body.getvalue()


def jpeg_bomb() -> bytes:
    """A JPEG whose frame header says 65,500 by 65,500 pixels."""
    data = bytearray(small_image("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 65_500, 65_500)
    return bytes(data)


def forged_worker_record(worker: str, stage: str, pipeline: str = "test", **others: Any) -> bytes:
    """A presence record, as good as any."""
    given = {"site": "local", "node": "n", "pid": 1, "device": "cpu", "fingerprint": "forged", "capacity": 2**31}
    return WorkerRecord(worker=worker, stage=stage, pipeline=pipeline, **{**given, **others}).to_bytes()


def _valid(chance: random.Random) -> Iterator[Message]:
    request = chance.randbytes(16)
    reply = ReplyTo("attacker/replies")
    body = TensorContent(
        {"values": from_numpy(np.array(1.5)), "more": from_numpy(np.ones((3, 2), np.float32))}, {"a": "b"}
    )
    hops = (Hop("double", "double-1", 1.0, 1.0, 1.0, 1.0, 8, 8),)
    for content in (
        body,
        BinaryContent(JSON, b'{"values": [1, 2, 3]}'),
        BinaryContent(JPEG, small_image("JPEG")),
        BinaryContent(JPEG, jpeg_bomb()),
        BinaryContent(PNG, small_image("PNG")),
        BinaryContent(PNG, png_bomb()),
        BinaryContent(JSON, b"[" * 50_000),
        BinaryContent(JSON, b'{"values":' * 5_000),
    ):
        yield Task(
            request_id=request, content=content, reply_to=reply, sender_inbox="attacker/sender", deadline_ms=500.0
        )
    yield Task(request_id=request, content=body, reply_to=ReplyTo("attacker/json", "json", b"echo"))
    yield Activation(
        request_id=request, content=body, reply_to=reply, hops=hops, sender_inbox="attacker/sender", attempt=2
    )
    yield Result(request_id=request, content=body, hops=hops)
    yield Failure(request_id=request, stage="double", worker="double-1", error="Busy", reason="full", retry=True)
    yield TaskDone(request_id=request, worker="double-1")
    yield Gradient(request_id=request, content=body, sender_inbox="attacker/sender")
    micro = MicroBatch(step=request.hex(), term=1, index=0, count=2, rows=8, number=0, seed=1)
    lesson = TensorContent({"input": from_numpy(np.ones((4, 3, 8, 8), np.float32))}, {MICRO_BATCH_KEY: micro.to_json()})
    yield Task(request_id=request, content=lesson, reply_to=reply, sender_inbox="attacker/sender", source="stripes")
    # Not `quiesce` and `restore`: whoever may write those conducts, which access lists are for.
    verbs: tuple[StepVerb, ...] = ("prepared", "commit", "committed", "abort", "quiesced", "restored", "fetch_weights")
    for verb in verbs:
        details = {"stage": "head", "worker": "head-1", "source": "stripes", "lr": 1.0, "version": 3}
        yield StepMessage(
            request_id=request,
            verb=verb,
            term=chance.choice((0, 1, 1 << 40)),
            sender_inbox="attacker/s",
            details=details,
        )


def valid_messages(rng: random.Random) -> list[HostileMessage]:
    """One message of every kind, those of foreign clients and chunks among them, as they should be."""
    found = []
    for message in _valid(rng):
        packet = encode(message)
        found.append(HostileMessage(packet.properties, b"".join(packet.buffers)))
        if isinstance(message, Task):
            foreign = Properties(
                message.content.content_type if isinstance(message.content, BinaryContent) else SAFETENSORS
            )
            found.append(HostileMessage(replace(foreign, response_topic="attacker/foreign"), found[-1].payload))
    task = found[0]
    for place in ("0/4096", "512/4096", "0/1073741824", "0/2097152"):
        user = (*task.properties.user_properties, ("message", "aa"), ("chunk", place))
        found.append(HostileMessage(replace(task.properties, user_properties=user), task.payload[:512]))
    found += [
        HostileMessage(Properties(), forged_worker_record(worker, "double", state="draining"))
        for worker in ("double-1", "nobody")
    ]
    found.append(HostileMessage(Properties(JSON), json.dumps({"source": "s", "index": 1, "pipeline": "test"}).encode()))
    return found


# What a property may be set to instead.
HOSTILE_USER_PROPERTIES: dict[str, Sequence[str]] = {
    "sparse": ("1", "2", "", "1" * 60_000),
    "kind": ("task", "activation", "result", "failure", "control", "gradient", "", "K" * 60_000),
    "attempt": ("0", "-1", "999999999", "9" * 5000, "NaN"),
    "deadline-ms": ("0.001", "0", "1e9", "inf", "4294967295000", "9" * 400),
    "accept": ("json", "xml", ""),
    "echo": ("00" * 256, "00" * 257, "zz", "0"),
    "reply": ("#", "a/+", "/" * 300, "attacker/r", "", "$SYS/broker", "$share/a/b", "a" * 60_000, "\ufeff", " "),
    "source": ("", "..", "../../etc/passwd", "s" * 60_000),
    "verb": ("done", "stop", ""),
    "worker": ("double-1", "nobody", "../x", "w" * 60_000),
    "message": ("", "aa", "m" * 60_000),
    "chunk": ("0/0", "0/1", "5/1", "0/2147483648", "9" * 19 + "/" + "9" * 19, "1/2/3", "-1/5", "", "0/4096", "3/4096"),
    "sparse.hops": ("[]",),
    "": ("", "x"),
}
HOSTILE_TOPICS = (
    "",
    "#",
    "+/x",
    "/",
    "//",
    "/".join("d" * 150),
    "/".join("d" * 64),
    "t" * 60_000,
    "$SYS/x",
    "attacker/x",
)
HOSTILE_METADATA = (
    {HOPS_KEY: "[" * 1000},
    {HOPS_KEY: "null"},
    {"format": "detections"},
    {"format": "classes", "labels": "[" * 999},
)


class MessageMutator:
    """Makes messages that are wrong out of those that are right."""

    def __init__(self, seed: int, extra_messages: Sequence[HostileMessage] = ()) -> None:
        self.rng = random.Random(seed)
        self._right = valid_messages(self.rng)
        self._bodies = [encode(_with_metadata(metadata)) for metadata in HOSTILE_METADATA]
        self.corpus = [
            *self._right,
            *(HostileMessage(each.properties, b"".join(each.buffers)) for each in self._bodies),
            *extra_messages,
        ]

    def next_message(self, response_topics: Sequence[str]) -> HostileMessage:
        """The next message; `response_topics` are further addresses that its answer may be led to."""
        chance = self.rng
        found = chance.choice(self._right if chance.random() < 0.6 else self.corpus)
        found = replace(found, properties=self._fresh(found.properties))
        for _ in range(chance.choice((0, 1, 1, 1, 2, 3))):
            found = self._mutated(found, response_topics)
        return replace(found, retain=chance.random() < 0.002)

    def _fresh(self, properties: Properties) -> Properties:
        """Most requests are new ones: what was refused once as a chunk is ignored afterwards."""
        if self.rng.random() < 0.7:
            return replace(properties, correlation_data=self.rng.randbytes(16))
        return properties

    def _mutated(self, found: HostileMessage, response_topics: Sequence[str]) -> HostileMessage:
        if self.rng.random() < 0.45:
            return replace(found, payload=self._payload(bytearray(found.payload)))
        return replace(found, properties=self._properties(found.properties, response_topics))

    def _payload(self, data: bytearray) -> bytes:
        chance = self.rng
        match chance.randrange(8):
            case 0 | 1 | 2 if data:
                for _ in range(chance.randint(1, 8)):
                    data[chance.randrange(len(data))] = chance.randrange(256)
            case 3 if data:
                del data[chance.randrange(len(data)) :]
            case 4:
                data += chance.randbytes(chance.randint(1, 64))
            case 5 if data:
                other = chance.choice(self.corpus).payload
                data[chance.randrange(len(data)) :] = other[chance.randrange(len(other) + 1) :]
            case 6:
                return b""
            case _:
                return chance.randbytes(chance.choice((1, 8, 9, 100, 5_000)))
        return bytes(data)

    def _properties(self, found: Properties, response_topics: Sequence[str]) -> Properties:
        chance = self.rng
        user = list(found.user_properties)
        match chance.randrange(9):
            case 0 if user:
                del user[chance.randrange(len(user))]
            case 1 if user:
                user.insert(chance.randrange(len(user)), chance.choice(user))
            case 2 | 3:
                name = chance.choice(tuple(HOSTILE_USER_PROPERTIES))
                user = [pair for pair in user if pair[0] != name] + [
                    (name, chance.choice(HOSTILE_USER_PROPERTIES[name]))
                ]
            case 4:
                topics = (*HOSTILE_TOPICS, *response_topics)
                return replace(found, response_topic=_publishable(chance.choice(topics)))
            case 5:
                return replace(
                    found, correlation_data=chance.randbytes(chance.choice((0, 1, 15, 17, 300, FIELD_BYTES)))
                )
            case 6:
                kinds = (JSON, JPEG, PNG, SAFETENSORS, "", "text/html; x", "c" * 60_000)
                return replace(found, content_type=chance.choice(kinds))
            case 7:
                return replace(found, expiry_s=chance.choice((None, 1, 2**32 - 1)))
            case _ if chance.random() < 0.02:
                user += OVERSIZED_USER_PROPERTIES
        return replace(found, user_properties=tuple(user))


def _publishable(topic: str) -> str:
    """Brokers end the connection of a client with a wildcard in a Response Topic; in `reply` they do not look."""
    return "" if "#" in topic or "+" in topic else topic


def _with_metadata(metadata: dict[str, str]) -> Result:
    found = Result(request_id=bytes(16), content=TensorContent({"values": from_numpy(np.array(1.0))}, {}))
    object.__setattr__(found, "content", TensorContent(found.content.tensors, metadata))  # type: ignore[union-attr]
    return found


def generated_messages(count: int) -> list[HostileMessage]:
    """What hypothesis makes up of property names and values of ours, and others, around any payload."""
    names = st.sampled_from(list(HOSTILE_USER_PROPERTIES)) | st.text(_LETTERS, max_size=8)
    values = st.sampled_from(
        [value for values in HOSTILE_USER_PROPERTIES.values() for value in values if len(value) < 500]
    )
    properties = st.builds(
        Properties,
        content_type=st.sampled_from(["", SAFETENSORS, JSON, JPEG]) | st.text(_LETTERS, max_size=10),
        correlation=st.binary(min_size=16, max_size=16) | st.binary(max_size=100),
        response_topic=st.sampled_from(["", "attacker/x"]),
        expiry_s=st.none() | st.integers(1, 0xFFFF_FFFF),
        user=st.lists(st.tuples(names, values | st.text(_LETTERS, max_size=12)), max_size=8).map(
            lambda user: (("sparse", "1"), *user)
        ),
    )
    payloads = st.binary(max_size=64) | st.recursive(
        st.none() | st.integers() | st.floats() | st.text(_LETTERS, max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(_LETTERS, max_size=5), inner, max_size=4),
    ).map(lambda value: json.dumps(value).encode())
    found: list[HostileMessage] = []

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(properties, payloads)
    def collect(properties: Properties, payload: bytes) -> None:
        found.append(HostileMessage(properties, payload))

    collect()
    return found


# No broker lets null characters and halves of surrogate pairs pass: sections 1.5.4.
_LETTERS = st.characters(exclude_categories=("Cs", "Cc"))
