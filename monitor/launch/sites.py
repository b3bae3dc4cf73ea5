"""The brokers of a run: one per site, with bridges between them and the delay and rate of each link.

On one machine that is a Mosquitto per site, and a link emulator for each link with a delay or a rate. Where all sites
share one broker (a given address, or the embedded broker, which has no bridges) nothing crosses a link.
"""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from typing import Any, Self

from brokers.config.pipeline_file import Pipeline, resolve_broker_address
from brokers.config.schema import LinkTable, SiteTable
from brokers.config.topology import Bridge
from brokers.errors import PortTaken, SparseError, UsageError
from brokers.protocol.broker_url import MQTT_PORT, parse_address
from brokers.server.link_emulator import LinkEmulator
from brokers.server.local_broker import BrokerKind, LocalBroker, is_port_free, start_broker
from brokers.server.mosquitto_conf import find_mosquitto
from monitor.launch.child_process import RestartLimit

log = logging.getLogger(__name__)

_KINDS: dict[str | None, BrokerKind] = {"mosquitto": "mosquitto", "embedded": "embedded"}
# How long the port of a broker that crashed may stay taken.
_PORT_WAIT_S = 5.0
_POLL_S = 0.1


@dataclass(eq=False)
class RunBroker:
    """A broker that a run uses; `local_broker` is the process where the run started it."""

    address: str = field(repr=False)  # may hold a password
    local_broker: LocalBroker | None = None
    bridges: tuple[Bridge, ...] = ()  # from `local_broker` to other sites' brokers
    accepts_bridges: bool = False  # from other sites' brokers
    restarts: int = 0
    _limit: RestartLimit = field(default_factory=RestartLimit, repr=False)

    @classmethod
    def start(
        cls, kind: BrokerKind | None, port: int, bridges: tuple[Bridge, ...] = (), accepts_bridges: bool = False
    ) -> RunBroker:
        """Start a broker on this machine; port 0 is any free port. Raises as `start_broker`."""
        broker = cls("", None, bridges, accepts_bridges)
        broker._start(kind, port)
        return broker

    def _start(self, kind: BrokerKind | None, port: int) -> None:
        self.local_broker = start_broker(
            kind=kind, port=port, bridges=self.bridges, accepts_bridges=self.accepts_bridges
        )
        self.address = self.local_broker.address
        self._limit.record_start()

    @property
    def redacted_address(self) -> str:
        """The address without its password."""
        return str(parse_address(self.address))

    @property
    def label(self) -> str:
        """The kind of a broker that the run started; else its address."""
        return self.local_broker.kind if self.local_broker else self.redacted_address

    @property
    def has_exited(self) -> bool:
        """Whether the run started it and its process has ended."""
        return self.local_broker is not None and not self.local_broker.is_running

    def restart(self) -> None:
        """Start a broker that has exited again, at the same port; blocks.

        Raises `SparseError` ("BrokerGone") after too many restarts in a row, and where it does not start.
        """
        exited = self.local_broker
        assert exited is not None
        last_output = exited.last_output()
        if self._limit.is_reached:
            raise self._gone(last_output, f"it was restarted {self._limit.limit} times in a row")
        deadline_s = time.monotonic() + _PORT_WAIT_S
        while self.local_broker is exited:
            try:
                self._start(exited.kind, exited.port)
            except UsageError as error:  # at the first start a mistake of the user's, which it cannot be any more
                if not isinstance(error, PortTaken) or time.monotonic() > deadline_s:
                    raise self._gone(last_output, str(error)) from error
                time.sleep(_POLL_S)
        self.restarts += 1

    def stop(self) -> None:
        """Stop the broker if the run started it. May be called twice."""
        if self.local_broker is not None:
            self.local_broker.stop()

    def _gone(self, last_output: str, reason: str) -> SparseError:
        output = f" ({last_output})" if last_output else ""
        return SparseError(
            "BrokerGone",
            f"the {self.label} broker at {self.redacted_address} exited{output} and cannot be restarted: {reason}",
            kind=self.label,
            address=self.redacted_address,
            reason=reason,
        )


@dataclass(frozen=True, slots=True)
class EmulatedLink:
    """A link from `site` to `config.to` that a link emulator imposes."""

    site: str
    config: LinkTable
    emulator: LinkEmulator

    def summary(self) -> dict[str, Any]:
        """The link's settings, and the bytes that have arrived at `to` (out) and at `site` (in)."""
        counts = self.emulator.byte_counts
        return {
            "site": self.site,
            "to": self.config.to,
            "delay_ms": self.config.delay_ms,
            "rate_mbit": self.config.rate_mbit,
            "bytes_out": counts["outbound"],
            "bytes_in": counts["inbound"],
        }


