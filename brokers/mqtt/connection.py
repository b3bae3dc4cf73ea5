"""One MQTT 5 connection, from CONNECT to its end. The only module that imports paho.

paho handles CONNECT with its will, CONNACK, SUBSCRIBE, UNSUBSCRIBE and DISCONNECT, over a socket object of ours.
PUBLISH and PUBACK bypass paho, which copies the rest of a packet after each partial send (quadratic in the packet's
size) and buffers a whole packet before it parses it. Keep-alive is ours too, since paho sees none of the traffic that
shows that a connection works.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from brokers.errors import BrokerUnreachable, TooLarge
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES, PublishHeader, bad_packet, encode_publish_header
from brokers.mqtt.socket_connect import (
    OperationRefused,
    TlsConfig,
    connack_error,
    connect_error,
    connect_socket,
    no_connack_error,
)
from brokers.mqtt.socket_loop import ConnectionLost, PacketSocket
from brokers.protocol.broker_url import BrokerAddress
from brokers.protocol.transport import BrokerLimits, Buffer, Properties, Will

KEEPALIVE_S = 20  # after 1.5 times this without a packet the broker publishes the will: section 3.1.2.10
RECEIVE_MAXIMUM = 64  # QoS 1 publications from the broker that may be unacknowledged
MAX_PACKET_BYTES = MAX_REMAINING_BYTES  # accepted; memory is touched as bytes arrive, not when they are announced
CLOSE_TIMEOUT_S = 1.0
FIRST_PACKET_ID = 32_768  # of our PUBLISH packets; paho numbers its packets from 1, and ids must differ: section 2.2.1

_CONNACK, _PUBACK = 0x20, 0x40
_FAILURE = 0x80  # reason codes from here on are failures: section 2.4
# paho's name of a CONNACK property -> the field of `BrokerLimits`, and its type.
_LIMITS: dict[str, tuple[str, Callable[[int], Any]]] = {
    "MaximumPacketSize": ("max_packet_bytes", int),
    "ReceiveMaximum": ("receive_maximum", int),
    "MaximumQoS": ("max_qos", int),
    "RetainAvailable": ("retain_available", bool),
    "WildcardSubscriptionAvailable": ("wildcards_available", bool),
    "SharedSubscriptionAvailable": ("shared_available", bool),
    "SessionExpiryInterval": ("session_expiry_s", int),
    "ServerKeepAlive": ("keepalive_s", int),
}


@dataclass(frozen=True, slots=True)
class ConnectOptions:
    """The broker, and the contents of the CONNECT packet."""

    address: BrokerAddress
    tls: TlsConfig
    client_id: str
    will: Will | None = None
    session_expiry_s: int = 0  # how long the broker keeps the session after a disconnection; 0: clean start


def parse_limits(properties: object) -> BrokerLimits:
    """Return the limits in the properties of a CONNACK, with MQTT's defaults for those that are absent."""
    limits = {
        field: kind(getattr(properties, name)) for name, (field, kind) in _LIMITS.items() if hasattr(properties, name)
    }
    return BrokerLimits(**{"max_packet_bytes": MAX_REMAINING_BYTES, **limits})


class _PahoSocket:
    """The socket that paho uses: sends by a `PacketSocket`, receives only the packets put into `receive_buffer`."""

    def __init__(self, packets: PacketSocket, descriptor: int) -> None:
        self._packets = packets
        self._descriptor = descriptor
        self.receive_buffer = bytearray()

    def send(self, data: bytes) -> int:
        self._packets.push((memoryview(bytes(data)),))
        return len(data)

    def recv(self, count: int) -> bytes:
        if not self.receive_buffer:
            raise BlockingIOError
        data = bytes(self.receive_buffer[:count])
        del self.receive_buffer[:count]
        return data

    def fileno(self) -> int:
        return self._descriptor

    def setblocking(self, flag: bool) -> None:
        """Do nothing: it never blocks."""

    def close(self) -> None:
        """Do nothing: `Connection` closes the real socket once its queue is sent."""


