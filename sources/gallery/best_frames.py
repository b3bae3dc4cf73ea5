"""Selects the best items of a stream of unknown length, spread over its whole duration, in bounded memory."""

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class BestFrames(Generic[T]):
    """Keeps the best item of each interval of the stream.

    There are at most `4 * keep` intervals. When the stream outgrows them, pairs of neighbours are merged: intervals
    double in length, and the better item of each pair stays.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._interval = 1  # in items
        self._count = 0
        self._best_score = 0.0
        self._best: dict[int, tuple[float, int, T]] = {}  # number of the interval -> score, position, item

    def offer(self, score: float, make: Callable[[], T]) -> None:
        """Consider the next item of the stream; `make` creates it if it is the best of its interval so far."""
        position = self._count
        self._count += 1
        if score <= 0 and self._best_score > 0:
            return  # `best` would not return it
        self._best_score = max(self._best_score, score)
        if position >= 4 * self._keep * self._interval:
            self._interval *= 2
            ascending = sorted(self._best.values(), key=lambda entry: (entry[0], -entry[1]))
            self._best = {entry[1] // self._interval: entry for entry in ascending}  # the better one of a pair is last
        number = position // self._interval
        if number not in self._best or score > self._best[number][0]:
            self._best[number] = (score, position, make())

    def best(self) -> list[T]:
        """The `keep` best items in stream order; items of score 0 only where there are no others.

        Of two items less than half an interval apart, which look alike, only the better one is chosen.
        """
        ranked = sorted(self._best.values(), key=lambda entry: (-entry[0], entry[1]))
        chosen: dict[int, T] = {}  # by position
        for _, position, item in [entry for entry in ranked if entry[0] > 0] or ranked:
            if len(chosen) < self._keep and all(2 * abs(position - other) >= self._interval for other in chosen):
                chosen[position] = item
        return [item for _, item in sorted(chosen.items())]
