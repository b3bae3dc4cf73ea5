"""One MQTT 5 connection, from CONNECT to its end. The only file that imports paho.

paho keeps the handshakes: CONNECT with its will, CONNACK, SUBSCRIBE, UNSUBSCRIBE, DISCONNECT. It is given a socket of
ours that takes every byte at once and returns only what is meant for it. PUBLISH and PUBACK never pass through paho: it
copies the rest of a packet after each partial send, which is quadratic in the packet's size, and buffers a whole packet
before it looks at it. Keep-alive is ours too, since paho sees none of the traffic that proves a connection alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from brokers.errors import TooLarge
from brokers.mqtt.connack import parse_limits
from brokers.mqtt.connect_errors import OperationRefused, connack_error, no_connack_error
from brokers.mqtt.paho_socket import PahoSocket
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES, BadPacket, PublishHeader, encode_publish_header
from brokers.mqtt.socket_loop import PING_AFTER_TICKS, ConnectionLost, PacketSocket
from brokers.protocol.broker_url import BrokerAddress
from brokers.protocol.transport import BrokerLimits, Properties, Will

CLOSE_TIMEOUT_S = 1.0
FIRST_PACKET_ID = 32_768  # paho numbers its SUBSCRIBE packets from 1, ours must differ: section 2.2.1

_CONNACK, _PUBACK = 0x20, 0x40
_REFUSED = 0x80  # reason codes from here on are failures: section 2.4


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """What we say in CONNECT."""

    client_id: str
    keepalive_s: int
    max_packet_bytes: int
    receive_maximum: int
    will: Will | None = None
    session_expiry_s: int = 0  # how long the broker keeps the session when we are away; 0: it begins anew


_Connack = tuple[ReasonCode, PahoProperties | None]


class _Paho(Client):
    """paho, made to use a socket that is connected already."""

    def __init__(self, client_id: str, sock: PahoSocket) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5, manual_ack=True)
        self.suppress_exceptions = True
        self._ours = sock

    def _create_socket(self) -> PahoSocket:  # type: ignore[override]
        return self._ours


class Connection:
    """One connection; `lost` is done as soon as it has ended, with the reason."""

    def __init__(
        self,
        sock: socket.socket,
        address: BrokerAddress,
        greeting: ConnectOptions,
        place: Callable[[PublishHeader], memoryview | None],
        published: Callable[[PublishHeader, memoryview], bool],
        greeted: Callable[[Connection, bool], None],
    ) -> None:
        """`published` returns whether to acknowledge at once; `greeted` hears, first of all, of a kept session."""
        self._address = address
        self._greeting = greeting
        self._pump = PacketSocket(sock, self, greeting.max_packet_bytes)
        self._take = published
        self._greeted = greeted
        self.session_present = False  # the broker had kept the session, with its subscriptions
        self.get_buffer = place
        self._answers: dict[tuple[str, int], asyncio.Future[int]] = {}  # (packet, its id) -> the reason code
        self._next_id = FIRST_PACKET_ID
        self._paho_socket = PahoSocket(self._pump, sock.fileno())
        self._paho = _Paho(greeting.client_id, self._paho_socket)
        self._connected: asyncio.Future[_Connack] = asyncio.get_running_loop().create_future()
        self._in_flight = asyncio.Semaphore(1)  # as many as the broker's Receive Maximum, once that is known
        self.lost = self._pump.lost
        self.lost.add_done_callback(self._fail)
        self.limits = BrokerLimits(MAX_REMAINING_BYTES)

    # Life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Greet the broker; raise `BrokerUnreachable` with what it answered. The caller sets the time limit."""
        self._paho.on_connect = self._on_connect
        self._paho.on_subscribe = self._on_subscribe
        self._paho.on_unsubscribe = self._on_unsubscribe
        self._paho.on_disconnect = self._on_disconnect
        if self._address.user is not None:
            self._paho.username_pw_set(self._address.user, self._address.password)
        will = self._greeting.will
        if will is not None:
            self._paho.will_set(will.topic, will.payload, qos=1, retain=will.retain)
        ours = PahoProperties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        ours.MaximumPacketSize = self._greeting.max_packet_bytes
        ours.ReceiveMaximum = self._greeting.receive_maximum
        if kept_s := self._greeting.session_expiry_s:
            ours.SessionExpiryInterval = kept_s
        keepalive_s = self._greeting.keepalive_s
        self._paho.connect_async("broker", keepalive=keepalive_s, clean_start=not kept_s, properties=ours)
        self._pump.start()
        self._paho.reconnect()
        await asyncio.wait((self._connected, self.lost), return_when=asyncio.FIRST_COMPLETED)
        if not self._connected.done():
            raise no_connack_error(self._address, self._pump.error, self.lost.result())
        reason, theirs = self._connected.result()
        if reason.value >= _REFUSED:
            raise connack_error(self._address, reason.value, str(reason))
        self.limits = parse_limits(theirs)
        self._in_flight = asyncio.Semaphore(min(self.limits.receive_maximum, FIRST_PACKET_ID - 1))
        ping_after_ticks = max(1, min(PING_AFTER_TICKS, self._greeting.keepalive_s // 2))
        self._pump.start_watchdog(ping_after_ticks, name=f"keep-alive {self._address}")

    async def close(self) -> None:
        """Send what is queued, say goodbye so that no will is published, and close: two seconds at most."""
        if not self.lost.done():
            with contextlib.suppress(ConnectionLost, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._pump.wait_sent()
                    self._paho.disconnect()
                    await self._pump.wait_sent()
            await self._pump.half_close(CLOSE_TIMEOUT_S)
        await self.abort("it was closed")

    async def abort(self, reason: str) -> None:
        """Close at once, without goodbye."""
        self._pump.close(reason)
        await self._pump.stop_watchdog()

    # Packets ------------------------------------------------------------------------------------------------------

    async def publish(
        self, topic: str, pieces: Sequence[memoryview], properties: Properties, *, qos: int = 0, retain: bool = False
    ) -> None:
        """Send one PUBLISH; return when it has left (QoS 0) or is acknowledged (QoS 1).

        Raises `TooLarge` before a byte is sent, `OperationRefused` for what the broker will not take, `ConnectionLost`.
        """
        if qos == 0:
            await self._send_publish(topic, pieces, properties, 0, retain, 0)
            return
        async with self._in_flight:
            packet_id = self._next_id
            self._next_id = FIRST_PACKET_ID + (packet_id + 1) % FIRST_PACKET_ID
            answer = self._answer("PUBACK", packet_id)
            try:
                await self._send_publish(topic, pieces, properties, 1, retain, packet_id)
                reason = await answer
            finally:
                self._answers.pop(("PUBACK", packet_id), None)
        if reason >= _REFUSED:
            raise OperationRefused("publication to", topic, str(ReasonCode(PacketTypes.PUBACK, identifier=reason)))

    async def _send_publish(
        self, topic: str, pieces: Sequence[memoryview], properties: Properties, qos: int, retain: bool, packet_id: int
    ) -> None:
        payload_bytes = sum(piece.nbytes for piece in pieces)
        head = encode_publish_header(topic, properties, payload_bytes, qos=qos, retain=retain, packet_id=packet_id)
        if len(head) + payload_bytes > self.limits.max_packet_bytes:
            raise TooLarge(f"publication to {topic!r}", self.limits.max_packet_bytes, len(head) + payload_bytes)
        await self._pump.send((memoryview(head), *pieces))

    async def subscribe(self, topic_filter: str, qos: int) -> None:
        """Subscribe; raise `OperationRefused` or `ConnectionLost`."""
        _, packet_id = self._paho.subscribe(topic_filter, options=SubscribeOptions(qos=qos))
        await self._confirmed("subscription to", topic_filter, "SUBACK", packet_id)

    def resubscribe(self, topic_filter: str, qos: int) -> None:
        """Subscribe to what a kept session has; its answer, after all that was kept, is not waited for."""

        def answered(answer: asyncio.Future[int]) -> None:
            if answer.exception() is None and answer.result() >= _REFUSED:
                self._pump.close(f"the broker no longer grants the subscription to {topic_filter!r}")

        _, packet_id = self._paho.subscribe(topic_filter, options=SubscribeOptions(qos=qos))
        self._answer("SUBACK", packet_id or 0).add_done_callback(answered)

    async def unsubscribe(self, topic_filter: str) -> None:
        """Unsubscribe; raise `OperationRefused` or `ConnectionLost`."""
        _, packet_id = self._paho.unsubscribe(topic_filter)
        await self._confirmed("end of the subscription to", topic_filter, "UNSUBACK", packet_id)

    def on_publish(self, head: PublishHeader, payload: memoryview) -> None:
        """Take a PUBLISH from the reader; acknowledge it when whoever takes it has returned, or later."""
        if self._take(head, payload) and head.qos == 1:
            self.send_puback(head.packet_id)

    def send_puback(self, packet_id: int) -> bool:
        """Send a PUBACK; False when the connection has ended."""
        with contextlib.suppress(ConnectionLost):
            self._pump.push((memoryview(b"\x40\x02" + packet_id.to_bytes(2, "big")),))
        return not self.lost.done()

    def set_reading_paused(self, paused: bool) -> None:
        """Read nothing from now on, or read on."""
        self._pump.set_reading_paused(paused)

    def on_packet(self, data: bytes) -> None:
        """Take any other packet from the reader: a PUBACK is ours, the rest is paho's."""
        kind = data[0] & 0xF0
        if not self._connected.done() and kind != _CONNACK:
            raise BadPacket("what it answered is not a CONNACK")
        if kind != _PUBACK:
            self._paho_socket.receive_buffer += data
            while self._paho_socket.receive_buffer and self._paho.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS:
                pass
            return
        if len(data) < 4:
            raise BadPacket("a PUBACK without a packet identifier")
        self._settle("PUBACK", int.from_bytes(data[2:4], "big"), data[4] if len(data) > 4 else 0)

    # What paho calls ----------------------------------------------------------------------------------------------

    def _on_connect(
        self, client: Client, data: object, flags: ConnectFlags, reason: ReasonCode, properties: PahoProperties | None
    ) -> None:
        self._connected.set_result((reason, properties))
        if reason.value < _REFUSED:
            self.session_present = flags.session_present
            self._greeted(self, self.session_present)

    def _on_subscribe(
        self, client: Client, data: object, packet_id: int, reasons: list[ReasonCode], properties: PahoProperties | None
    ) -> None:
        self._settle("SUBACK", packet_id, max(reason.value for reason in reasons))

    def _on_unsubscribe(
        self, client: Client, data: object, packet_id: int, reasons: list[ReasonCode], properties: PahoProperties | None
    ) -> None:
        self._settle("UNSUBACK", packet_id, max((reason.value for reason in reasons), default=0))

    def _on_disconnect(
        self,
        client: Client,
        data: object,
        flags: DisconnectFlags,
        reason: ReasonCode,
        properties: PahoProperties | None,
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._pump.close(f"the broker ended it: {reason}")
        elif reason.value >= _REFUSED:
            self._pump.close(f"what the broker sent cannot be read: {reason}; does it speak MQTT 5?")

    # Answers ------------------------------------------------------------------------------------------------------

    def _answer(self, kind: str, packet_id: int) -> asyncio.Future[int]:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._answers[kind, packet_id] = future
        return future

    def _settle(self, kind: str, packet_id: int, reason: int) -> None:
        future = self._answers.pop((kind, packet_id), None)
        if future is not None and not future.done():  # else whoever asked was cancelled
            future.set_result(reason)

    def _fail(self, lost: asyncio.Future[str]) -> None:
        for future in self._answers.values():
            if not future.done():
                future.set_exception(ConnectionLost(lost.result()))
        self._answers.clear()

    async def _confirmed(self, what: str, topic_filter: str, kind: str, packet_id: int | None) -> None:
        self._pump.raise_if_lost()
        assert packet_id is not None  # paho gives none only when it has no connection
        reason = await self._answer(kind, packet_id)
        if reason >= _REFUSED:
            packet = PacketTypes.SUBACK if kind == "SUBACK" else PacketTypes.UNSUBACK
            raise OperationRefused(what, topic_filter, str(ReasonCode(packet, identifier=reason)))
