"""The ingress gateway: samples from any MQTT client that publishes to `sparse/{site}/ingress/{source}`.

With `keep = "all"` the gateway has a persistent session at the broker, named for its site, pipeline and source. The
broker keeps a QoS 1 message until its result was published and the gateway has acknowledged it, also while no gateway
is running. Only one gateway of a name may run: two would take the session from each other repeatedly.
"""

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from brokers.config.pipeline_file import Pipeline
from brokers.errors import WireError
from brokers.mqtt.client import MqttTransport, create_transport
from brokers.process.image_decode import decode_picture
from brokers.protocol.messages import JPEG, PNG, SAFETENSORS, decode_content, detect_content_type
from brokers.protocol.topics import ingress_topic, last_level
from brokers.protocol.traceparent import TRACEPARENT, parse_traceparent
from brokers.protocol.transport import Delivery, Transport
from sources.inputs.source import Sample, SampleBuffer

log = logging.getLogger(__name__)

# Clients may invent source names and publish malformed messages: neither may use unbounded memory.
SOURCES_LIMIT = 10_000
REJECTIONS_LIMIT = 64
NAME_LIMIT_BYTES = 256

# How long the broker keeps messages while no gateway is running.
SESSION_EXPIRY_S = 24 * 3600

# Publishes a rejection on the results topic of a source; returns whether the message may be acknowledged.
RejectCallback = Callable[[str, dict[str, Any]], Awaitable[bool]]


def create_session_transport(pipeline: Pipeline, address: str) -> MqttTransport:
    """A transport with the gateway's persistent session, not yet connected."""
    name = f"gateway.{pipeline.source.site}.{pipeline.name}.{pipeline.source.name}"
    return create_transport(address, client_id=name, session_expiry_s=SESSION_EXPIRY_S)


class IngressGateway:
    """Turns messages on a site's ingress topics into samples; `reject` answers those that cannot be decoded.

    `durable`: `transport` has a persistent session and is owned by the gateway; each sample must be acknowledged.
    """

    def __init__(
        self, transport: Transport, site: str, buffer: SampleBuffer, reject: RejectCallback, *, durable: bool = False
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._next_index: OrderedDict[str, int] = OrderedDict()  # by source, the least recently active one first
        self._first_index = 0  # of a source that is new or was forgotten
        self._transport = transport
        self._topic = ingress_topic(site)
        self._buffer = buffer
        self._reject = reject
        self._durable = durable
        self._draining = False
        self._rejections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._transport.subscribe(self._topic, self._on_delivery, qos=1, manual_ack=self._durable)
        if self._durable:  # the broker delivers what it has kept at once, so subscribe first
            await self._transport.connect()

    async def drain(self) -> None:
        """Accept no more messages; samples in the buffer are still processed."""
        self._draining = True
        if not self._durable:  # else the broker keeps messages for the next gateway
            await self._transport.unsubscribe(self._topic)
        self._buffer.close()

    async def stop(self) -> None:
        """Close the session's connection, after the last acknowledgement."""
        if self._durable:
            await self._transport.close()

    def _on_delivery(self, delivery: Delivery) -> None:
        if self._draining:
            return
        source = last_level(delivery.topic)
        if delivery.retain:  # an old message, which would be delivered again after each reconnection
            self._ignore("retained", delivery)
        elif len(source.encode()) > NAME_LIMIT_BYTES:
            log.warning("ignored a message: the name of its source is longer than %d bytes", NAME_LIMIT_BYTES)
            self._ignore("long_name", delivery)
        else:
            index = self._count_sample(source)
            try:
                self._buffer.put_nowait(sample_from_delivery(source, index, delivery))
            except WireError as error:
                self._start_rejection(source, index, error, delivery)

    def _ignore(self, reason: str, delivery: Delivery) -> None:
        self.counters[reason] += 1
        if delivery.ack:
            delivery.ack()

    def _count_sample(self, source: str) -> int:
        """The index of this sample among those of its source.

        It never repeats: once a source was forgotten, sources that are not known begin above its last index.
        """
        index = self._next_index.pop(source, self._first_index)
        self._next_index[source] = index + 1
        if len(self._next_index) > SOURCES_LIMIT:
            _, forgotten_index = self._next_index.popitem(last=False)
            self._first_index = max(self._first_index, forgotten_index)
        return index

    def _start_rejection(self, source: str, index: int, error: WireError, delivery: Delivery) -> None:
        self.counters["refused"] += 1
        log.warning("rejected a message of source %s: %s: %s", source, error.code, error)
        if len(self._rejections) >= REJECTIONS_LIMIT and delivery.ack is None:
            return

        async def reject() -> None:
            rejection = {"source": source, "index": index, "error": error.code, "reason": str(error)}
            if await self._reject(source, rejection) and delivery.ack:
                delivery.ack()

        task = asyncio.get_running_loop().create_task(reject(), name=f"reject-{source}")
        self._rejections.add(task)
        task.add_done_callback(self._rejections.discard)


def sample_from_delivery(source: str, index: int, delivery: Delivery) -> Sample:
    """The sample in an ingress message. Raises `WireError` for tensors that cannot be unpacked.

    Pictures stay encoded, and are decoded by the stage: it refuses those that are damaged.
    """
    content_type = detect_content_type(delivery.properties.content_type, delivery.payload)
    if content_type == SAFETENSORS:
        decode_content(content_type, delivery.payload)
    data = bytes(delivery.payload)
    return Sample(
        source,
        index,
        data,
        content_type,
        load_image=(lambda: decode_picture(data)) if content_type in (JPEG, PNG) else None,
        ack=delivery.ack,
        redelivered=delivery.redelivered,
        trace=parse_traceparent(dict(delivery.properties.user_properties).get(TRACEPARENT)),
    )
