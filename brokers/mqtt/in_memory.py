"""The transport within one process: the same promise, no sockets. For tests, and for pipelines in one process.

A hub keeps what a broker keeps: retained publications, wills, sessions, shared groups dealt in turn. Publications are
handed over on the loop's next turn, in order, as copies: nobody sees a buffer of the sender.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from brokers.errors import BrokerUnreachable, Disconnected, TooLarge
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES, encode_publish_header
from brokers.mqtt.topic_filters import Subscription, Subscriptions, filter_matches, split_shared_filter
from brokers.protocol.transport import BrokerLimits, Buffer, BufferProvider, Delivery, Handler, Properties, Will

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Kept:
    """A publication that a session holds until it is settled."""

    delivery: Delivery
    settled: bool = False


@dataclass(eq=False, slots=True)
class _Session:
    """What a hub keeps for a client of one name, there or away."""

    filters: dict[str, int] = field(default_factory=dict)  # topic filter -> QoS
    kept: list[_Kept] = field(default_factory=list)
    client: MemoryTransport | None = None

    def wants(self, topic: str) -> bool:
        return any(qos and filter_matches(each, topic) for each, qos in self.filters.items())

    def settle(self, kept: _Kept) -> None:
        """In order, as MQTT has it: what came before must be settled too."""
        kept.settled = True
        while self.kept and self.kept[0].settled:
            self.kept.pop(0)


class MemoryBroker:
    """What a broker keeps, for the transports of one loop."""

    def __init__(self, name: str = "hub", *, max_packet_bytes: int = MAX_REMAINING_BYTES) -> None:
        self.address = f"memory://{name}"
        self.limits = BrokerLimits(max_packet_bytes)
        self.is_up = True
        self._clients: list[MemoryTransport] = []
        self._retained: dict[str, Delivery] = {}
        self._turns: dict[str, itertools.count[int]] = {}
        self._sessions: dict[str, _Session] = {}

    def stop(self) -> None:
        """Go down as a broker does that is killed: no wills, nothing kept; clients wait until `start`."""
        self.is_up = False
        self._retained.clear()
        self._turns.clear()
        self._sessions.clear()

    def start(self) -> None:
        """Come up again: every client that was connected reconnects."""
        self.is_up = True
        for client in self._clients:
            client.on_broker_restart()

    def kill_client(self, client: MemoryTransport) -> None:
        """Lose one client as when its process is killed: its will is published."""
        self.detach(client)
        if client.will is not None:
            self.route(Delivery(client.will.topic, Properties(), memoryview(client.will.payload), client.will.retain))

    def attach(self, client: MemoryTransport) -> None:
        if client not in self._clients:
            self._clients.append(client)
        if client.session_name:
            client.session = self._sessions.setdefault(client.session_name, _Session())
            client.session.client = client

    def detach(self, client: MemoryTransport) -> None:
        with contextlib.suppress(ValueError):
            self._clients.remove(client)
        if client.session is not None and client.session.client is client:
            client.session.client = None

    def route(self, publication: Delivery, qos: int = 1) -> None:
        """Give one publication to everyone it is for; `retain` asks to keep it (MQTT 5.0 section 3.3.1.3)."""
        if publication.retain and publication.payload.nbytes:
            kept = memoryview(bytes(publication.payload))
            self._retained[publication.topic] = replace(publication, payload=kept)
        elif publication.retain:
            self._retained.pop(publication.topic, None)
        live = replace(publication, retain=False)
        for session in self._sessions.values():
            if qos and session.client is None and session.wants(publication.topic):
                session.kept.append(_Kept(live))
        groups: dict[str, list[tuple[MemoryTransport, Subscription]]] = {}
        for client in self._clients:
            for each in client.matching(publication.topic):
                if split_shared_filter(each.topic_filter)[0]:
                    groups.setdefault(each.topic_filter, []).append((client, each))
                else:
                    client.receive(live, each, qos)
        for name, members in groups.items():
            turn = next(self._turns.setdefault(name, itertools.count()))
            client, chosen = members[turn % len(members)]
            client.receive(live, chosen, qos)

    def send_retained(self, client: MemoryTransport, subscription: Subscription) -> None:
        """Give a new subscription what is retained for it; a shared one gets nothing (section 4.8.2)."""
        if split_shared_filter(subscription.topic_filter)[0]:
            return
        for kept in tuple(self._retained.values()):
            if filter_matches(subscription.topic_filter, kept.topic):
                client.receive(kept, subscription, 1)


class MemoryTransport:
    """A `Transport` to a hub of this process; one with a `session` finds what was kept under this name."""

    def __init__(self, hub: MemoryBroker, *, session_name: str = "") -> None:
        self._hub = hub
        self.session_name = session_name
        self.session: _Session | None = None
        self._subscriptions = Subscriptions()
        self._callbacks: list[Callable[[], Awaitable[None]]] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._standing = asyncio.Event()
        self._connected = False
        self._closed = False
        self.will: Will | None = None

    @property
    def address(self) -> str:
        return self._hub.address

    @property
    def limits(self) -> BrokerLimits:
        return self._hub.limits

    @property
    def is_connected(self) -> bool:
        return self._connected and self._hub.is_up and not self._closed

    async def connect(self, *, will: Will | None = None, timeout_s: float = 10.0) -> None:
        if not self._hub.is_up:
            raise BrokerUnreachable(self.address, "the hub is down")
        self.will = will
        self._connected = True
        self._hub.attach(self)
        self._standing.set()
        self._resume()

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
            await self._stand()
            if self.session is not None:
                self.session.filters[topic_filter] = qos
            self._hub.send_retained(self, subscription)

    async def unsubscribe(self, topic_filter: str) -> None:
        self._subscriptions.remove(topic_filter)
        if self.session is not None:
            self.session.filters.pop(topic_filter, None)

    async def publish(
        self,
        topic: str,
        payload: Sequence[Buffer] | Buffer = b"",
        properties: Properties = Properties(),
        *,
        qos: int = 0,
        retain: bool = False,
    ) -> None:
        given = (payload,) if isinstance(payload, bytes | bytearray | memoryview) else payload
        payload_bytes = sum(memoryview(piece).nbytes for piece in given)
        head = encode_publish_header(topic, properties, payload_bytes, qos=qos, retain=retain, packet_id=1)
        limit = self.limits.max_packet_bytes
        if len(head) + payload_bytes > limit:
            raise TooLarge(f"publication to {topic!r}", limit, len(head) + payload_bytes)
        await self._stand()
        self._hub.route(Delivery(topic, properties, memoryview(b"".join(given)), retain), qos)
        await asyncio.sleep(0)  # so that a sender that never waits lets receivers run

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        self._callbacks.append(callback)

    async def close(self) -> None:
        self._closed = True
        self._standing.set()
        self._hub.detach(self)
        for task in tuple(self._calls):
            task.cancel()
        if self._calls:
            await asyncio.wait(self._calls)

    # What the hub calls -------------------------------------------------------------------------------------------

    def matching(self, topic: str) -> tuple[Subscription, ...]:
        return self._subscriptions.matching(topic)

    def receive(self, delivery: Delivery, subscription: Subscription, qos: int) -> None:
        kept = _Kept(replace(delivery, redelivered=True)) if qos and subscription.qos else None
        if kept is not None and self.session is not None:
            self.session.kept.append(kept)
        asyncio.get_running_loop().call_soon(self._hand_over, delivery, subscription, kept)

    def on_broker_restart(self) -> None:
        self._hub.attach(self)
        self._resume()
        self._standing.set()
        task = asyncio.create_task(self._call_back(), name=f"reconnected to {self.address}")
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    # Within -------------------------------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Have what the session kept handed over again, and then what is retained."""
        for kept in tuple(self.session.kept) if self.session is not None else ():
            delivery, kept.delivery = kept.delivery, replace(kept.delivery, redelivered=True)
            for each in self._subscriptions.matching(delivery.topic):
                asyncio.get_running_loop().call_soon(self._hand_over, delivery, each, kept)
        for each in self._subscriptions:
            if self.session is not None:
                self.session.filters[each.topic_filter] = each.qos
            self._hub.send_retained(self, each)

    async def _stand(self) -> None:
        """Return when the hub is up."""
        while not self._closed and not (self._connected and self._hub.is_up):
            self._standing.clear()
            await self._standing.wait()
        if self._closed:
            raise Disconnected(self.address, "it was closed")

    async def _call_back(self) -> None:
        for callback in self._callbacks:
            try:
                await callback()
            except Exception:
                log.exception("a callback after the reconnection to %s failed", self.address)

    def _hand_over(self, delivery: Delivery, subscription: Subscription, kept: _Kept | None) -> None:
        if self._closed or subscription.topic_filter not in self._subscriptions:
            return
        length = delivery.payload.nbytes
        place = None
        if subscription.buffer_provider and length:
            try:
                place = subscription.buffer_provider(delivery.topic, delivery.properties, length)
            except Exception:
                log.exception("the placer of %s failed on %d bytes", subscription.topic_filter, length)
        payload = memoryview(bytearray(length)) if place is None else place
        payload[:] = delivery.payload
        settle = partial(self._settle, kept) if kept is not None else None
        try:
            subscription.handler(replace(delivery, payload=payload, ack=settle if subscription.manual_ack else None))
        except Exception:
            log.exception("the handler of %s failed on %d bytes", subscription.topic_filter, length)
        else:
            if subscription.manual_ack:
                return
        if settle is not None:
            settle()

    def _settle(self, kept: _Kept) -> None:
        if self.session is not None:
            self.session.settle(kept)
