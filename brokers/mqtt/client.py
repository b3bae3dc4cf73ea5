"""The transport over MQTT 5: one connection after the other, and what outlives them: subscriptions, publications."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial

from brokers.errors import BrokerUnreachable, Disconnected, SparseError
from brokers.mqtt.connect_errors import AuthenticationFailed, connect_error
from brokers.mqtt.connection import Connection, ConnectOptions
from brokers.mqtt.publish_packet import PublishHeader
from brokers.mqtt.socket_connect import TlsConfig, connect_socket
from brokers.mqtt.socket_loop import ConnectionLost
from brokers.mqtt.topic_filters import Subscription, Subscriptions
from brokers.mqtt.unacked import Unacked, UnackedPublish
from brokers.protocol.broker_url import BrokerAddress, parse_address
from brokers.protocol.transport import BrokerLimits, Buffer, BufferProvider, Delivery, Handler, Properties, Will

log = logging.getLogger(__name__)

KEEPALIVE_S = 20  # the broker publishes the will of a machine that fell silent after 1.5 times this: section 3.1.2.10
RECEIVE_MAXIMUM = 64  # QoS 1 publications that a broker may have on the way to us, and that we may have in hand
# What we take in one packet; memory is paid for as the bytes come, not when they are announced.
MAX_PACKET_BYTES = (256 << 20) - 1
# First and longest wait between attempts to reconnect, each doubled and then shortened by chance.
BACKOFF_S = (0.1, 5.0)
STABLE_S = 5.0  # a connection that lived this long was a good one: the next wait is the first again
RECONNECT_TIMEOUT_S = 10.0


class MqttTransport:
    """A `Transport` over MQTT 5 to the broker at `address`; its client id is a random one unless given.

    With `session_expiry_s` and a `client_id` that stays the same, the broker keeps the subscriptions of QoS 1 and what
    comes for them, that long after this client went away, and gives it to the next one of that name. Two that run at
    once under one name take each other's place again and again: each warns, and nothing is lost, but much comes twice.
    """

    def __init__(
        self,
        address: str | BrokerAddress,
        *,
        client_id: str | None = None,
        tls: TlsConfig = TlsConfig(),
        keepalive_s: int = KEEPALIVE_S,
        max_packet_bytes: int = MAX_PACKET_BYTES,
        session_expiry_s: int = 0,
    ) -> None:
        """Raise `BadAddress` for an address that cannot be read; nothing is sent before `connect`."""
        if session_expiry_s and client_id is None:
            raise ValueError("a session belongs to a name: expected a client_id")
        self._address = parse_address(address) if isinstance(address, str) else address
        self._tls = tls
        name = client_id or f"sparse-{secrets.token_hex(6)}"
        self._greeting = ConnectOptions(
            name, keepalive_s, max_packet_bytes, RECEIVE_MAXIMUM, session_expiry_s=session_expiry_s
        )
        self._subscriptions = Subscriptions()
        self._receipts = Unacked(RECEIVE_MAXIMUM)
        self._settling = bool(session_expiry_s)  # whether anything is acknowledged later than it comes
        self._callbacks: list[Callable[[], Awaitable[None]]] = []
        self._connection: Connection | None = None  # set while one stands and is subscribed
        self._changed = asyncio.Event()  # set and replaced whenever `_connection` or `_closed` changes
        self._running: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._limits = BrokerLimits(0)

    @property
    def address(self) -> str:
        return str(self._address)

    @property
    def limits(self) -> BrokerLimits:
        return self._limits

    @property
    def is_connected(self) -> bool:
        return self._connection is not None and not self._connection.lost.done()

    def __repr__(self) -> str:
        return f"MqttTransport({self.address!r}, client_id={self._greeting.client_id!r})"

    # Life ---------------------------------------------------------------------------------------------------------

    async def connect(self, *, will: Will | None = None, timeout_s: float = 10.0) -> None:
        if self._running is not None or self._closing is not None:
            raise RuntimeError("a transport is connected once")
        self._greeting = replace(self._greeting, will=will)
        connection = await self._open(timeout_s)
        self._set(connection)
        self._running = asyncio.create_task(self._run(connection), name=f"connection to {self.address}")

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        self._callbacks.append(callback)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"goodbye to {self.address}")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        connection, self._connection = self._connection, None
        self._set(None)
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait((self._running,))
        if connection is not None:
            await connection.close()

    async def _run(self, connection: Connection) -> None:
        """Keep a connection standing until cancelled."""
        loop = asyncio.get_running_loop()
        first_s, longest_s = BACKOFF_S
        wait_s = first_s
        since_s = loop.time()
        while True:
            reason = await asyncio.shield(connection.lost)
            self._set(None)
            await connection.abort(reason)
            if loop.time() - since_s >= STABLE_S:
                wait_s = first_s
            elif connection.session_present:
                reason += f"; does another client call itself {self._greeting.client_id}?"
            log.warning("connection to %s lost: %s; reconnecting", self.address, reason)
            again: Connection | None = None
            while again is None:
                await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, longest_s)
                again = await self._try_again()
            connection = again
            log.warning("connected to %s again", self.address)
            since_s = loop.time()
            self._set(connection)
            await self._call_back(connection)

    async def _try_again(self) -> Connection | None:
        """Return a new connection, or None: nothing may end the task that reconnects, all publications wait for it."""
        try:
            return await self._open(RECONNECT_TIMEOUT_S)
        except AuthenticationFailed as error:  # somebody has to do something; meanwhile they may have done it
            log.warning("%s", error)
        except BrokerUnreachable as error:
            log.info("%s", error)
        except SparseError as error:  # a subscription that is refused now, a certificate that is being replaced
            log.warning("cannot reconnect to %s yet: %s", self.address, error)
        except Exception:
            log.exception("cannot reconnect to %s yet", self.address)
        return None

    async def _open(self, timeout_s: float) -> Connection:
        """Connect and subscribe to everything; raise `BrokerUnreachable`, `Refused` or `BadFile`."""
        connection: Connection | None = None
        try:
            async with asyncio.timeout(timeout_s):
                sock = await connect_socket(self._address, self._tls)
                connection = Connection(
                    sock, self._address, self._greeting, self._place, self._published, self._greeted
                )
                await connection.start()
                for each in self._subscriptions:
                    if connection.session_present:
                        connection.resubscribe(each.topic_filter, each.qos)
                    else:
                        await connection.subscribe(each.topic_filter, each.qos)
                return connection
        except BaseException as error:
            if connection is not None:
                await connection.abort("given up")
            if isinstance(error, TimeoutError):
                raise BrokerUnreachable(self.address, f"no answer within {timeout_s:g} s") from error
            if isinstance(error, OSError | ConnectionLost):
                raise connect_error(self._address, error) from error
            raise

    async def _call_back(self, connection: Connection) -> None:
        """Await the callbacks, unless the connection ends first: they may wait for the one we would make next."""
        calls = asyncio.create_task(self._all_callbacks(), name=f"reconnected to {self.address}")
        try:
            await asyncio.wait((calls, connection.lost), return_when=asyncio.FIRST_COMPLETED)
        finally:
            calls.cancel()
            await asyncio.wait((calls,))

    async def _all_callbacks(self) -> None:
        for callback in self._callbacks:
            try:
                await callback()
            except Exception:
                log.exception("a callback after the reconnection to %s failed", self.address)

    # What travels -------------------------------------------------------------------------------------------------

    async def subscribe(
        self,
        topic_filter: str,
        handler: Handler,
        *,
        qos: int = 0,
        buffer_provider: BufferProvider | None = None,
        manual_ack: bool = False,
    ) -> None:
        self._subscriptions.add(Subscription(topic_filter, handler, qos, buffer_provider, manual_ack))
        self._settling = self._settling or manual_ack
        if self._running is None:
            return  # `connect` will
        try:
            await self._on_standing(lambda connection: connection.subscribe(topic_filter, qos))
        except BaseException:
            self._subscriptions.remove(topic_filter)
            raise

    async def unsubscribe(self, topic_filter: str) -> None:
        known = topic_filter in self._subscriptions
        self._subscriptions.remove(topic_filter)
        if known and self._connection is not None:
            with contextlib.suppress(ConnectionLost):  # the next connection will not ask for it
                await self._connection.unsubscribe(topic_filter)

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
        pieces = [memoryview(piece).cast("B") for piece in given]
        await self._on_standing(lambda standing: standing.publish(topic, pieces, properties, qos=qos, retain=retain))

    async def _on_standing(self, act: Callable[[Connection], Awaitable[None]]) -> None:
        """Do something on a connection that stands; again on the next one when it ends before it is done."""
        while True:
            connection = await self._standing()
            try:
                await act(connection)
                return
            except ConnectionLost:
                await asyncio.wait((connection.lost,))

    async def _standing(self) -> Connection:
        while True:
            if self._closing is not None:
                raise Disconnected(self.address, "it was closed")
            if self._connection is not None and not self._connection.lost.done():
                return self._connection
            await self._changed.wait()

    def _set(self, connection: Connection | None) -> None:
        self._connection = connection
        if connection is not None:
            self._limits = connection.limits
        self._changed.set()
        self._changed = asyncio.Event()

    def _place(self, head: PublishHeader) -> memoryview | None:
        for each in self._subscriptions.matching(head.topic):
            if each.buffer_provider is None:
                continue
            try:
                place = each.buffer_provider(head.topic, head.properties, head.payload_bytes)
            except Exception:
                log.exception("the placer of %s failed on %d bytes", each.topic_filter, head.payload_bytes)
                continue
            if place is not None:
                return place
        return None

    def _greeted(self, connection: Connection, resumed: bool) -> None:
        if self._running is not None and self._greeting.session_expiry_s and not resumed:
            log.warning(
                "%s has forgotten the session %s, and what it kept for it", self.address, self._greeting.client_id
            )
        self._receipts.attach(connection, resumed)

    def _published(self, head: PublishHeader, payload: memoryview) -> bool:
        """Hand out what has come; return whether it is to be acknowledged at once."""
        matching = self._subscriptions.matching(head.topic)
        receipt: UnackedPublish | None = None
        if self._settling and head.qos == 1:
            receipt = self._receipts.add(head, payload, sum(each.manual_ack for each in matching))
            if receipt is None:  # in hand already
                return False
        delivery = Delivery(head.topic, head.properties, payload, head.retain, head.dup)
        for each in matching:
            settle = partial(self._receipts.ack, receipt) if receipt is not None and each.manual_ack else None
            try:
                each.handler(replace(delivery, ack=settle) if settle else delivery)
            except Exception:
                log.exception("the handler of %s failed on %d bytes", each.topic_filter, payload.nbytes)
                if settle:
                    settle()
        return receipt is None
