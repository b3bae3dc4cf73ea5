"""Differences of hardware counters, energy from power, and which power rails add up.

A rail of the measurement `power` whose name has no slash is one part of the node's power, and no two of them measure
the same energy: their sum is the node's. A rail with a slash must not be added: it is a part of the rail before the
slash (`package-0/core`), a total whose parts are rails too (`board/psys`), or of another board (`carrier/VDD_MUX`).
"""

from monitor.points.points import TelemetryPoint


def is_additive(rail: str) -> bool:
    """Whether a rail counts in the sum of its node."""
    return "/" not in rail


def additive_energy_j(point: TelemetryPoint) -> float | None:
    """The energy in a point of a GPU or an additive rail; None for other points, and where it is unknown."""
    energy_j = point.fields.get("energy_j")
    counts = point.measurement == "gpu" or (point.measurement == "power" and is_additive(point.tags["rail"]))
    return float(energy_j) if counts and energy_j is not None else None


class MonotonicCounter:
    """Increases of a counter that may wrap around or restart at 0.

    `wraps_at`: the size of its range, which it passes at most once between two readings. `restarts`: it may also
    start again at 0; then a drop is taken for a wrap only if that makes the increase at most half the range.
    """

    def __init__(self, wraps_at: int | None = None, *, restarts: bool = False) -> None:
        self._wraps_at = wraps_at
        self._restarts = restarts
        self._last: int | None = None

    def increase(self, value: int | None) -> int | None:
        """The increase since the previous reading `value`; None where it is unknown.

        It is unknown for the first reading, for a reading that failed (`value` None) and the one after it, and for a
        drop of a counter that neither wraps nor restarts. After a restart it is the value itself.
        """
        last = self._last
        self._last = value
        if value is None or last is None:
            return None
        if value >= last:
            return value - last
        if self._wraps_at is None or last > self._wraps_at:
            return value if self._restarts else None
        wrapped = value + self._wraps_at - last
        return value if self._restarts and wrapped > self._wraps_at // 2 else wrapped


class EnergyIntegrator:
    """Energy as the integral of power over time, by the trapezoidal rule."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None

    def increase_j(self, power_w: float | None, now_s: float) -> float | None:
        """The energy since the previous call, in joules; None where either power is unknown."""
        last = self._last
        self._last = None if power_w is None else (power_w, now_s)
        if power_w is None or last is None or now_s <= last[1]:
            return None
        last_power_w, last_s = last
        return (last_power_w + power_w) / 2 * (now_s - last_s)
