"""How energy is made of what sensors give, and which rails add up. Pure.

A rail of the measurement `power` whose name has no slash is part of what the node draws, and no two of them count the
same energy: their sum is what is known of the node. One with a slash is not to be added to those: it is a part of the
one before the slash (`package-0/core`), a whole whose parts are there (`board/psys`), or of another board
(`carrier/VDD_MUX`).
"""

from __future__ import annotations


def is_additive(rail: str) -> bool:
    """Whether a rail counts in the sum of its node."""
    return "/" not in rail


class MonotonicCounter:
    """Differences of a counter that only grows, until it starts again at 0.

    With a limit, a value below the last one means that it went past it, once; without, that nobody knows.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._last: int | None = None

    def delta(self, value: int | None) -> int | None:
        """What was counted since the last call; None if that is not known. None for a value says that there is none."""
        last, self._last = self._last, value
        if value is None or last is None:
            return None
        if value >= last:
            return value - last
        return value + self._limit - last if self._limit else None


class EnergyIntegrator:
    """Energy from power: between two samples power is taken to go straight from one to the other."""

    def __init__(self) -> None:
        self._last: tuple[float, float] | None = None

    def delta_j(self, power_w: float | None, now_s: float) -> float | None:
        """Joules since the last call; None if either of the two had no power to tell."""
        last, self._last = self._last, (power_w, now_s) if power_w is not None else None
        if power_w is None or last is None or now_s <= last[1]:
            return None
        return (last[0] + power_w) / 2 * (now_s - last[1])
