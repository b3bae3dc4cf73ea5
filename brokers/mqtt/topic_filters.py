"""Subscriptions of a client, and which of them a topic matches (MQTT 5.0 section 4.7)."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

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
    return len(pattern) == len(levels) and all(
        each in ("+", level) for each, level in zip(pattern, levels, strict=True)
    )
