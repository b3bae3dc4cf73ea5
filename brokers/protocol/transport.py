"""The line to a broker, as the rest of the system sees it: whole MQTT 5 publications out and in, no sockets.

`memory.MemoryTransport` (in this process) and `mqtt.MqttTransport` keep this one promise, and the same contract tests
hold them to it, the latter against the embedded broker and against Mosquitto with and without a limit on packets.
"""

from __future__ import annotations

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
    """One PUBLISH that came in. `payload` belongs to the receiver: nobody writes to it afterwards.

    `again`: the broker has sent it before, to this client or to one that had its name, and was not told that it was
    done with. `settle`, where there is one, tells it so; to be called once.
    """

    topic: str
    properties: Properties
    payload: memoryview
    retain: bool = False
    redelivered: bool = False
    ack: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes when this client dies without a word (QoS 1)."""

    topic: str
    payload: bytes = b""
    retain: bool = True


@dataclass(frozen=True, slots=True)
class BrokerLimits:
    """What the broker announced in its CONNACK; what it did not name is MQTT's own (MQTT 5.0 section 3.2.2.3)."""

    max_packet_bytes: int
    receive_maximum: int = 65535
    max_qos: int = 2
    retain_available: bool = True
    wildcards_available: bool = True
    shared_available: bool = True  # subscriptions
    session_expiry_s: int | None = None  # in place of what was asked for
    keepalive_s: int | None = None  # the same


Handler = Callable[[Delivery], None]
# Asked as soon as the head of a PUBLISH has been read and before its payload is: (topic, properties, payload length)
# to the place where the payload shall be written (exactly that long), or None for a fresh buffer. This is how a chunk
# lands at its offset in the assembled message with no copy in between. It must not raise; if it does, that is logged,
# and the payload goes to a fresh buffer.
BufferProvider = Callable[[str, Properties, int], memoryview | None]


class Transport(Protocol):
    """One connection to one broker, used from one asyncio loop; it reconnects and resubscribes until it is closed."""

    @property
    def address(self) -> str:
        """The broker's address, for messages to people; never holds a password."""
        ...

    @property
    def limits(self) -> BrokerLimits:
        """Known once `connect` has returned; may change when the transport reconnects."""
        ...

    @property
    def is_connected(self) -> bool:
        """Whether a connection stands, as far as is known: one that falls silent is given up after a while."""
        ...

    async def connect(self, *, will: Will | None = None, timeout_s: float = 10.0) -> None:
        """Connect; raise `BrokerUnreachable` when no MQTT 5 broker answers in time."""
        ...

    async def subscribe(
        self,
        topic_filter: str,
        handler: Handler,
        *,
        qos: int = 0,
        buffer_provider: BufferProvider | None = None,
        manual_ack: bool = False,
    ) -> None:
        """Have `handler` called, on the loop, for each PUBLISH that matches; return when the broker has confirmed it.

        `$share/{group}/{filter}` is allowed. A handler must not block and must not raise.

        With `settle`, the broker keeps each publication of QoS 1 until the handler's `Delivery.settle` has been called
        (and those before it have, since MQTT wants this in order). A transport with a session that loses its
        connection and gets another does not hand out again what is still in hand. While too much is, nothing is read.
        Subscribe before `connect`: what the session kept may come first thing.
        """
        ...

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
        """Send one PUBLISH whose payload is the concatenation of the pieces, which are not copied.

        Returns when the bytes are handed to the operating system (QoS 0) or acknowledged by the broker (QoS 1), so a
        sender that awaits holds at most one payload in memory. While disconnected it waits for the connection to come
        back; QoS 0 bytes that were in flight when a connection broke are lost, as MQTT says. Raises `TooLarge` for a
        packet over the broker's announced maximum, `Disconnected` once closed.
        """
        ...

    def on_reconnect(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Have `callback` awaited after each reconnection, when all subscriptions stand again."""
        ...

    async def close(self) -> None:
        """Send what is queued, disconnect in good order (no will is published), end all tasks. May be called twice."""
        ...
