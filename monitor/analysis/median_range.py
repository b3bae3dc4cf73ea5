"""Repeated measurements of one metric: their median and range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class MedianRange:
    """Median, smallest and largest of `count` measurements."""

    median: float
    minimum: float
    maximum: float
    count: int

    @classmethod
    def from_values(cls, values: Sequence[float]) -> MedianRange:
        """Raises `ValueError` where there are no values."""
        return cls(median(values), min(values), max(values), len(values))

    @property
    def bounds(self) -> tuple[float, float] | tuple[None, None]:
        """The range; (None, None) for a single measurement, which has none."""
        return (self.minimum, self.maximum) if self.count > 1 else (None, None)
