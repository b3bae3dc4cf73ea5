"""`Transport` within one process, without sockets.

The broker object keeps retained messages, wills and shared subscriptions (round robin), but no sessions. Publications
are delivered in order on the next iteration of the loop, as copies: no receiver sees a buffer of the sender.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from brokers.errors import BrokerUnreachable, Disconnected, TooLarge
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES, encode_publish_header
from brokers.mqtt.subscriptions import Subscription, Subscriptions, filter_matches, split_shared_filter
from brokers.protocol.transport import BrokerLimits, Buffer, BufferProvider, Delivery, Handler, Properties, Will

log = logging.getLogger(__name__)


class MemoryBroker:
    """The broker of the `MemoryTransport`s of one loop."""

    def __init__(self, name: str = "hub", *, max_packet_bytes: int = MAX_REMAINING_BYTES) -> None:
        self.address = f"memory://{name}"
        self.limits = BrokerLimits(max_packet_bytes)
        self.is_up = True
        self._clients: list[MemoryTransport] = []
        self._retained: dict[str, Delivery] = {}
        self._turns: dict[str, itertools.count[int]] = {}  # shared filter -> index of the next member

    def stop(self) -> None:
        """Go down like a killed broker: no wills, nothing kept. Clients wait until `start`."""
        self.is_up = False
        self._retained.clear()
        self._turns.clear()

    def start(self) -> None:
        """Come up again; clients that were connected reconnect."""
        self.is_up = True
        for client in tuple(self._clients):
            client.on_broker_restart()

    def kill_client(self, client: MemoryTransport) -> None:
        """End a client as if its process had been killed: it sends nothing more, and its will is published."""
        self.detach(client)
        client.on_killed()
        if client.will is not None:
            self.route(Delivery(client.will.topic, Properties(), memoryview(client.will.payload), client.will.retain))

    def attach(self, client: MemoryTransport) -> None:
        if client not in self._clients:
            self._clients.append(client)

    def detach(self, client: MemoryTransport) -> None:
        with contextlib.suppress(ValueError):
            self._clients.remove(client)

    def route(self, publication: Delivery, qos: int = 1) -> None:
        """Deliver a publication to its subscribers, and retain it if it asks for that (MQTT 5.0 section 3.3.1.3)."""
        if publication.retain and publication.payload.nbytes:
            copy = memoryview(bytes(publication.payload))
            self._retained[publication.topic] = replace(publication, payload=copy)
        elif publication.retain:
            self._retained.pop(publication.topic, None)
        live = replace(publication, retain=False)
        groups: dict[str, list[tuple[MemoryTransport, Subscription]]] = {}
        for client in self._clients:
            for subscription in client.matching(publication.topic):
                if split_shared_filter(subscription.topic_filter)[0]:
                    groups.setdefault(subscription.topic_filter, []).append((client, subscription))
                else:
                    client.receive(live, subscription, qos)
        for shared_filter, members in groups.items():
            turn = next(self._turns.setdefault(shared_filter, itertools.count()))
            client, subscription = members[turn % len(members)]
            client.receive(live, subscription, qos)

    def send_retained(self, client: MemoryTransport, subscription: Subscription) -> None:
        """Deliver the retained messages for a new subscription; a shared one gets none (section 4.8.2)."""
        if split_shared_filter(subscription.topic_filter)[0]:
            return
        for retained in tuple(self._retained.values()):
            if filter_matches(subscription.topic_filter, retained.topic):
                client.receive(retained, subscription, 1)


class MemoryTransport:
    """A `Transport` to a `MemoryBroker`."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self.will: Will | None = None
        self._subscriptions = Subscriptions()
        self._callbacks: list[Callable[[], Awaitable[None]]] = []
        self._callback_tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()  # set when the broker may be up, or this transport closed
        self._connected = False
        self._closed = False

    @property
    def address(self) -> str:
        return self._broker.address

    @property
    def limits(self) -> BrokerLimits:
        return self._broker.limits

    @property
    def is_connected(self) -> bool:
        return self._connected and self._broker.is_up and not self._closed

    async def connect(self, *, will: Will | None = None, timeout_s: float = 10.0) -> None:
        if not self._broker.is_up:
            raise BrokerUnreachable(self.address, "the broker is down")
        self.will = will
        self._connected = True
        self._broker.attach(self)
        self._changed.set()
        self._request_retained()

    async def subscribe(
        self,
        topic_filter: str,
        handler: Handler,
        *,
        qos: int = 0,
        buffer_provider: BufferProvider | None = None,
        manual_ack: bool = False,
    ) -> None:
        subscription = Subscription(topic_filter, handler, qos, buffer_provider, manual_ack)
        self._subscriptions.add(subscription)
        if self._connected:
            await self._wait_connected()
            self._broker.send_retained(self, subscription)

    async def unsubscribe(self, topic_filter: str) -> None:
        self._subscriptions.remove(topic_filter)

    async def publish(
        self,
        topic: str,
        payload: Sequence[Buffer] | Buffer = b"",
        properties: Properties = Properties(),
        *,
        qos: int = 0,
        retain: bool = False,
    ) -> None:
        buffers = (payload,) if isinstance(payload, bytes | bytearray | memoryview) else payload
        payload_bytes = sum(memoryview(buffer).nbytes for buffer in buffers)
        header = encode_publish_header(topic, properties, payload_bytes, qos=qos, retain=retain, packet_id=1)
        limit = self.limits.max_packet_bytes
        if len(header) + payload_bytes > limit:
            raise TooLarge(f"publication to {topic!r}", limit, len(header) + payload_bytes)
        await self._wait_connected()
        self._broker.route(Delivery(topic, properties, memoryview(b"".join(buffers)), retain), qos)
        await asyncio.sleep(0)  # so that receivers run even if the sender waits for nothing else

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        self._callbacks.append(callback)

    async def close(self) -> None:
        self._closed = True
        self._changed.set()
        self._broker.detach(self)
        for task in tuple(self._callback_tasks):
            task.cancel()
        if self._callback_tasks:
            await asyncio.wait(self._callback_tasks)

    # Calls from the broker --------------------------------------------------------------------------------------------

    def matching(self, topic: str) -> tuple[Subscription, ...]:
        return self._subscriptions.matching(topic)

    def receive(self, delivery: Delivery, subscription: Subscription, qos: int) -> None:
        """Deliver on the next iteration of the loop. At QoS 1 a handler may acknowledge, which has no effect."""
        if qos and subscription.qos and subscription.manual_ack:
            delivery = replace(delivery, ack=lambda: None)
        asyncio.get_running_loop().call_soon(self._deliver, delivery, subscription)

    def on_killed(self) -> None:
        self._closed = True
        self._changed.set()

    def on_broker_restart(self) -> None:
        self._request_retained()
        self._changed.set()
        task = asyncio.create_task(self._run_callbacks(), name=f"reconnected to {self.address}")
        self._callback_tasks.add(task)
        task.add_done_callback(self._callback_tasks.discard)

    async def _run_callbacks(self) -> None:
        for callback in self._callbacks:
            try:
                await callback()
            except Exception:
                log.exception("a callback after the reconnection to %s failed", self.address)

    # Internal ---------------------------------------------------------------------------------------------------------

    def _request_retained(self) -> None:
        for subscription in self._subscriptions:
            self._broker.send_retained(self, subscription)

    async def _wait_connected(self) -> None:
        while not self._closed and not (self._connected and self._broker.is_up):
            self._changed.clear()
            await self._changed.wait()
        if self._closed:
            raise Disconnected(self.address, "it was closed")

    def _deliver(self, delivery: Delivery, subscription: Subscription) -> None:
        if self._closed or subscription.topic_filter not in self._subscriptions:
            return
        length = delivery.payload.nbytes
        buffer = subscription.get_buffer(delivery.topic, delivery.properties, length) if length else None
        payload = memoryview(bytearray(length)) if buffer is None else buffer
        payload[:] = delivery.payload
        subscription.deliver(replace(delivery, payload=payload))
