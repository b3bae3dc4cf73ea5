"""The ingress gateway: any MQTT client is a camera: what it sends to `sparse/{site}/ingress/{source}` is worked on.

Whoever asks for completeness (`keep = "all"`) gets a gateway with a session of its own at the broker, under the name of
its site, pipeline and source: the broker keeps what is published at QoS 1 until its answer has been published too,
through the end of this process and until the next of its name comes. One gateway of a name at a time: two would take
the session from each other, again and again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from brokers.config.pipeline_file import Pipeline
from brokers.errors import WireError
from brokers.mqtt.client import MqttTransport
from brokers.mqtt.client_identity import create_transport
from brokers.protocol.media_type import decode_content, detect_content_type
from brokers.protocol.messages import JPEG, PNG, SAFETENSORS
from brokers.protocol.topics import ingress_topic, last_level
from brokers.protocol.traceparent import TRACEPARENT, parse_traceparent
from brokers.protocol.transport import Delivery, Transport
from sources.inputs.sample import Sample, decode_image
from sources.inputs.sample_buffer import SampleBuffer

log = logging.getLogger(__name__)

# Whoever may publish may invent names of sources, and send what is none: neither may cost memory without end.
SOURCES_LIMIT = 10_000
REFUSALS_LIMIT = 64
NAME_LIMIT_BYTES = 256

# How long the broker keeps what comes for a gateway that is away.
SESSION_EXPIRY_S = 24 * 3600

# Tells a source why; returns whether that is done with.
RejectCallback = Callable[[str, dict[str, Any]], Awaitable[bool]]


def create_session_transport(pipeline: Pipeline, address: str) -> MqttTransport:
    """The line of a complete gateway, not yet connected."""
    name = f"gateway.{pipeline.source.site}.{pipeline.name}.{pipeline.source.name}"
    return create_transport(address, client_id=name, session_expiry_s=SESSION_EXPIRY_S)


class IngressGateway:
    """Turns what is published to a site's ingress into samples; what is none is answered on the results topic.

    `complete`: the transport is one with a session, and the gateway's own; each sample is to be settled.
    """

    def __init__(
        self, transport: Transport, site: str, intake: SampleBuffer, refuse: RejectCallback, *, durable: bool = False
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._next_index: OrderedDict[str, int] = OrderedDict()
        self._transport = transport
        self._site = site
        self._intake = intake
        self._refuse = refuse
        self._complete = durable
        self._closed = False
        self._refusals: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._transport.subscribe(ingress_topic(self._site), self._heard, qos=1, manual_ack=self._complete)
        if self._complete:  # what the broker has kept comes at once
            await self._transport.connect()

    async def drain(self) -> None:
        """Take no more; those that wait in the intake are still worked on."""
        self._closed = True
        if not self._complete:  # else the broker is to keep what comes from now on
            await self._transport.unsubscribe(ingress_topic(self._site))
        self._intake.close()

    async def stop(self) -> None:
        """Say goodbye, once what was settled is all that will be."""
        if self._complete:
            await self._transport.close()

    def _heard(self, delivery: Delivery) -> None:
        if self._closed:
            return
        if delivery.retain:
            # An old frame that the broker kept: it would come again at each reconnection.
            self._pass_over("retained", delivery)
            return
        source = last_level(delivery.topic)
        if len(source.encode()) > NAME_LIMIT_BYTES:
            log.warning("passed over a frame: the name of its source has more than %d bytes", NAME_LIMIT_BYTES)
            self._pass_over("long_name", delivery)
            return
        index = self._index(source)
        try:
            self._intake.put_nowait(sample_from_delivery(source, index, delivery))
        except WireError as error:
            self.counters["refused"] += 1
            log.warning("refused a frame of %s: %s: %s", source, error.code, error)
            if len(self._refusals) >= REFUSALS_LIMIT and delivery.ack is None:
                return
            refusal = {"source": source, "index": index, "error": error.code, "reason": str(error)}
            telling = self._tell(source, refusal, delivery.ack)
            task = asyncio.get_running_loop().create_task(telling, name=f"refuse-{source}")
            self._refusals.add(task)
            task.add_done_callback(self._refusals.discard)

    def _pass_over(self, why: str, delivery: Delivery) -> None:
        self.counters[why] += 1
        if delivery.ack:
            delivery.ack()

    def _index(self, source: str) -> int:
        """The number of this sample among those of its source."""
        index = self._next_index.pop(source, 0)
        self._next_index[source] = index + 1
        if len(self._next_index) > SOURCES_LIMIT:
            self._next_index.popitem(last=False)
        return index

    async def _tell(self, source: str, refusal: dict[str, Any], settle: Callable[[], None] | None) -> None:
        if await self._refuse(source, refusal) and settle:
            settle()


def sample_from_delivery(source: str, index: int, delivery: Delivery) -> Sample:
    """The sample in a publication. It stays the bytes it came as: a picture is decoded by the stage that takes it."""
    content_type = detect_content_type(delivery.properties.content_type, delivery.payload)
    if content_type == SAFETENSORS:
        decode_content(content_type, delivery.payload)  # what is broken is refused here, where its source is known
    data = bytes(delivery.payload)
    picture = (lambda: decode_image(data)) if content_type in (JPEG, PNG) else None
    trace = parse_traceparent(dict(delivery.properties.user_properties).get(TRACEPARENT))
    settle, again = delivery.ack, delivery.redelivered
    return Sample(source, index, data, content_type, picture, ack=settle, redelivered=again, trace=trace)
