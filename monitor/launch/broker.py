"""A broker of a run: one that runs somewhere, or one of our own, which is started again should it die."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from brokers.config.bridge_rules import Bridge
from brokers.config.pipeline_file import Pipeline
from brokers.errors import PortTaken, UsageError
from brokers.protocol.broker_url import MQTT_PORT, parse_address
from brokers.server.local_broker import BrokerKind, LocalBroker, is_port_free, start_broker
from monitor.errors import BrokerGone
from monitor.launch.child_process import STABLE_AFTER_S

log = logging.getLogger(__name__)

# A broker that dies whenever it is started would go on for ever.
_RESTART_LIMIT = 20
# What a broker that died leaves behind may hold its port a little longer.
_PORT_WAIT_S = 5.0
_POLL_S = 0.1


@dataclass(eq=False)
class RunBroker:
    """Where the broker is; and, if it is ours, the broker itself."""

    address: str = field(repr=False)  # may hold a password
    local_broker: LocalBroker | None = None
    bridges: tuple[Bridge, ...] = ()  # that a broker of ours keeps to others
    accepts_bridges: bool = False  # whether others keep one to it
    restarts: int = 0
    _in_a_row: int = field(default=0, repr=False)
    _begun_s: float = field(default_factory=time.monotonic, repr=False)

    @property
    def redacted_address(self) -> str:
        """The address as people may see it."""
        return str(parse_address(self.address))

    @property
    def label(self) -> str:
        """What the summary calls it."""
        return self.local_broker.kind if self.local_broker else self.redacted_address

    @property
    def has_exited(self) -> bool:
        """Whether it was ours, and is no more."""
        return self.local_broker is not None and not self.local_broker.is_running

    def restart(self) -> None:
        """Start a broker of ours that has ended again, at the same port; blocks. Raises `BrokerGone`."""
        assert self.local_broker is not None
        kind, said = self.local_broker.kind, self.local_broker.last_output()
        if time.monotonic() - self._begun_s >= STABLE_AFTER_S:
            self._in_a_row = 0
        if self._in_a_row >= _RESTART_LIMIT:
            raise BrokerGone(kind, self.redacted_address, said, f"it was started again {self._in_a_row} times already")
        try:
            self.local_broker = self._started_at(kind, self.local_broker.port)
        except UsageError as error:  # at the start of a run a person's mistake, and by now none any more
            raise BrokerGone(kind, self.redacted_address, said, str(error)) from error
        self.restarts += 1
        self._in_a_row += 1
        self._begun_s = time.monotonic()

    def stop(self) -> None:
        """End a broker of ours. May be called twice."""
        if self.local_broker is not None:
            self.local_broker.stop()

    def _started_at(self, kind: BrokerKind, port: int) -> LocalBroker:
        end_s = time.monotonic() + _PORT_WAIT_S
        while True:
            try:
                return start_broker(kind=kind, port=port, bridges=self.bridges, accepts_bridges=self.accepts_bridges)
            except PortTaken:
                if time.monotonic() > end_s:
                    raise
            time.sleep(_POLL_S)


def start_run_broker(pipeline: Pipeline, kind: BrokerKind | None, port: int | None) -> RunBroker:
    """A broker of our own for all of the pipeline's sites.

    Any free port will do for a run of its own; foreign clients expect to find the gateway at the usual one.
    """
    port = default_broker_port(pipeline) if port is None else port
    own = start_broker(kind=kind, port=port)
    return RunBroker(own.address, own)


def default_broker_port(pipeline: Pipeline) -> int:
    """Where the broker at the source's site listens unless told: 0 is any free port."""
    if pipeline.source.kind != "ingress":
        return 0
    if is_port_free(MQTT_PORT):
        return MQTT_PORT
    log.warning("port %d is taken: the broker of this run listens on another", MQTT_PORT)
    return 0
