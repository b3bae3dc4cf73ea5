"""The best of a stream whose length nobody knows, spread over its time, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ScoredItem(Generic[T]):
    """One item that is kept: where in the stream it was, and how good it is."""

    position: int
    score: float
    item: T


class BestFrames(Generic[T]):
    """Keeps the best item of each stretch of the stream.

    There are at most `4 * keep` stretches. When the stream outgrows them each two neighbours become one: stretches
    double in length, and of two best ones the better stays.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._length = 1  # of a stretch, in items
        self._count = 0
        self._best_score = 0.0
        self._best: dict[int, ScoredItem[T]] = {}

    def offer(self, score: float, make: Callable[[], T]) -> None:
        """Take the next item of the stream into account; `make` is called only if it is kept for now."""
        position, self._count = self._count, self._count + 1
        if score <= 0 and self._best_score > 0:
            return  # it would not be shown
        self._best_score = max(self._best_score, score)
        if position >= 4 * self._keep * self._length:
            self._double()
        rival = self._best.get(position // self._length)
        if rival is None or score > rival.score:
            self._best[position // self._length] = ScoredItem(position, score, make())

    def best(self) -> list[ScoredItem[T]]:
        """The `keep` best items in the order of the stream; items of score 0 only when there are no others.

        Of two that stand on either side of a border between stretches, and so look alike, the better is enough.
        """
        ranked = sorted(self._best.values(), key=lambda kept: (-kept.score, kept.position))
        chosen: list[ScoredItem[T]] = []
        for kept in [kept for kept in ranked if kept.score > 0] or ranked:
            if len(chosen) < self._keep and all(
                abs(kept.position - other.position) * 2 >= self._length for other in chosen
            ):
                chosen.append(kept)
        return sorted(chosen, key=lambda kept: kept.position)

    def _double(self) -> None:
        self._length *= 2
        rivals, self._best = self._best, {}
        for kept in rivals.values():
            other = self._best.get(kept.position // self._length)
            if other is None or kept.score > other.score:
                self._best[kept.position // self._length] = kept
