"""The data sets of this package: the handwritten digits of scikit-learn, and CIFAR-10, the data set of the paper.

The digits need no download: 1797 pictures of 8x8 pixels from the test part of "Optical Recognition of Handwritten
Digits" (E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository), scaled to the 32x32 of the small VGGs.
"""

import functools
import http.client
import tarfile
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from brokers.errors import UsageError
from brokers.process.download_cache import cache_folder
from brokers.process.files import file_lock
from sources.datasets.dataset import Dataset, Examples

SIDE_PX = 32
MAX_PIXEL = 16  # of load_digits
TEST_SHARE = 0.2
SPLIT_SEED = 0  # not the pipeline's seed: a network must never be tested on what another run trained it on
CIFAR10_CACHE_FOLDER = "cifar10"
CIFAR10_LOCK_FILE = ".cifar10.lock"


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


class Cifar10(Dataset):
    """60,000 photographs of ten classes, uint8 (N, 3, 32, 32): 50,000 for training, 10,000 for testing.

    `root` is the folder of `cifar-10-batches-py`, by default in the cache; missing files are downloaded. The files are
    pickles, which torchvision reads only if their checksums match the originals. Loading raises `UsageError`
    ("NotDownloaded").
    """

    name = "cifar10"
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    horizontal_flip = True

    def __init__(self, root: Path | None = None) -> None:
        self.root = cache_folder() / CIFAR10_CACHE_FOLDER if root is None else root

    def train(self) -> Examples:
        return self._load(train=True)

    def test(self) -> Examples:
        return self._load(train=False)

    def _load(self, *, train: bool) -> Examples:
        loaded = self._open(train)
        pictures = numpy.ascontiguousarray(loaded.data.transpose(0, 3, 1, 2))  # (N, H, W, C) -> (N, C, H, W)
        return Examples(pictures, numpy.asarray(loaded.targets, numpy.int64))

    def _open(self, train: bool) -> Any:
        from torchvision.datasets import CIFAR10

        try:
            return CIFAR10(self.root, train=train, download=False)  # the folder may be read-only
        except RuntimeError:  # missing or damaged
            pass
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with file_lock(self.root / CIFAR10_LOCK_FILE):
                return CIFAR10(self.root, train=train, download=True)
        except (OSError, EOFError, RuntimeError, ValueError, http.client.HTTPException, tarfile.TarError) as error:
            reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
            message = (
                f"CIFAR-10 is not in {self.root}, and downloading it from {CIFAR10.url} failed: {reason}; "
                'kind = "digits" needs no download'
            )
            raise UsageError("NotDownloaded", message, key="source.kind", url=CIFAR10.url) from error
