"""The brokers of a run: one for each site, with bridges between them and links that are as slow as the file says.

On one machine, Mosquittos are started, and a relay for each link that has a delay or a rate. Where all sites share a
broker (an address that was given, or the embedded one, which keeps no bridges) nothing crosses a link.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self

from brokers.config.bridge_rules import Bridge
from brokers.config.pipeline_file import Pipeline, resolve_broker_address
from brokers.config.schema import LinkTable, SiteTable
from brokers.errors import BadFile
from brokers.protocol.broker_url import parse_address
from brokers.server import mosquitto_conf as mosquitto
from brokers.server.link_emulator import LinkEmulator
from brokers.server.local_broker import BrokerKind, start_broker
from monitor.launch.broker import RunBroker, default_broker_port, start_run_broker

log = logging.getLogger(__name__)

_KINDS: dict[str, BrokerKind] = {"mosquitto": "mosquitto", "embedded": "embedded"}


@dataclass(frozen=True, slots=True)
class EmulatedLink:
    """A link that a relay stands for."""

    site: str
    config: LinkTable
    emulator: LinkEmulator

    def summary(self) -> dict[str, Any]:
        """What the summary says of it: bytes that have come out at `to`, and at `site`."""
        table, crossed = self.config, self.emulator.byte_counts
        return {
            "site": self.site,
            "to": table.to,
            "delay_ms": table.delay_ms,
            "rate_mbit": table.rate_mbit,
            "bytes_out": crossed.outbound,
            "bytes_in": crossed.inbound,
        }


@dataclass(eq=False)
class SiteBrokers:
    """The brokers by site; what was started ends with the `with` block."""

    source_site: str  # the site of the source
    brokers: dict[str, RunBroker]
    links: list[EmulatedLink] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)

    def address(self, site: str) -> str:
        """Where the broker of a site is; may hold a password."""
        return self.brokers[site].address

    @property
    def source_broker(self) -> RunBroker:
        """The one at the source's site."""
        return self.brokers[self.source_site]

    @property
    def _distinct(self) -> dict[RunBroker, str]:
        """Each broker once, though sites may share it."""
        return {broker: site for site, broker in self.brokers.items()}

    @property
    def description(self) -> str:
        """How a person tells which brokers these are."""
        if len(self._distinct) > 1:
            return "; ".join(f"{site} {broker.redacted_address}" for site, broker in self.brokers.items())
        return (
            self.source_broker.redacted_address
            if self.source_broker.local_broker is None
            else f"{self.source_broker.label} {self.source_broker.redacted_address}"
        )

    @property
    def exited(self) -> list[tuple[str, RunBroker]]:
        """Those of ours that are no more, with their sites, or one of these where several share it."""
        return [(site, broker) for broker, site in self._distinct.items() if broker.has_exited]

    @property
    def restarts(self) -> int:
        return sum(broker.restarts for broker in self._distinct)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, pipeline: Pipeline, port: int) -> None:
        """Start a Mosquitto for each site, those that others keep a bridge to before these others."""
        with ExitStack() as undo:
            undo.callback(self._stack.close)
            self._start_all(pipeline, port)
            undo.pop_all()

    def _start_all(self, pipeline: Pipeline, port: int) -> None:
        tables = {site.name: site for site in pipeline.site}
        bridged = {link.to for site in tables.values() for link in site.links}
        for site in _dialled_first(tables, pipeline.topology.reachable(self.source_site)):
            bridges = tuple(self._bridge(pipeline, tables[site], link) for link in tables[site].links)
            own = start_broker(
                kind="mosquitto",
                port=port if site == self.source_site else 0,
                bridges=bridges,
                accepts_bridges=site in bridged,
            )
            self.brokers[site] = RunBroker(own.address, own, bridges, site in bridged)
            self._stack.callback(self.brokers[site].stop)

    def _bridge(self, pipeline: Pipeline, site: SiteTable, link: LinkTable) -> Bridge:
        own = self.brokers[link.to].local_broker
        assert own is not None, "started before"
        port = own.port
        if link.is_emulated:
            relay = LinkEmulator(port, delay_ms=link.delay_ms, rate_mbit=link.rate_mbit)
            relay.start()
            self._stack.callback(relay.stop)
            self.links.append(EmulatedLink(site.name, link, relay))
            port = relay.port
        return Bridge(site.name, link.to, own.host, port, pipeline.topology.bridge_sides(site.name, link.to))

    @classmethod
    def with_shared_broker(cls, pipeline: Pipeline, broker: RunBroker) -> SiteBrokers:
        """One broker for all sites."""
        found = cls(pipeline.source.site, dict.fromkeys(pipeline.used_sites, broker))
        found._stack.callback(broker.stop)
        return found


def set_up_brokers(pipeline: Pipeline, choice: str | None, port: int | None) -> SiteBrokers:
    """The brokers of a choice: an address, a kind to start; left out, those that are named, else ones of ours."""
    if choice is not None and choice not in _KINDS:
        parse_address(choice)  # a mistake in it is told before anything is started
        return SiteBrokers.with_shared_broker(pipeline, RunBroker(choice))
    if choice is None and port is None and (named := _named(pipeline)):
        return SiteBrokers(pipeline.source.site, named)
    kind = _KINDS.get(choice or "")
    if len(pipeline.used_sites) == 1 or not _bridges_possible(kind):
        return SiteBrokers.with_shared_broker(pipeline, start_run_broker(pipeline, kind, port))
    sites = SiteBrokers(pipeline.source.site, {})
    sites.start(pipeline, default_broker_port(pipeline) if port is None else port)
    return sites


def _named(pipeline: Pipeline) -> dict[str, RunBroker]:
    """The brokers that the file or the environment names, by site; none where it names none."""
    found = {site: resolve_broker_address(pipeline, site) for site in pipeline.used_sites}
    named = {site: address for site, address in found.items() if address}
    if named and len(named) < len(found):
        lacking = next(site for site in found if site not in named)
        raise BadFile(
            pipeline.path,
            f"site {next(iter(named))!r} has a broker and site {lacking!r} has none: give each site one, or none, "
            "or say --broker mosquitto to have all of them started here",
            "site",
        )
    brokers: dict[str, RunBroker] = {}
    for address in named.values():
        parse_address(address)
        brokers.setdefault(address, RunBroker(address))
    return {site: brokers[address] for site, address in named.items()}


def _bridges_possible(kind: BrokerKind | None) -> bool:
    if kind == "embedded" or mosquitto.find_mosquitto() is None:
        log.warning("the embedded broker keeps no bridges: all sites share one, and nothing crosses a link")
        return False
    return True


def _dialled_first(tables: dict[str, SiteTable], wanted: frozenset[str]) -> Iterator[str]:
    """The sites in an order in which each comes after those that its bridges lead to."""
    done: set[str] = set()
    while left := [site for site in tables if site in wanted and site not in done]:
        ready = [site for site in left if all(link.to in done for link in tables[site].links)]
        yield from ready
        done.update(ready)
