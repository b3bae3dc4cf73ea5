"""A transport that speaks messages: encodes, cuts into chunks, assembles, and counts what it could not read."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from brokers.errors import TooLarge, WireError
from brokers.protocol.chunking import (
    CHUNK_BYTES,
    MESSAGE_LIMIT_BYTES,
    Assembler,
    ChunkHeader,
    MessageKey,
    chunk_error,
    split_into_chunks,
)
from brokers.protocol.codec import EncodedMessage, decode, encode
from brokers.protocol.messages import Message
from brokers.protocol.transport import Delivery, Properties, Transport, Will

log = logging.getLogger(__name__)

# What the head of a PUBLISH may need beside the payload: topic, properties, packet id.
HEADER_RESERVE_BYTES = 2048
# The head of a message is kept while its chunks come, of up to a thousand messages: it may not have a megabyte.
CHUNK_HEADER_LIMIT_BYTES = 8192
_EXPIRY_CHECK_S = 1.0

MessageHandler = Callable[[str, Message], None]
# What could not be read, and the properties it came with (they may say whom to tell).
MalformedHandler = Callable[[WireError, Properties], None]


class MessageChannel:
    """Messages to topics and from topics, over one transport, from one asyncio loop."""

    def __init__(
        self, transport: Transport, *, assembler: Assembler | None = None, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.transport = transport
        self._chunk_bytes = chunk_bytes
        self.counters: Counter[str] = Counter()
        self._assembler = Assembler() if assembler is None else assembler  # one without messages counts as false
        self._expiry: asyncio.Task[None] | None = None
        self._garbage_handlers: dict[str, MalformedHandler] = {}

    async def open(self, *, will: Will | None = None, timeout_s: float = 10.0) -> None:
        await self.transport.connect(will=will, timeout_s=timeout_s)
        self._expiry = asyncio.create_task(self._expire(), name="line-expiry")

    @property
    def is_open(self) -> bool:
        return self._expiry is not None

    async def close(self) -> None:
        if self._expiry:
            self._expiry.cancel()
            with suppress(asyncio.CancelledError):
                await self._expiry
            self._expiry = None
        await self.transport.close()

    async def subscribe(
        self,
        topic_filter: str,
        on_message: MessageHandler,
        on_malformed: MalformedHandler | None = None,
        *,
        qos: int = 0,
    ) -> None:
        """Have `on_message` called for each whole message, `on_garbage` for what breaks the protocol; neither blocks.

        `topic_filter` is one topic, shared or not: chunks of one message are looked for on the filter they came by.
        """

        def refuse(error: WireError, properties: Properties) -> None:
            self.counters[error.code] += 1
            log.warning("refused a message to %s: %s: %s", topic_filter, error.code, error)
            if on_malformed:
                on_malformed(error, properties)

        def handle(delivery: Delivery) -> None:
            try:
                payload = self._whole(topic_filter, delivery)
                if payload is None:
                    return
                message = decode(delivery.properties, payload)
            except WireError as error:
                refuse(error, delivery.properties)
                return
            self.counters["messages_in"] += 1
            on_message(delivery.topic, message)

        def place(topic: str, properties: Properties, length: int) -> memoryview | None:
            try:
                found = _chunk_of(topic_filter, properties)
            except WireError:  # told by `handle`, which gets the same properties with the payload
                return None
            try:
                return found and self._assembler.get_buffer(
                    *found, length, time.monotonic(), (topic_filter, properties)
                )
            except WireError as error:
                refuse(error, properties)
                return None

        self._garbage_handlers[topic_filter] = refuse
        await self.transport.subscribe(topic_filter, handle, qos=qos, buffer_provider=place)

    async def send(self, topic: str, message: Message) -> None:
        """Send a message, in as many chunks as it needs; returns when the operating system has all its bytes.

        Raises `TooLarge`, before a byte is sent, for what no receiver would take.
        """
        await self.send_packet(topic, encode(message))

    async def send_packet(self, topic: str, packet: EncodedMessage) -> None:
        total_bytes = packet.nbytes
        limit_bytes = self.transport.limits.max_packet_bytes - HEADER_RESERVE_BYTES
        if total_bytes > MESSAGE_LIMIT_BYTES:
            raise TooLarge("the message", MESSAGE_LIMIT_BYTES, total_bytes)
        if limit_bytes <= 0:
            raise TooLarge("the smallest packet", self.transport.limits.max_packet_bytes, HEADER_RESERVE_BYTES)
        chunk_bytes = min(self._chunk_bytes, limit_bytes)
        self.counters["messages_out"] += 1
        if total_bytes <= chunk_bytes:
            await self.transport.publish(topic, packet.buffers, packet.properties)
            return
        pieces = tuple(memoryview(piece).cast("B") for piece in packet.buffers)
        user = packet.properties.user_properties
        # A request may pass one worker twice, on a detour that comes back: its two messages must not be taken for one.
        named = (*user, ("message", secrets.token_hex(4)))
        for chunk, part in split_into_chunks(pieces, chunk_bytes):
            await self.transport.publish(
                topic, part, replace(packet.properties, user_properties=(*named, ("chunk", str(chunk))))
            )

    def _whole(self, topic_filter: str, delivery: Delivery) -> memoryview | None:
        """The payload of a whole message; None while chunks of it are missing."""
        found = _chunk_of(topic_filter, delivery.properties)
        if found is None:
            return delivery.payload
        return self._assembler.add_chunk(
            *found, delivery.payload, time.monotonic(), (topic_filter, delivery.properties)
        )

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRY_CHECK_S)
            for (topic_filter, properties), error in self._assembler.expire(time.monotonic()):
                self._garbage_handlers[topic_filter](error, properties)


def _chunk_of(topic_filter: str, properties: Properties) -> tuple[MessageKey, ChunkHeader] | None:
    """The message that a chunk belongs to, and where in it; None for a whole message."""
    user = dict(properties.user_properties)
    text = user.get("chunk")
    if text is None:
        return None
    head_bytes = len(properties.correlation_data) + len(properties.response_topic) + len(properties.content_type)
    head_bytes += sum(len(name) + len(value) for name, value in properties.user_properties)
    if head_bytes > CHUNK_HEADER_LIMIT_BYTES:
        raise chunk_error(f"the properties of a chunk may have {CHUNK_HEADER_LIMIT_BYTES} bytes, its have {head_bytes}")
    names = (user.get(name) for name in ("message", "kind", "attempt"))
    key = (topic_filter, properties.correlation_data, properties.response_topic, *names)
    return key, ChunkHeader.parse(text)