class _PahoClient(Client):
    """paho's client on a socket that is connected already."""

    def __init__(self, client_id: str, sock: _PahoSocket) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id, protocol=MQTTProtocolVersion.MQTTv5, manual_ack=True)
        self.suppress_exceptions = True
        self._connected_socket = sock

    def _create_socket(self) -> _PahoSocket:  # type: ignore[override]
        return self._connected_socket


class Connection:
    """One connection to a broker; when it ends, the future `lost` is done, with the reason."""

    def __init__(
        self,
        sock: socket.socket,
        options: ConnectOptions,
        get_buffer: Callable[[PublishHeader], memoryview | None],
        on_publish: Callable[[PublishHeader, memoryview], bool],
        on_connected: Callable[[Connection], None],
    ) -> None:
        """Set up a connection on a connected socket; `start` sends CONNECT.

        `get_buffer` returns the buffer for a payload, `on_publish` whether to acknowledge the publication at once;
        `on_connected` is called before any other callback.
        """
        self._options = options
        self._packets = PacketSocket(sock, self, MAX_PACKET_BYTES)
        self.get_buffer = get_buffer
        self._publish_callback = on_publish
        self._connected_callback = on_connected
        self.session_present = False  # whether the broker had kept the session, with its subscriptions
        self._acks: dict[tuple[int, int], asyncio.Future[int]] = {}  # (packet type, packet id) -> reason code
        self._next_id = FIRST_PACKET_ID
        self._paho_socket = _PahoSocket(self._packets, sock.fileno())
        self._paho = _PahoClient(options.client_id, self._paho_socket)
        self._connack: asyncio.Future[tuple[ReasonCode, PahoProperties | None]]
        self._connack = asyncio.get_running_loop().create_future()
        self._in_flight = asyncio.Semaphore(1)  # the broker's Receive Maximum, once it is known
        self.lost = self._packets.lost
        self.lost.add_done_callback(self._fail_acks)
        self.limits = BrokerLimits(MAX_REMAINING_BYTES)

    async def start(self) -> None:
        """Send CONNECT and wait for CONNACK; raise `BrokerUnreachable`. The caller sets the time limit."""
        address = self._options.address
        self._paho.on_connect = self._on_connect
        self._paho.on_subscribe = partial(self._on_suback, PacketTypes.SUBACK)
        self._paho.on_unsubscribe = partial(self._on_suback, PacketTypes.UNSUBACK)
        self._paho.on_disconnect = self._on_disconnect
        if address.user is not None:
            self._paho.username_pw_set(address.user, address.password)
        will = self._options.will
        if will is not None:
            self._paho.will_set(will.topic, will.payload, qos=1, retain=will.retain)
        properties = PahoProperties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.MaximumPacketSize = MAX_PACKET_BYTES
        properties.ReceiveMaximum = RECEIVE_MAXIMUM
        if session_expiry_s := self._options.session_expiry_s:
            properties.SessionExpiryInterval = session_expiry_s
        clean_start = not session_expiry_s
        self._paho.connect_async("broker", keepalive=KEEPALIVE_S, clean_start=clean_start, properties=properties)
        self._packets.start()
        self._paho.reconnect()
        await asyncio.wait((self._connack, self.lost), return_when=asyncio.FIRST_COMPLETED)
        if not self._connack.done():
            raise no_connack_error(address, self._packets.error, self.lost.result())
        reason, broker_properties = self._connack.result()
        if reason.value >= _FAILURE:
            raise connack_error(address, reason.value, str(reason))
        self.limits = parse_limits(broker_properties)
        self._in_flight = asyncio.Semaphore(min(self.limits.receive_maximum, FIRST_PACKET_ID - 1))
        self._packets.start_keepalive()

    async def close(self) -> None:
        """Send the queued packets and DISCONNECT, so that no will is published, then close: two seconds at most."""
        if not self.lost.done():
            with contextlib.suppress(ConnectionLost, TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    await self._packets.wait_sent()
                    self._paho.disconnect()
                    await self._packets.wait_sent()
            await self._packets.half_close(CLOSE_TIMEOUT_S)
        self.abort("it was closed")

    def abort(self, reason: str) -> None:
        """Close at once, without DISCONNECT: the broker publishes the will."""
        self._packets.close(reason)

    async def publish(
        self,
        topic: str,
        payload: Sequence[Buffer] | Buffer = b"",
        properties: Properties = Properties(),
        *,
        qos: int = 0,
        retain: bool = False,
    ) -> None:
        """Send one PUBLISH; return when it has been sent (QoS 0) or acknowledged (QoS 1).

        Raises `TooLarge` before a byte is sent, `OperationRefused` if the broker refuses it, `ConnectionLost`.
        """
        buffers = (payload,) if isinstance(payload, bytes | bytearray | memoryview) else payload
        pieces = [memoryview(buffer).cast("B") for buffer in buffers]
        if qos == 0:
            await self._send_publish(topic, pieces, properties, 0, retain, 0)
            return
        async with self._in_flight:
            packet_id = self._next_id
            self._next_id = FIRST_PACKET_ID + (packet_id + 1) % FIRST_PACKET_ID
            ack = self._expect_ack(PacketTypes.PUBACK, packet_id)
            try:
                await self._send_publish(topic, pieces, properties, 1, retain, packet_id)
                await _wait_for_ack(ack, "publication to", topic, PacketTypes.PUBACK)
            finally:
                self._acks.pop((PacketTypes.PUBACK, packet_id), None)

    async def _send_publish(
        self, topic: str, pieces: Sequence[memoryview], properties: Properties, qos: int, retain: bool, packet_id: int
    ) -> None:
        payload_bytes = sum(piece.nbytes for piece in pieces)
        header = encode_publish_header(topic, properties, payload_bytes, qos=qos, retain=retain, packet_id=packet_id)
        if len(header) + payload_bytes > self.limits.max_packet_bytes:
            raise TooLarge(f"publication to {topic!r}", self.limits.max_packet_bytes, len(header) + payload_bytes)
        await self._packets.send((memoryview(header), *pieces))

    async def subscribe(self, topic_filter: str, qos: int = 0) -> None:
        """Subscribe and wait for SUBACK; raise `OperationRefused` or `ConnectionLost`."""
        ack = self._send_subscribe(topic_filter, qos)
        await _wait_for_ack(ack, "subscription to", topic_filter, PacketTypes.SUBACK)

    def resubscribe(self, topic_filter: str, qos: int) -> None:
        """Subscribe again after a session was resumed, without waiting: its SUBACK follows all queued publications."""

        def on_ack(ack: asyncio.Future[int]) -> None:
            if ack.exception() is None and ack.result() >= _FAILURE:
                self._packets.close(f"the broker no longer grants the subscription to {topic_filter!r}")

        self._send_subscribe(topic_filter, qos).add_done_callback(on_ack)

    def _send_subscribe(self, topic_filter: str, qos: int) -> asyncio.Future[int]:
        _, packet_id = self._paho.subscribe(topic_filter, options=SubscribeOptions(qos=qos))
        return self._expect_ack(PacketTypes.SUBACK, packet_id)

    async def unsubscribe(self, topic_filter: str) -> None:
        """Unsubscribe and wait for UNSUBACK; raise `OperationRefused` or `ConnectionLost`."""
        _, packet_id = self._paho.unsubscribe(topic_filter)
        ack = self._expect_ack(PacketTypes.UNSUBACK, packet_id)
        await _wait_for_ack(ack, "end of the subscription to", topic_filter, PacketTypes.UNSUBACK)

    def send_puback(self, packet_id: int) -> bool:
        """Send a PUBACK; return False if the connection has ended."""
        with contextlib.suppress(ConnectionLost):
            self._packets.push((memoryview(b"\x40\x02" + packet_id.to_bytes(2, "big")),))
        return not self.lost.done()

    def set_reading_paused(self, paused: bool) -> None:
        self._packets.set_reading_paused(paused)

    def on_publish(self, header: PublishHeader, payload: memoryview) -> None:
        if self._publish_callback(header, payload) and header.qos == 1:
            self.send_puback(header.packet_id)

    def on_packet(self, data: bytes) -> None:
        """Handle any other packet from the reader: a PUBACK here, the rest in paho."""
        kind = data[0] & 0xF0
        if not self._connack.done() and kind != _CONNACK:
            raise bad_packet("the first one is not a CONNACK")
        if kind != _PUBACK:
            self._paho_socket.receive_buffer += data
            while self._paho_socket.receive_buffer and self._paho.loop_read() == MQTTErrorCode.MQTT_ERR_SUCCESS:
                pass
            return
        if len(data) < 4:
            raise bad_packet("a PUBACK without a packet identifier")
        self._resolve_ack(PacketTypes.PUBACK, int.from_bytes(data[2:4], "big"), data[4] if len(data) > 4 else 0)

    def _on_connect(
        self, client: Client, data: object, flags: ConnectFlags, reason: ReasonCode, properties: PahoProperties | None
    ) -> None:
        self._connack.set_result((reason, properties))
        if reason.value < _FAILURE:
            self.session_present = flags.session_present
            self._connected_callback(self)

    def _on_suback(
        self, packet_type: int, client: Client, data: object, packet_id: int, reasons: list[ReasonCode], _: object
    ) -> None:
        self._resolve_ack(packet_type, packet_id, max((reason.value for reason in reasons), default=0))

    def _on_disconnect(
        self, client: Client, data: object, flags: DisconnectFlags, reason: ReasonCode, _: object
    ) -> None:
        if flags.is_disconnect_packet_from_server:
            self._packets.close(f"the broker ended it: {reason}")
        elif reason.value >= _FAILURE:
            self._packets.close(f"a packet from the broker cannot be read: {reason}; does it speak MQTT 5?")

    def _expect_ack(self, packet_type: int, packet_id: int | None) -> asyncio.Future[int]:
        self._packets.raise_if_lost()
        assert packet_id is not None  # paho returns None only without a connection
        ack: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._acks[packet_type, packet_id] = ack
        return ack

    def _resolve_ack(self, packet_type: int, packet_id: int, reason: int) -> None:
        ack = self._acks.pop((packet_type, packet_id), None)
        if ack is not None and not ack.done():  # done: the caller was cancelled
            ack.set_result(reason)

    def _fail_acks(self, lost: asyncio.Future[str]) -> None:
        for ack in self._acks.values():
            if not ack.done():
                ack.set_exception(ConnectionLost(lost.result()))
        self._acks.clear()


async def _wait_for_ack(ack: asyncio.Future[int], operation: str, topic: str, packet_type: int) -> None:
    if (reason := await ack) >= _FAILURE:
        raise OperationRefused(operation, topic, str(ReasonCode(packet_type, identifier=reason)))


C = TypeVar("C", bound=Connection)


async def open_connection(
    options: ConnectOptions,
    create: Callable[[socket.socket], C],
    timeout_s: float,
    set_up: Callable[[C], Awaitable[None]] | None = None,
) -> C:
    """Connect, create a connection on the socket, start it, and run `set_up`, all within `timeout_s`.

    Raises `BrokerUnreachable`, and `BadFile` for TLS files.
    """
    connection: C | None = None
    try:
        async with asyncio.timeout(timeout_s):
            connection = create(await connect_socket(options.address, options.tls))
            await connection.start()
            if set_up is not None:
                await set_up(connection)
            return connection
    except BaseException as error:
        if connection is not None:
            connection.abort("connecting failed")
        if isinstance(error, TimeoutError):
            raise BrokerUnreachable(str(options.address), f"no answer within {timeout_s:g} s") from error
        if isinstance(error, OSError | ConnectionLost):
            raise connect_error(options.address, error) from error
        raise
