"""The broker of a run: one that runs somewhere, or one of our own, which is started again should it die."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import Self

from brokers.address import MQTT_PORT, parse_address
from brokers.errors import PortTaken, UsageError
from brokers.pipeline import Pipeline, broker_address
from brokers.site import Kind, LocalBroker, start_broker
from monitor.children import STEADY_S
from monitor.errors import BrokerGone

log = logging.getLogger(__name__)

_KINDS: dict[str, Kind] = {"mosquitto": "mosquitto", "embedded": "embedded"}
# A broker that dies whenever it is started would go on for ever.
_RESTART_LIMIT = 20
# What a broker that died leaves behind may hold its port a little longer.
_PORT_WAIT_S = 5.0
_POLL_S = 0.1


@dataclass(eq=False)
class RunBroker:
    """Where the broker is; and, if it is ours, the broker itself, which ends with the `with` block."""

    address: str = field(repr=False)  # may hold a password
    own: LocalBroker | None = None
    restarts: int = 0
    _in_a_row: int = field(default=0, repr=False)
    _begun_s: float = field(default_factory=time.monotonic, repr=False)

    @property
    def shown(self) -> str:
        """The address as people may see it."""
        return str(parse_address(self.address))

    @property
    def label(self) -> str:
        """What the summary calls it."""
        return self.own.kind if self.own else self.shown

    @property
    def ended(self) -> bool:
        """Whether it was ours, and is no more."""
        return self.own is not None and not self.own.running

    def restart(self) -> None:
        """Start a broker of ours that has ended again, at the same port; blocks. Raises `BrokerGone`."""
        assert self.own is not None
        kind, said = self.own.kind, self.own.last_words()
        if time.monotonic() - self._begun_s >= STEADY_S:
            self._in_a_row = 0
        if self._in_a_row >= _RESTART_LIMIT:
            raise BrokerGone(kind, self.shown, said, f"it was started again {self._in_a_row} times already")
        try:
            self.own = _started_at(kind, self.own.port)
        except UsageError as error:  # at the start of a run a person's mistake, and by now none any more
            raise BrokerGone(kind, self.shown, said, str(error)) from error
        self.restarts += 1
        self._in_a_row += 1
        self._begun_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.own is not None:
            self.own.stop()


def find_broker(pipeline: Pipeline, choice: str | None, port: int | None) -> RunBroker:
    """The broker of a choice: an address, a kind to start one of; left out, the one that is named, else one of ours."""
    if choice is not None and choice not in _KINDS:
        parse_address(choice)  # a mistake in it is told before anything is started
        return RunBroker(choice)
    if choice is None and port is None and (named := broker_address(pipeline, pipeline.source.site)):
        parse_address(named)
        return RunBroker(named)
    own = _start_own(pipeline, _KINDS.get(choice or ""), port)
    return RunBroker(own.address, own)


def _start_own(pipeline: Pipeline, kind: Kind | None, port: int | None) -> LocalBroker:
    """Any free port will do for a run of its own; foreign clients expect to find the gateway at the usual one."""
    if port is None and pipeline.source.kind == "ingress":
        with contextlib.suppress(PortTaken):
            return start_broker(kind=kind, port=MQTT_PORT)
        log.warning("port %d is taken: the broker of this run listens on another", MQTT_PORT)
    return start_broker(kind=kind, port=port or 0)


def _started_at(kind: Kind, port: int) -> LocalBroker:
    end_s = time.monotonic() + _PORT_WAIT_S
    while True:
        try:
            return start_broker(kind=kind, port=port)
        except PortTaken:
            if time.monotonic() > end_s:
                raise
        time.sleep(_POLL_S)
