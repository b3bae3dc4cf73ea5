"""CIFAR-10, as in the paper, through torchvision's loader."""

from __future__ import annotations

import http.client
import tarfile
from pathlib import Path
from typing import Any

import numpy

from brokers.process.download_cache import cache_folder
from brokers.process.files import file_lock
from sources.datasets.dataset import Dataset, Examples
from sources.errors import NotDownloaded

CACHE_FOLDER = "cifar10"
LOCK_FILE = ".cifar10.lock"


class Cifar10(Dataset):
    """60,000 photographs in ten classes: 50,000 to train on, 10,000 to test with, uint8 (N, 3, 32, 32).

    `root` is the folder of `cifar-10-batches-py`, by default in the cache; what is not there is fetched. The files are
    pickles, which torchvision reads only when their sums are those of the originals.
    """

    name = "cifar10"
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    horizontal_flip = True

    def __init__(self, root: Path | None = None) -> None:
        self.root = cache_folder() / CACHE_FOLDER if root is None else root

    def train(self) -> Examples:
        """Raises `NotDownloaded` when it is neither there nor to be had."""
        return _examples(self._load(train=True))

    def test(self) -> Examples:
        """Raises `NotDownloaded` when it is neither there nor to be had."""
        return _examples(self._load(train=False))

    def _load(self, *, train: bool) -> Any:
        from torchvision.datasets import CIFAR10

        try:
            return CIFAR10(self.root, train=train, download=False)  # the folder may be read-only
        except RuntimeError:  # it is not there, or is not what it should be
            pass
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with file_lock(self.root / LOCK_FILE):
                return CIFAR10(self.root, train=train, download=True)
        except (OSError, EOFError, RuntimeError, ValueError, http.client.HTTPException, tarfile.TarError) as error:
            reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
            raise NotDownloaded("CIFAR-10", str(self.root), CIFAR10.url, reason) from error


def _examples(loaded: Any) -> Examples:
    pictures = numpy.ascontiguousarray(loaded.data.transpose(0, 3, 1, 2))  # (N, H, W, C) -> (N, C, H, W)
    return Examples(pictures, numpy.asarray(loaded.targets, numpy.int64))
