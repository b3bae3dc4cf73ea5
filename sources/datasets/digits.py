"""Handwritten digits that come with scikit-learn: real ones, small, and there without a download.

1797 pictures of 8x8 pixels from the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, 1998, UCI Machine Learning Repository), brought to the 32x32 of the small VGGs.
"""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray
from PIL import Image

from sources.datasets.dataset import Dataset, Examples, Labels
from sources.errors import NotInstalled

SIDE_PX = 32
MAX_PIXEL = 16  # of load_digits
TEST_SHARE = 0.2  # of the digits
SPLIT_SEED = 0  # of the split, whatever a pipeline's seed: what one run was tested with, no other was trained on


class Digits(Dataset):
    """Handwritten digits, white on black: 1438 to train on, 359 to test with, uint8 (N, 3, 32, 32)."""

    name = "digits"
    classes = tuple("0123456789")
    horizontal_flip = False

    def train(self) -> Examples:
        """Raises `NotInstalled` where scikit-learn is not."""
        pictures, labels = _digits()
        chosen = _order(len(labels))[int(TEST_SHARE * len(labels)) :]
        return Examples(pictures[chosen], labels[chosen])

    def test(self) -> Examples:
        """Raises `NotInstalled` where scikit-learn is not."""
        pictures, labels = _digits()
        chosen = _order(len(labels))[: int(TEST_SHARE * len(labels))]
        return Examples(pictures[chosen], labels[chosen])


def _order(count: int) -> NDArray[numpy.int64]:
    return numpy.random.default_rng(SPLIT_SEED).permutation(count)


def _digits() -> tuple[NDArray[numpy.uint8], Labels]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise NotInstalled("digits", "scikit-learn", "train") from error
    loaded: Any = load_digits()
    small = (loaded.images * (255 / MAX_PIXEL)).round().astype(numpy.uint8)  # (N, 8, 8)
    grey = numpy.stack([_enlarged(picture) for picture in small])  # (N, 32, 32)
    return grey[:, numpy.newaxis].repeat(3, axis=1), loaded.target.astype(numpy.int64)


def _enlarged(picture: NDArray[numpy.uint8]) -> NDArray[numpy.uint8]:
    return numpy.asarray(Image.fromarray(picture).resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR))