@dataclass(eq=False)
class SiteBrokers:
    """The broker of each site; leaving the `with` block stops those that the run started."""

    source_site: str  # the site of the source
    brokers: dict[str, RunBroker]  # by site; sites may share one
    links: list[EmulatedLink] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)

    def address(self, site: str) -> str:
        """The address of a site's broker; may hold a password."""
        return self.brokers[site].address

    @property
    def source_broker(self) -> RunBroker:
        return self.brokers[self.source_site]

    @property
    def _distinct(self) -> dict[RunBroker, str]:
        """Each broker once, with one of its sites."""
        return {broker: site for site, broker in self.brokers.items()}

    @property
    def description(self) -> str:
        """The brokers' kinds and addresses, for the live view."""
        if len(self._distinct) > 1:
            return "; ".join(f"{site} {broker.redacted_address}" for site, broker in self.brokers.items())
        return " ".join(dict.fromkeys((self.source_broker.label, self.source_broker.redacted_address)))

    @property
    def exited(self) -> list[tuple[str, RunBroker]]:
        """The brokers that the run started and that have exited, each with one of its sites."""
        return [(site, broker) for broker, site in self._distinct.items() if broker.has_exited]

    @property
    def restarts(self) -> int:
        return sum(broker.restarts for broker in self._distinct)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @classmethod
    def share(cls, pipeline: Pipeline, broker: RunBroker) -> SiteBrokers:
        """One broker for all sites."""
        sites = cls(pipeline.source.site, dict.fromkeys(pipeline.used_sites, broker))
        sites._stack.callback(broker.stop)
        return sites

    @classmethod
    def start(cls, pipeline: Pipeline, port: int) -> SiteBrokers:
        """Start a Mosquitto per site, with bridges; `port` is that of the source's site, 0 any free one."""
        sites = cls(pipeline.source.site, {})
        tables = {site.name: site for site in pipeline.site}
        connected = [name for name in tables if pipeline.topology.path(sites.source_site, name)]
        targets = {name: [link.to for link in tables[name].links] for name in connected}
        bridged = {to for links in targets.values() for to in links}
        with ExitStack() as started:
            for site in TopologicalSorter(targets).static_order():  # a site after those that it has bridges to
                bridges = tuple(sites._bridge(pipeline, tables[site], link, started) for link in tables[site].links)
                site_port = port if site == sites.source_site else 0
                sites.brokers[site] = RunBroker.start("mosquitto", site_port, bridges, site in bridged)
                started.callback(sites.brokers[site].stop)
            sites._stack = started.pop_all()
        return sites

    def _bridge(self, pipeline: Pipeline, site: SiteTable, link: LinkTable, started: ExitStack) -> Bridge:
        target = self.brokers[link.to].local_broker
        assert target is not None, "its broker was started before"
        port = target.port
        if link.is_emulated:
            emulator = LinkEmulator(port, delay_ms=link.delay_ms, rate_mbit=link.rate_mbit)
            emulator.start()
            started.callback(emulator.stop)
            self.links.append(EmulatedLink(site.name, link, emulator))
            port = emulator.port
        return Bridge(site.name, link.to, target.host, port, pipeline.topology.bridge_sides(site.name, link.to))


def set_up_brokers(pipeline: Pipeline, choice: str | None, port: int | None) -> SiteBrokers:
    """Find or start the brokers of a pipeline's sites.

    `choice` is an address, or the kind of broker to start. Without it the brokers are those that the file or the
    environment names; without names, and also where a `port` is given, brokers are started.
    """
    kind = _KINDS.get(choice)
    if choice is not None and kind is None:
        parse_address(choice)  # raises before anything is started
        return SiteBrokers.share(pipeline, RunBroker(choice))
    if choice is None and port is None and (named := _named_brokers(pipeline)):
        return SiteBrokers(pipeline.source.site, named)
    port = _default_port(pipeline) if port is None else port
    if len(pipeline.used_sites) == 1 or not _can_bridge(kind):
        return SiteBrokers.share(pipeline, RunBroker.start(kind, port))
    return SiteBrokers.start(pipeline, port)


def _default_port(pipeline: Pipeline) -> int:
    """Any free port (0); for an ingress, whose clients expect it there, MQTT's own where it is free."""
    if pipeline.source.kind != "ingress":
        return 0
    if is_port_free(MQTT_PORT):
        return MQTT_PORT
    log.warning("port %d is taken: the broker of this run listens on another one", MQTT_PORT)
    return 0


def _named_brokers(pipeline: Pipeline) -> dict[str, RunBroker]:
    """The brokers that the file or the environment names, by site; empty where it names none."""
    addresses = {site: resolve_broker_address(pipeline, site) for site in pipeline.used_sites}
    named = {site: address for site, address in addresses.items() if address}
    if named and len(named) < len(addresses):
        with_broker = next(iter(named))
        without = next(site for site in addresses if site not in named)
        raise UsageError(
            "MissingBroker",
            f"{pipeline.path}: site: {with_broker!r} has a broker and {without!r} has none: name a broker for every "
            "site or for none, or start one for each site here with --broker mosquitto",
            key="site",
            path=pipeline.path,
            site=without,
        )
    brokers: dict[str, RunBroker] = {}
    for address in named.values():
        parse_address(address)
        brokers.setdefault(address, RunBroker(address))
    return {site: brokers[address] for site, address in named.items()}


def _can_bridge(kind: BrokerKind | None) -> bool:
    if kind == "embedded" or find_mosquitto() is None:
        log.warning("the embedded broker has no bridges: all sites share one broker, and nothing crosses a link")
        return False
    return True
