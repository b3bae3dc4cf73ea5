"""Selects the best items of a stream of unknown length, spread over its whole duration, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ScoredItem(Generic[T]):
    """An item with its position in the stream and its score."""

    position: int
    score: float
    item: T


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
        self._best: dict[int, ScoredItem[T]] = {}  # by number of the interval

    def offer(self, score: float, make: Callable[[], T]) -> None:
        """Consider the next item of the stream; `make` creates it if it is the best of its interval so far."""
        position, self._count = self._count, self._count + 1
        if score <= 0 and self._best_score > 0:
            return  # `best` would not return it
        self._best_score = max(self._best_score, score)
        if position >= 4 * self._keep * self._interval:
            self._double_interval()
        best = self._best.get(position // self._interval)
        if best is None or score > best.score:
            self._best[position // self._interval] = ScoredItem(position, score, make())

    def best(self) -> list[ScoredItem[T]]:
        """The `keep` best items in stream order; items of score 0 only where there are no others.

        Of two items less than half an interval apart, which look alike, only the better one is chosen.
        """
        ranked = sorted(self._best.values(), key=lambda item: (-item.score, item.position))
        chosen: list[ScoredItem[T]] = []
        for item in [item for item in ranked if item.score > 0] or ranked:
            distances = [abs(item.position - other.position) for other in chosen]
            if len(chosen) < self._keep and all(2 * distance >= self._interval for distance in distances):
                chosen.append(item)
        return sorted(chosen, key=lambda item: item.position)

    def _double_interval(self) -> None:
        self._interval *= 2
        items, self._best = self._best.values(), {}
        for item in items:
            other = self._best.get(item.position // self._interval)
            if other is None or item.score > other.score:
                self._best[item.position // self._interval] = item
