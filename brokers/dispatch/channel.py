"""Messages over a transport: encoded, split into chunks, reassembled; malformed ones are counted and reported."""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

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

HEADER_RESERVE_BYTES = 2048  # bytes of a PUBLISH beside its payload: topic, properties, packet id
# The properties of a chunked message are kept until it is whole, for up to a thousand messages at once.
CHUNK_HEADER_LIMIT_BYTES = 8192
_EXPIRY_CHECK_S = 1.0

MessageHandler = Callable[[str, Message], None]  # called with the topic
# Called with the properties of the malformed message, which may name the sender.
MalformedHandler = Callable[[WireError, Properties], None]


class MessageChannel:
    """Sends and receives messages over one transport, on one event loop.

    `counters` has `messages_in`, `messages_out`, and the malformed messages by error code.
    """

    def __init__(
        self, transport: Transport, *, assembler: Assembler | None = None, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self.transport = transport
        self.counters: Counter[str] = Counter()
        self._chunk_bytes = chunk_bytes
        self._assembler = Assembler() if assembler is None else assembler  # an empty one counts as false
        self._expiry: asyncio.Task[None] | None = None
        self._malformed_handlers: dict[str, MalformedHandler | None] = {}  # by topic filter

    async def open(self, *, will: Will | None = None, timeout_s: float = 10.0) -> None:
        await self.transport.connect(will=will, timeout_s=timeout_s)
        self._expiry = asyncio.create_task(self._expire_assemblies(), name="channel-expiry")

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
        """Have `on_message` called for each whole message, `on_malformed` for each violation of the protocol.

        Neither may block. `topic_filter` matches one topic, shared or not: chunks are reassembled by filter.
        """
        self._malformed_handlers[topic_filter] = on_malformed
        await self.transport.subscribe(
            topic_filter,
            partial(self._on_delivery, topic_filter, on_message),
            qos=qos,
            buffer_provider=partial(self._get_buffer, topic_filter),
        )

    async def send(self, topic: str, message: Message) -> None:
        """Send a message, in as many chunks as it needs; return when the operating system has all its bytes.

        Raises `TooLarge`, before a byte is sent, for a message that no receiver would accept.
        """
        await self.send_packet(topic, encode(message))

    async def send_packet(self, topic: str, packet: EncodedMessage) -> None:
        """Send an encoded message; as `send`."""
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
        buffers = tuple(memoryview(buffer).cast("B") for buffer in packet.buffers)
        # A random name: a request may pass one worker twice, and the chunks of its two messages must not be mixed.
        user = (*packet.properties.user_properties, ("message", secrets.token_hex(4)))
        for header, parts in split_into_chunks(buffers, chunk_bytes):
            properties = replace(packet.properties, user_properties=(*user, ("chunk", str(header))))
            await self.transport.publish(topic, parts, properties)

    def _on_delivery(self, topic_filter: str, on_message: MessageHandler, delivery: Delivery) -> None:
        try:
            chunk = _parse_chunk(topic_filter, delivery.properties)
            payload: memoryview | None = delivery.payload
            if chunk is not None:
                context = (topic_filter, delivery.properties)
                payload = self._assembler.add_chunk(*chunk, delivery.payload, time.monotonic(), context)
            if payload is None:
                return  # chunks of the message are missing
            message = decode(delivery.properties, payload)
        except WireError as error:
            self._reject(topic_filter, error, delivery.properties)
            return
        self.counters["messages_in"] += 1
        on_message(delivery.topic, message)

    def _get_buffer(self, topic_filter: str, topic: str, properties: Properties, length: int) -> memoryview | None:
        """The buffer that a chunk is received into; None for a new buffer."""
        try:
            chunk = _parse_chunk(topic_filter, properties)
        except WireError:  # reported by `_on_delivery`, which gets the same properties
            return None
        if chunk is None:
            return None
        try:
            return self._assembler.get_buffer(*chunk, length, time.monotonic(), (topic_filter, properties))
        except WireError as error:
            self._reject(topic_filter, error, properties)
            return None

    def _reject(self, topic_filter: str, error: WireError, properties: Properties) -> None:
        self.counters[error.code] += 1
        log.warning("rejected a message on %s: %s: %s", topic_filter, error.code, error)
        if on_malformed := self._malformed_handlers[topic_filter]:
            on_malformed(error, properties)

    async def _expire_assemblies(self) -> None:
        while True:
            await asyncio.sleep(_EXPIRY_CHECK_S)
            for (topic_filter, properties), error in self._assembler.expire(time.monotonic()):
                self._reject(topic_filter, error, properties)


def _parse_chunk(topic_filter: str, properties: Properties) -> tuple[MessageKey, ChunkHeader] | None:
    """The message that a chunk belongs to, and its place in it; None for a whole message."""
    user = dict(properties.user_properties)
    text = user.get("chunk")
    if text is None:
        return None
    header_bytes = len(properties.correlation_data) + len(properties.response_topic) + len(properties.content_type)
    header_bytes += sum(len(name) + len(value) for name, value in properties.user_properties)
    if header_bytes > CHUNK_HEADER_LIMIT_BYTES:
        raise chunk_error(f"the properties of a chunk have {header_bytes} bytes, at most {CHUNK_HEADER_LIMIT_BYTES}")
    names = (user.get(name) for name in ("message", "kind", "attempt"))
    key = (topic_filter, properties.correlation_data, properties.response_topic, *names)
    return key, ChunkHeader.parse(text)
