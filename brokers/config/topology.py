"""The sites of a pipeline as a tree of bridges between their brokers, and the topics that each bridge forwards.

In a tree there is one path between two sites, so that no message can arrive twice or circulate. A site on the path
forwards the messages for the sites behind it.

The site in a topic is that of its reader. So a bridge forwards, in each direction, the messages for the sites on the
other side. Presence goes the opposite way, since the reader of a presence record is the sender of tasks. No topic
matches rules of both directions, so a retained record is never sent back to where it came from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from brokers.config.schema import SiteTable, config_error
from brokers.errors import did_you_mean
from brokers.protocol.topics import all_presence_filter, inbound_filters


@dataclass(frozen=True, slots=True)
class BridgeSides:
    """The sites on both sides of a bridge; `near` is the side of the broker that runs it."""

    near: tuple[str, ...]
    far: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SiteTopology:
    """An undirected graph without loops: the neighbours of each site."""

    neighbours: dict[str, list[str]]

    @classmethod
    def from_sites(cls, sites: Sequence[SiteTable]) -> SiteTopology:
        """Read the links of `[[site]]` tables.

        Raises `ValueError` (`config_error`) if a link names an unknown site or closes a loop.
        """
        topology = cls({site.name: [] for site in sites})
        for site in sites:
            for link in site.links:
                topology._connect(site.name, link.to)
        return topology

    def _connect(self, site: str, to: str) -> None:
        if to not in self.neighbours:
            others = [name for name in self.neighbours if name != site]
            expected = f"expected one of {', '.join(others)}" if others else "the file has no other [[site]]"
            raise config_error(f"site.{site}.links", f"no site {to!r}{did_you_mean(to, others)}: {expected}")
        if path := self.path(to, site):
            loop = " - ".join((site, *path))
            raise config_error(f"site.{site}.links", f"the link to {to!r} makes a loop, {loop}: leave one link out")
        self.neighbours[site].append(to)
        self.neighbours[to].append(site)

    def path(self, start: str, end: str) -> tuple[str, ...]:
        """The sites from `start` to `end`, both included, once if they are one; empty if no bridges connect them."""
        paths: deque[tuple[str, ...]] = deque([(start,)])
        while paths:
            path = paths.popleft()
            if path[-1] == end:
                return path
            paths.extend((*path, name) for name in self.neighbours.get(path[-1], ()) if name not in path)
        return ()

    def bridge_sides(self, site: str, to: str) -> BridgeSides:
        """The sites on both sides of the bridge from `site` to its neighbour `to`."""
        # `to` is the first site after `site` on the path.
        far = tuple(name for name in self.neighbours if to in self.path(site, name)[1:2])
        near = tuple(name for name in self.neighbours if name not in far and self.path(site, name))
        return BridgeSides(near, far)


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
