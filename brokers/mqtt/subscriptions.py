"""Subscriptions of a client, which of them a topic matches (MQTT 5.0 section 4.7), and unacknowledged publications.

QoS 1 publications that were received and are not yet acknowledged:

1. They are acknowledged in order of arrival on the connection (MQTT 5.0 section 4.6), each once all its handlers have
   called `ack`. Mosquitto accepts another order; rumqttd ends the connection.
2. On the next connection of the same session the broker redelivers unacknowledged messages, with the same packet
   identifier and DUP set (section 4.4). A publication that is still pending here is not handed out a second time: its
   acknowledgement goes to the new connection. Without DUP, or with other content than the publication that had its
   identifier, it counts as new: a duplicate is better than a loss.
3. A new session has none of the old packet identifiers. Publications of the old one stay pending until they are
   acknowledged locally; no PUBACK is sent for them.
4. Too many pending publications, or too many bytes, pause reading. A Receive Maximum alone does not bound them:
   Mosquitto 2.0.11 sends that many more for each acknowledgement as soon as it has a backlog, and rumqttd ignores it.
"""

import logging
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from brokers.mqtt.publish_packet import PublishHeader
from brokers.protocol.transport import BufferProvider, Delivery, Handler, Properties

log = logging.getLogger(__name__)

MATCH_CACHE_SIZE = 4096  # topics whose matches are cached; real processes see tens of topics


@dataclass(frozen=True, slots=True)
class Subscription:
    """A topic filter and the callbacks for the publications that match it; see `Transport.subscribe`.

    An exception in a callback is logged, without the payload, and ends no connection.
    """

    topic_filter: str
    handler: Handler
    qos: int = 0
    buffer_provider: BufferProvider | None = None
    manual_ack: bool = False

    def get_buffer(self, topic: str, properties: Properties, payload_bytes: int) -> memoryview | None:
        """Return the buffer for a payload, None for a new one."""
        if self.buffer_provider is None:
            return None
        try:
            return self.buffer_provider(topic, properties, payload_bytes)
        except Exception:
            log.exception("the buffer provider of %s failed on %d bytes", self.topic_filter, payload_bytes)
            return None

    def deliver(self, delivery: Delivery) -> None:
        """Call the handler. If it raises, acknowledge the delivery: redelivered, it would raise again."""
        try:
            self.handler(delivery)
        except Exception:
            log.exception("the handler of %s failed on %d bytes", self.topic_filter, delivery.payload.nbytes)
            if delivery.ack is not None:
                delivery.ack()


class Subscriptions:
    """The subscriptions of one client, by topic filter."""

    def __init__(self) -> None:
        self._by_filter: dict[str, Subscription] = {}
        self._by_topic: dict[str, tuple[Subscription, ...]] = {}

    def add(self, subscription: Subscription) -> None:
        """Add a subscription; raise ValueError if its filter has a handler: one of the two would never be called."""
        if subscription.topic_filter in self._by_filter:
            raise ValueError(f"{subscription.topic_filter!r} is subscribed already")
        self._by_filter[subscription.topic_filter] = subscription
        self._by_topic.clear()

    def remove(self, topic_filter: str) -> None:
        self._by_filter.pop(topic_filter, None)
        self._by_topic.clear()

    def matching(self, topic: str) -> tuple[Subscription, ...]:
        """Return the subscriptions that match, in the order in which they were added."""
        matches = self._by_topic.get(topic)
        if matches is None:
            matches = tuple(each for each in self._by_filter.values() if filter_matches(each.topic_filter, topic))
            if len(self._by_topic) >= MATCH_CACHE_SIZE:
                self._by_topic.clear()
            self._by_topic[topic] = matches
        return matches

    def __iter__(self) -> Iterator[Subscription]:
        return iter(tuple(self._by_filter.values()))

    def __contains__(self, topic_filter: str) -> bool:
        return topic_filter in self._by_filter


def split_shared_filter(topic_filter: str) -> tuple[str, str]:
    """Return the group and the plain filter of `$share/{group}/{filter}`; the group of a plain filter is ""."""
    if topic_filter.startswith("$share/"):
        group, _, plain = topic_filter[len("$share/") :].partition("/")
        return group, plain
    return "", topic_filter


def filter_matches(topic_filter: str, topic: str) -> bool:
    """Return whether a topic filter, shared or not, matches a topic."""
    pattern = split_shared_filter(topic_filter)[1].split("/")
    levels = topic.split("/")
    if topic.startswith("$") and pattern[0] in ("+", "#"):  # section 4.7.2
        return False
    if pattern[-1] == "#":
        pattern.pop()
        if len(levels) < len(pattern):
            return False
        levels = levels[: len(pattern)]
    return len(pattern) == len(levels) and all(one in ("+", level) for one, level in zip(pattern, levels, strict=True))


UNACKED_LIMIT_BYTES = 256 << 20


class AckConnection(Protocol):
    """The methods of `Connection` that `Unacked` uses."""

    def send_puback(self, packet_id: int) -> bool: ...

    def set_reading_paused(self, paused: bool) -> None: ...


@dataclass(eq=False, slots=True)
class UnackedPublish:
    """A pending publication, identified by its packet identifier and its content."""

    packet_id: int
    content_key: tuple[str, int, int]  # topic, length, CRC-32
    nbytes: int
    pending_handlers: int  # handlers that have not acknowledged it


class Unacked:
    """The pending publications of one client; reading pauses at `limit` of them or `limit_bytes` of payload."""

    def __init__(self, limit: int, limit_bytes: int = UNACKED_LIMIT_BYTES) -> None:
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._order: deque[UnackedPublish] = deque()  # of this connection, in order of arrival
        self._earlier: dict[int, UnackedPublish] = {}  # of earlier connections of this session, by packet identifier
        self._connection: AckConnection | None = None
        self._paused = False
        self.pending_count = 0
        self.pending_bytes = 0

    def attach(self, connection: AckConnection, session_present: bool) -> None:
        """Use a new connection; `session_present`: it continues the session of the last one."""
        self._earlier = {**self._earlier, **{each.packet_id: each for each in self._order}} if session_present else {}
        self._order.clear()
        self._connection = connection
        self._paused = False
        self._flush()

    def add(self, header: PublishHeader, payload: memoryview, handlers: int) -> UnackedPublish | None:
        """Add a publication that `handlers` handlers will acknowledge; return None if it is pending already."""
        content_key = (header.topic, payload.nbytes, zlib.crc32(payload))
        earlier = self._earlier.pop(header.packet_id, None)
        if earlier is not None and header.dup and earlier.content_key == content_key:
            self._order.append(earlier)
            self._flush()
            return None
        publish = UnackedPublish(header.packet_id, content_key, payload.nbytes, handlers)
        self._order.append(publish)
        if handlers:
            self.pending_count += 1
            self.pending_bytes += publish.nbytes
        self._flush()
        return publish

    def ack(self, publish: UnackedPublish) -> None:
        publish.pending_handlers -= 1
        if publish.pending_handlers == 0:
            self.pending_count -= 1
            self.pending_bytes -= publish.nbytes
            self._flush()

    def _flush(self) -> None:
        """Acknowledge the next ones in order, then pause or resume reading."""
        if self._connection is None:
            return
        while self._order and self._order[0].pending_handlers <= 0:
            if not self._connection.send_puback(self._order[0].packet_id):
                break
            self._order.popleft()
        count = max(len(self._order), self.pending_count)  # a finished one that waits for its turn would be redelivered
        full = count >= self._limit or self.pending_bytes >= self._limit_bytes
        if full != self._paused:
            self._paused = full
            self._connection.set_reading_paused(full)
