"""A client of the protocol that uses no code of Sparse: paho, JSON, and docs/protocol.md."""

from __future__ import annotations

import json
import queue
import secrets
import struct
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

WAIT_S = 60.0


@dataclass
class ReceivedMessage:
    """A received message; the payload is assembled from its chunks."""

    topic: str
    payload: bytes
    user_properties: dict[str, str]
    correlation_data: bytes
    content_type: str
    response_topic: str
    retain: bool


@dataclass
class ForeignClient:
    """Receives all messages on its topics, and assembles chunks as docs/protocol.md says."""

    address: str
    topics: list[tuple[str, int]]
    _received: queue.Queue[ReceivedMessage] = field(default_factory=queue.Queue)
    _chunks: dict[Any, bytes] = field(default_factory=dict)
    _skipped: list[ReceivedMessage] = field(default_factory=list)

    def __enter__(self) -> ForeignClient:
        url = urlsplit(self.address)
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_message = self._on_message
        subscribed: queue.Queue[None] = queue.Queue()
        self._client.on_subscribe = lambda *_: subscribed.put(None)
        self._client.connect(url.hostname or "", url.port or 1883)
        self._client.loop_start()
        for topic, qos in self.topics:
            self._client.subscribe(topic, qos)
            subscribed.get(timeout=WAIT_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        user_properties: dict[str, str] | None = None,
        correlation_data: bytes = b"",
        response_topic: str = "",
        content_type: str = "",
        qos: int = 0,
    ) -> None:
        properties: Any = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        if correlation_data:
            properties.CorrelationData = correlation_data
        if response_topic:
            properties.ResponseTopic = response_topic
        if content_type:
            properties.ContentType = content_type
        if user_properties:
            properties.UserProperty = list(user_properties.items())
        self._client.publish(topic, payload, qos, properties=properties).wait_for_publish(WAIT_S)

    def receive(self, kind: str | None = None) -> ReceivedMessage:
        """The next message, or the next of a kind: others are returned by later calls."""
        for message in self._skipped:
            if kind is None or message.user_properties.get("kind") == kind:
                self._skipped.remove(message)
                return message
        end_s = time.monotonic() + WAIT_S
        while True:
            message = self._received.get(timeout=max(0.001, end_s - time.monotonic()))
            if kind is None or message.user_properties.get("kind") == kind:
                return message
            self._skipped.append(message)

    def is_silent(self, for_s: float = 0.3) -> bool:
        try:
            self._received.get(timeout=for_s)
        except queue.Empty:
            return True
        return False

    def _on_message(self, client: Client, userdata: Any, message: MQTTMessage) -> None:
        properties = message.properties
        user = dict(getattr(properties, "UserProperty", []))
        correlation = getattr(properties, "CorrelationData", b"")
        response_topic = getattr(properties, "ResponseTopic", "")
        payload: bytes | None = bytes(message.payload)
        if "chunk" in user:
            names = (user.get(name) for name in ("message", "kind", "attempt"))
            key = (message.topic, correlation, response_topic, *names)
            payload = self._assemble(key, user["chunk"], bytes(message.payload))
        if payload is not None:
            content_type = getattr(properties, "ContentType", "")
            self._received.put(
                ReceivedMessage(message.topic, payload, user, correlation, content_type, response_topic, message.retain)
            )

    def _assemble(self, key: Any, place: str, part: bytes) -> bytes | None:
        offset, total = map(int, place.split("/"))
        so_far = self._chunks.get(key, b"")
        assert offset == len(so_far), "chunks come in order"
        self._chunks[key] = so_far + part
        return self._chunks.pop(key) if len(self._chunks[key]) == total else None


def encode_tensor_body(name: str, values: list[float]) -> bytes:
    """A safetensors body with one tensor of float32."""
    entry = {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, 4 * len(values)]}
    header = json.dumps({name: entry}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack(f"<{len(values)}f", *values)


def decode_tensor_body(body: bytes) -> tuple[dict[str, list[float]], dict[str, str]]:
    """The float32 tensors of a body, flat, and its metadata."""
    (length,) = struct.unpack_from("<Q", body)
    header = json.loads(body[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    data = body[8 + length :]
    tensors = {}
    for name, entry in header.items():
        assert entry["dtype"] == "F32"
        begin, end = entry["data_offsets"]
        tensors[name] = list(struct.unpack(f"<{(end - begin) // 4}f", data[begin:end]))
    return tensors, metadata


def random_request_id() -> bytes:
    return secrets.token_bytes(16)
