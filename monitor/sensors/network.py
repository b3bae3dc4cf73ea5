"""Network interfaces: bytes and errors since the previous sample."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import psutil

from monitor.points.points import FieldValue
from monitor.sensors.base import Reading, Sensor
from monitor.sensors.counters import MonotonicCounter

# Byte counters have 32 bits on some drivers, and restart when an interface is removed and added again.
_ByteCounter = partial(MonotonicCounter, 1 << 32, restarts=True)


def read_interface_counters() -> Mapping[str, Any]:
    """The system's counters by interface; psutil's own `nowrap` would take each 32-bit wrap for a restart."""
    return psutil.net_io_counters(pernic=True, nowrap=False)


class _Interface:
    def __init__(self) -> None:
        self._received = _ByteCounter()
        self._sent = _ByteCounter()
        self._errors = MonotonicCounter()  # a sum of four counters: the increase after a restart is unknown

    def fields(self, counts: Any, elapsed_s: float) -> dict[str, FieldValue]:
        received = self._received.increase(counts.bytes_recv)
        sent = self._sent.increase(counts.bytes_sent)
        return {
            "received_bytes": received,
            "sent_bytes": sent,
            "received_bytes_per_s": received / elapsed_s if received is not None and elapsed_s > 0 else None,
            "sent_bytes_per_s": sent / elapsed_s if sent is not None and elapsed_s > 0 else None,
            "errors": self._errors.increase(_error_count(counts)),
        }


class NetworkSensor(Sensor):
    """The measurement `interface`: a point for each interface that has ever carried a packet.

    An interface has its first point in its second sample: its counters may include traffic from before it was moved
    here, as those of containers do.
    """

    name = "network"

    def __init__(self, read: Callable[[], Mapping[str, Any]] = read_interface_counters) -> None:
        super().__init__()
        self._read = read
        self._interfaces: dict[str, _Interface] = {}
        self._last_s = 0.0

    def measure(self, now_s: float) -> Iterator[Reading]:
        """The interfaces in the system's order; none for the first sample."""
        try:
            counters = self._read()
        except (OSError, RuntimeError, psutil.Error) as error:
            self._interfaces = {}
            yield from self.report_missing("", error)
            return
        elapsed_s = now_s - self._last_s
        self._last_s = now_s
        known = self._interfaces
        self._interfaces = {name: known.get(name) or _Interface() for name in counters}
        for name, counts in counters.items():
            fields = self._interfaces[name].fields(counts, elapsed_s)
            if name in known and any((counts.bytes_recv, counts.bytes_sent, _error_count(counts))):
                yield "interface", {"interface": name}, fields


def _error_count(counts: Any) -> int:
    return int(counts.errin + counts.errout + counts.dropin + counts.dropout)
