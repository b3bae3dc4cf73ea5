"""A small data set for training tests, named in their pipeline files.

This module imports no torch: a source needs none, and the import takes longer than the training of most tests.
"""

from __future__ import annotations

import numpy as np

from sources.datasets.dataset import Dataset, Examples

CLASSES = 4


class StripedImages(Dataset):
    """Pictures (3, 8, 8) whose class is the position of a bright row."""

    name = "stripes"
    classes = tuple("0123")
    horizontal_flip = True

    def __init__(self, count: int = 96, seed: int = 0) -> None:
        self._count, self._seed = count, seed

    def train(self) -> Examples:
        return self._examples(self._count, self._seed)

    def test(self) -> Examples:
        return self._examples(32, self._seed + 1)

    def _examples(self, count: int, seed: int) -> Examples:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, CLASSES, count)
        pictures = rng.normal(0, 0.3, (count, 3, 8, 8)).astype(np.float32)
        pictures[np.arange(count), :, 2 * labels, :] += 1.0
        return Examples(pictures, labels.astype(np.int64))


class OneHotImages(StripedImages):
    """Labels as values, float32 (N, CLASSES), for the mean squared error."""

    classes = ()

    def _examples(self, count: int, seed: int) -> Examples:
        examples = super()._examples(count, seed)
        return Examples(examples.inputs, np.eye(CLASSES, dtype=np.float32)[examples.labels])


class ExtraClassImages(StripedImages):
    """Has one more class than the network."""

    classes = tuple("01234")

    def _examples(self, count: int, seed: int) -> Examples:
        examples = super()._examples(count, seed)
        examples.labels[: count // 2] = CLASSES
        return examples
