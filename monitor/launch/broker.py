"""The MQTT broker of a site: one that runs already, or one that the run starts, and restarts after a crash."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from brokers.config.bridge_rules import Bridge
from brokers.errors import PortTaken, SparseError, UsageError
from brokers.protocol.broker_url import parse_address
from brokers.server.local_broker import BrokerKind, LocalBroker, start_broker
from monitor.launch.child_process import RestartLimit

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
