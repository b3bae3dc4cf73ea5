"""The interface to a broker: MQTT 5 publications in and out.

`brokers.mqtt.client.MqttTransport` implements it, and an in-memory transport of the tests; the same contract tests run
against both, the former with the embedded broker and with Mosquitto.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Properties:
    """The MQTT 5 PUBLISH properties that Sparse uses (MQTT 5.0 section 3.3.2.3)."""

    content_type: str = ""
    correlation_data: bytes = b""
    response_topic: str = ""
    expiry_s: int | None = None
    user_properties: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Delivery:
    """A received PUBLISH; the receiver owns `payload`.

    `redelivered`: the broker has sent it before, to this client or an earlier one with the same client id, and got no
    acknowledgement. `ack`, present with manual acknowledgement, acknowledges it; to be called once.
    """

    topic: str
    properties: Properties
    payload: memoryview
    retain: bool = False
    redelivered: bool = False
    ack: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Will:
    """The message that the broker publishes (QoS 1) when this client disconnects without DISCONNECT."""

    topic: str
    payload: bytes = b""
    retain: bool = True


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """The limits in the broker's CONNACK, with MQTT's own defaults (MQTT 5.0 section 3.2.2.3)."""

    max_packet_bytes: int
    receive_maximum: int = 65535
    max_qos: int = 2
    retain_available: bool = True
    wildcards_available: bool = True
    shared_available: bool = True  # shared subscriptions
    session_expiry_s: int | None = None  # None: as requested
    keepalive_s: int | None = None  # None: as requested


Handler = Callable[[Delivery], None]
# Called when the header of a PUBLISH has been read, before its payload: (topic, properties, payload length) to the
# buffer of that length to read the payload into, or None for a new one. So chunks are received directly into the
# reassembled message. An exception in it is logged, and the payload is read into a new buffer.
BufferProvider = Callable[[str, Properties, int], memoryview | None]


class Transport(Protocol):
    """One connection to one broker, used from one asyncio loop; it reconnects and resubscribes until it is closed."""

    @property
    def address(self) -> str:
        """The broker's address for messages to the user; never holds a password."""

    @property
    def limits(self) -> BrokerLimits:
        """Known once `connect` has returned; may change at a reconnection."""

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection, as far as is known: a silent one is closed after the keep-alive time."""

    async def connect(self, *, will: Will | None = None, timeout_s: float = 10.0) -> None:
        """Connect. Raises `BrokerUnreachable` when no MQTT 5 broker answers in time."""

    async def subscribe(
        self,
        topic_filter: str,
        handler: Handler,
        *,
        qos: int = 0,
        buffer_provider: BufferProvider | None = None,
        manual_ack: bool = False,
    ) -> None:
        """Call `handler` on the loop for each matching PUBLISH; return when the broker has confirmed the subscription.

        `$share/{group}/{filter}` is allowed. A handler must not block and must not raise.

        With `manual_ack`, the broker keeps each QoS 1 publication until `Delivery.ack` has been called, and called for
        those before it (MQTT requires this order). A publication that is not yet acknowledged when a session is resumed
        is not passed to the handler again. While too many are unacknowledged, nothing is read. Subscribe before
        `connect`, since a resumed session may deliver at once.
        """

    async def unsubscribe(self, topic_filter: str) -> None: ...

    async def publish(
        self,
        topic: str,
        payload: Sequence[Buffer] | Buffer = b"",
        properties: Properties = Properties(),
        *,
        qos: int = 0,
        retain: bool = False,
    ) -> None:
        """Send one PUBLISH with the concatenation of the given buffers as its payload, without copying them.

        Returns when the bytes are passed to the operating system (QoS 0) or acknowledged by the broker (QoS 1), so a
        caller that awaits it holds at most one payload in memory. While disconnected it waits for the reconnection;
        QoS 0 bytes in transit when a connection breaks are lost, as MQTT specifies. Raises `TooLarge` for a packet over
        the broker's announced maximum, `Disconnected` after `close`.
        """

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Await `callback` after each reconnection, when all subscriptions are restored."""

    async def close(self) -> None:
        """Send the queued packets, send DISCONNECT (no will is published), end all tasks. May be called twice."""
