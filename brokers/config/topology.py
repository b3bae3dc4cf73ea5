"""The sites of a pipeline and the bridges between their brokers: who is reached by which bridge. Pure.

Bridges make a tree: there is one way from a site to another, so nothing can come twice or go round in circles. A site
in between passes on what is for those behind it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol


class _Link(Protocol):
    @property
    def to(self) -> str: ...


class _Site(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def links(self) -> Iterable[_Link]: ...


@dataclass(frozen=True, slots=True)
class BridgeSides:
    """What one bridge carries, as seen from the site that keeps it: the sites before it, and those behind it."""

    near: tuple[str, ...]
    far: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SiteTopology:
    """The tree. Raises `ValueError`, one line for the file's reader, for bridges that make none."""

    neighbours: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def from_sites(cls, sites: Iterable[_Site]) -> SiteTopology:
        """Read the bridges of `[[site]]` tables."""
        found = list(sites)
        tree = cls({site.name: [] for site in found})
        for site in found:
            for link in site.links:
                tree._join(site.name, link.to)
        return tree

    def _join(self, site: str, to: str) -> None:
        if to not in self.neighbours:
            known = ", ".join(name for name in self.neighbours if name != site) or "none"
            raise ValueError(f"site {site!r}: links to {to!r}, and there is no such [[site]]: expected one of {known}")
        way = self.path(to, site)
        if way:
            circle = " - ".join((site, *way))
            raise ValueError(f"site {site!r}: its link to {to!r} makes a bridge loop, {circle}: leave one of them out")
        self.neighbours[site].append(to)
        self.neighbours[to].append(site)

    def path(self, start: str, end: str) -> tuple[str, ...]:
        """Return the sites from `start` to `end`, both included; empty where no bridges lead there."""
        ways: list[tuple[str, ...]] = [(start,)]
        for way in ways:
            if way[-1] == end:
                return way
            ways += [(*way, name) for name in self.neighbours.get(way[-1], ()) if name not in way]
        return ()

    def reachable(self, start: str) -> frozenset[str]:
        """Return all sites that bridges connect with `start`, itself included."""
        return frozenset(name for name in self.neighbours if self.path(start, name))

    def bridge_sides(self, site: str, to: str) -> BridgeSides:
        """Return what the bridge from `site` to its neighbour `to` carries."""
        far = tuple(name for name in self.neighbours if to in self.path(site, name)[1:2])
        near = tuple(name for name in self.neighbours if name not in far and self.path(site, name))
        return BridgeSides(near, far)
