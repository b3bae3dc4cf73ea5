"""Exponential back-off: the delays between attempts."""

from dataclasses import dataclass


# tenacity and stamina retry a *call*; our retries are loops that also wait for shutdown, messages and deadlines.
@dataclass(slots=True)
class Backoff:
    """Delays in seconds that double from `first_s` up to `longest_s`."""

    first_s: float
    longest_s: float
    _next_s: float = 0.0

    def next_s(self) -> float:
        """Return the delay before the next attempt."""
        delay_s = self._next_s or self.first_s
        self._next_s = min(2 * delay_s, self.longest_s)
        return delay_s

    def reset(self) -> None:
        """Start again at `first_s`, after an attempt that succeeded."""
        self._next_s = 0.0
