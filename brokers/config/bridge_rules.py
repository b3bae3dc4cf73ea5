"""What a bridge between two sites' brokers carries, as Mosquitto's rules. Pure.

The site in a topic is that of its reader, so a bridge takes out what is for the sites behind it, and in what is for
those before it. Presence goes the other way: whoever sends to a worker reads its record. No topic matches a rule of
both directions, so a retained record is never offered back to where it came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from brokers.config.topology import BridgeSides
from brokers.protocol.topics import all_presence_filter, inbound_filters


@dataclass(frozen=True, slots=True)
class Bridge:
    """One bridge, as the broker that keeps it is told of it."""

    site: str
    to: str
    host: str
    port: int
    sides: BridgeSides
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Path | None = None  # a folder of `sparse certs`: who we are, and whom to believe

    @property
    def name(self) -> str:
        return f"{self.site}-to-{self.to}"


@dataclass(frozen=True, slots=True)
class TopicRule:
    """One `topic` line."""

    topic_filter: str
    direction: Literal["in", "out"]
    qos: Literal[0, 1]


def topic_rules(sides: BridgeSides) -> Iterator[TopicRule]:
    """Yield what crosses, by the words of the broker that keeps the bridge."""
    yield from _one_way("out", "in", sides.far)
    yield from _one_way("in", "out", sides.near)


def _one_way(towards: Literal["in", "out"], back: Literal["in", "out"], sites: tuple[str, ...]) -> Iterator[TopicRule]:
    for site in sites:
        for topic_filter, qos in inbound_filters(site):
            yield TopicRule(topic_filter, towards, qos)
        yield TopicRule(all_presence_filter(site), back, 1)
