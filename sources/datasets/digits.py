"""The handwritten digits of scikit-learn: a small, real data set that needs no download.

1797 pictures of 8x8 pixels from the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, 1998, UCI Machine Learning Repository), scaled to the 32x32 of the small VGGs.
"""

import functools
from typing import Any

import numpy
from PIL import Image

from brokers.errors import UsageError
from sources.datasets.dataset import Dataset, Examples

SIDE_PX = 32
MAX_PIXEL = 16  # of load_digits
TEST_SHARE = 0.2
SPLIT_SEED = 0  # not the pipeline's seed: a network must never be tested on what another run trained it on


class Digits(Dataset):
    """Handwritten digits, white on black, uint8 (N, 3, 32, 32): 1438 for training, 359 for testing.

    Loading raises `UsageError` ("NotInstalled") without scikit-learn.
    """

    name = "digits"
    classes = tuple("0123456789")
    horizontal_flip = False

    def train(self) -> Examples:
        return _split()[0]

    def test(self) -> Examples:
        return _split()[1]


@functools.cache
def _split() -> tuple[Examples, Examples]:
    """The training and the test examples."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = "kind 'digits' needs scikit-learn: install Sparse with its extra 'train', pip install '.[train]'"
        raise UsageError("NotInstalled", message, key="source.kind", package="scikit-learn") from error
    loaded: Any = load_digits()
    small = (loaded.images * (255 / MAX_PIXEL)).round().astype(numpy.uint8)  # (N, 8, 8)
    size = (SIDE_PX, SIDE_PX)
    scaled = [Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR) for picture in small]
    grey = numpy.stack([numpy.asarray(picture) for picture in scaled])
    pictures = grey[:, numpy.newaxis].repeat(3, axis=1)  # (N, 32, 32) -> (N, 3, 32, 32)
    labels = loaded.target.astype(numpy.int64)
    order = numpy.random.default_rng(SPLIT_SEED).permutation(len(labels))
    test, train = numpy.split(order, [int(TEST_SHARE * len(labels))])
    return Examples(pictures[train], labels[train]), Examples(pictures[test], labels[test])
