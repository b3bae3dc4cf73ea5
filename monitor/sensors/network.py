"""Network interfaces: what each has carried since the last sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import psutil

from monitor.points.points import FieldValue, TelemetryPoint
from monitor.sensors.base import UnavailableSensors, error_reason

_RANGE_32 = 1 << 32


class _InterfaceCounters(NamedTuple):
    received: int
    sent: int
    errors: int


def read_interface_counters() -> Mapping[str, Any]:
    """By interface, as the system has them: psutil's own `nowrap` takes each wrap for a new beginning."""
    return psutil.net_io_counters(pernic=True, nowrap=False)


class NetworkSensor:
    """The measurement `interface`: one point for each that was there at the last sample too, and ever carried anything.

    One that is new has no point yet: it may have carried anything before it came here, as those of containers do.
    """

    def __init__(self, read: Callable[[], Mapping[str, Any]] = read_interface_counters) -> None:
        self._read = read
        self._last: dict[str, _InterfaceCounters] = {}
        self._last_s = 0.0
        self._missing = UnavailableSensors()

    def sample(self, time_ns: int, now_s: float) -> list[TelemetryPoint]:
        """The points, by the interfaces' order; none for the first sample."""
        try:
            found = {name: _totals(counts) for name, counts in self._read().items()}
        except (OSError, RuntimeError, psutil.Error) as error:
            self._last = {}
            return self._missing.report_once(time_ns, "interface", error_reason(error))
        last, self._last = self._last, found
        elapsed_s, self._last_s = now_s - self._last_s, now_s
        return [
            TelemetryPoint("interface", time_ns, {"interface": name}, _fields(last[name], totals, elapsed_s))
            for name, totals in found.items()
            if name in last and any(totals)
        ]

    def close(self) -> None:
        """Nothing is held."""


def counter_delta(last: int, value: int) -> int:
    """What a counter counted from one value to the next.

    A lower value is that of a counter of 32 bits that went past its end, if half its range or less explains it; else
    of one that started again at 0, as an interface does that was taken away and came back: then it is what was counted
    since, and what came before is lost.
    """
    if value >= last:
        return value - last
    wrapped = value + _RANGE_32 - last
    return wrapped if last < _RANGE_32 and wrapped <= _RANGE_32 // 2 else value


def _totals(counts: Any) -> _InterfaceCounters:
    return _InterfaceCounters(
        counts.bytes_recv, counts.bytes_sent, counts.errin + counts.errout + counts.dropin + counts.dropout
    )


def _fields(last: _InterfaceCounters, totals: _InterfaceCounters, elapsed_s: float) -> dict[str, FieldValue]:
    received, sent = counter_delta(last.received, totals.received), counter_delta(last.sent, totals.sent)
    return {
        "received_bytes": received,
        "sent_bytes": sent,
        "received_bytes_per_s": received / elapsed_s if elapsed_s > 0 else None,
        "sent_bytes_per_s": sent / elapsed_s if elapsed_s > 0 else None,
        # A sum of four counters: where one starts again, nobody knows what the sum was.
        "errors": totals.errors - last.errors if totals.errors >= last.errors else None,
    }
