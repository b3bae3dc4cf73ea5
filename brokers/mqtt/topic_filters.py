"""Who wants what: topic filters with their handlers, and which of them a topic matches (MQTT 5.0 section 4.7). Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from brokers.protocol.transport import BufferProvider, Handler

MATCH_CACHE_SIZE = 4096  # topics whose matches are kept; real processes see tens


@dataclass(frozen=True, slots=True)
class Subscription:
    """One filter and what to do with what matches it."""

    topic_filter: str
    handler: Handler
    qos: int = 0
    buffer_provider: BufferProvider | None = None
    manual_ack: bool = False


class Subscriptions:
    """The subscriptions of one client, by filter."""

    def __init__(self) -> None:
        self._by_filter: dict[str, Subscription] = {}
        self._by_topic: dict[str, tuple[Subscription, ...]] = {}

    def add(self, subscription: Subscription) -> None:
        """Add one; raise ValueError when the filter has a handler already: one of the two would never be called."""
        if subscription.topic_filter in self._by_filter:
            raise ValueError(f"{subscription.topic_filter!r} is subscribed already")
        self._by_filter[subscription.topic_filter] = subscription
        self._by_topic.clear()

    def remove(self, topic_filter: str) -> None:
        self._by_filter.pop(topic_filter, None)
        self._by_topic.clear()

    def matching(self, topic: str) -> tuple[Subscription, ...]:
        """Return every subscription that matches, in the order in which they were added."""
        found = self._by_topic.get(topic)
        if found is None:
            found = tuple(each for each in self._by_filter.values() if filter_matches(each.topic_filter, topic))
            if len(self._by_topic) >= MATCH_CACHE_SIZE:
                self._by_topic.clear()
            self._by_topic[topic] = found
        return found

    def __iter__(self) -> Iterator[Subscription]:
        return iter(tuple(self._by_filter.values()))

    def __contains__(self, topic_filter: str) -> bool:
        return topic_filter in self._by_filter


def split_shared_filter(topic_filter: str) -> tuple[str, str]:
    """Return the group and the plain filter of `$share/{group}/{filter}`; the group is "" for a plain filter."""
    if topic_filter.startswith("$share/"):
        group, _, plain = topic_filter[len("$share/") :].partition("/")
        return group, plain
    return "", topic_filter


def filter_matches(topic_filter: str, topic: str) -> bool:
    """Return whether a filter, shared or not, matches a topic."""
    wanted = split_shared_filter(topic_filter)[1].split("/")
    levels = topic.split("/")
    if topic.startswith("$") and wanted[0] in ("+", "#"):  # section 4.7.2
        return False
    if wanted[-1] == "#":
        wanted.pop()
        if len(levels) < len(wanted):
            return False
        levels = levels[: len(wanted)]
    return len(wanted) == len(levels) and all(want in ("+", level) for want, level in zip(wanted, levels, strict=True))
