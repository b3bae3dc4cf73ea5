"""A small data set for training tests, which name it in their pipeline files.

It is by itself, since the source of a run needs no torch: importing it takes longer than many a test trains.
"""

from __future__ import annotations

import numpy as np

from sources.datasets.dataset import Dataset, Examples

CLASSES = 4


class StripedImages(Dataset):
    """Pictures (3, 8, 8) whose class is the row that is bright."""

    name = "stripes"
    classes = tuple("0123")
    horizontal_flip = True

    def __init__(self, count: int = 96, seed: int = 0) -> None:
        self._count, self._seed = count, seed

    def train(self) -> Examples:
        return self._some(self._count, self._seed)

    def test(self) -> Examples:
        return self._some(32, self._seed + 1)

    def _some(self, count: int, seed: int) -> Examples:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, CLASSES, count)
        pictures = rng.normal(0, 0.3, (count, 3, 8, 8)).astype(np.float32)
        pictures[np.arange(count), :, 2 * labels, :] += 1.0
        return Examples(pictures, labels.astype(np.int64))


class ExtraClassImages(StripedImages):
    """One more class than the network has."""

    classes = tuple("01234")

    def _some(self, count: int, seed: int) -> Examples:
        found = super()._some(count, seed)
        found.labels[: count // 2] = CLASSES
        return found
