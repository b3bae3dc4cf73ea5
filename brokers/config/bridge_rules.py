"""The topics that a bridge between the brokers of two sites forwards, as Mosquitto's rules.

The site in a topic is that of its reader. So a bridge forwards, in each direction, the messages for the sites on the
other side. Presence goes the opposite way, since the reader of a presence record is the sender of tasks. No topic
matches rules of both directions, so a retained record is never sent back to where it came from.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from brokers.config.topology import BridgeSides
from brokers.protocol.topics import all_presence_filter, inbound_filters

Direction = Literal["in", "out"]


@dataclass(frozen=True, slots=True)
class Bridge:
    """The settings of one bridge in the broker of `site`, which runs it."""

    site: str
    to: str
    host: str
    port: int
    sides: BridgeSides
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Path | None = None  # the folder of ca.crt, tls.crt and tls.key

    @property
    def name(self) -> str:
        return f"{self.site}-to-{self.to}"


@dataclass(frozen=True, slots=True)
class TopicRule:
    """One `topic` line; `out` is away from the broker that runs the bridge."""

    topic_filter: str
    direction: Direction
    qos: Literal[0, 1]


def topic_rules(sides: BridgeSides) -> Iterator[TopicRule]:
    """Yield the rules of a bridge."""
    yield from _rules_for(sides.far, "out", "in")
    yield from _rules_for(sides.near, "in", "out")


def _rules_for(sites: tuple[str, ...], inbound: Direction, presence: Direction) -> Iterator[TopicRule]:
    for site in sites:
        for topic_filter, qos in inbound_filters(site):
            yield TopicRule(topic_filter, inbound, qos)
        yield TopicRule(all_presence_filter(site), presence, 1)
