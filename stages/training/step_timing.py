"""Where the time of a step goes in one stage: sums over its micro-batches, in milliseconds and bytes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class StepTimings:
    """Sums by name, taken out once a step."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()

    def add(self, name: str, amount: float) -> None:
        self._sums[name] += amount  # type: ignore[assignment]  # a Counter adds up floats as well

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the duration of the block, by the monotonic clock."""
        begin_s = time.monotonic()
        try:
            yield
        finally:
            self.add(name, 1000 * (time.monotonic() - begin_s))

    def sums(self) -> Counter[str]:
        """What there is of the step so far."""
        return self._sums.copy()

    def pop_sums(self) -> dict[str, float]:
        """The sums of the step that ends; those of the next begin at 0."""
        sums, self._sums = self._sums, Counter()
        return {name: round(value, 3) for name, value in sums.items()}
