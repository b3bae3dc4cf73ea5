"""CIFAR-10, the data set of the paper, loaded by torchvision."""

import http.client
import tarfile
from pathlib import Path
from typing import Any

import numpy

from brokers.errors import UsageError
from brokers.process.download_cache import cache_folder
from brokers.process.files import file_lock
from sources.datasets.dataset import Dataset, Examples

CACHE_FOLDER = "cifar10"
LOCK_FILE = ".cifar10.lock"


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
        self.root = cache_folder() / CACHE_FOLDER if root is None else root

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
            with file_lock(self.root / LOCK_FILE):
                return CIFAR10(self.root, train=train, download=True)
        except (OSError, EOFError, RuntimeError, ValueError, http.client.HTTPException, tarfile.TarError) as error:
            reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
            message = (
                f"CIFAR-10 is not in {self.root}, and downloading it from {CIFAR10.url} failed: {reason}; "
                'kind = "digits" needs no download'
            )
            raise UsageError("NotDownloaded", message, key="source.kind", url=CIFAR10.url) from error
