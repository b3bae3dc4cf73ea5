"""The test set of a data set as a source, to try a trained network on."""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Iterator

import numpy
from PIL import Image

from brokers.protocol.messages import PNG
from sources.datasets.dataset import Dataset
from sources.inputs.sample import Sample
from sources.inputs.source import Source


class DatasetSource(Source):
    """Yields the test pictures of a data set in order, as PNG. Raises what `Dataset.test` raises."""

    def __init__(self, dataset: Dataset, name: str, *, loop: bool = False) -> None:
        self.name = name
        self._pictures = dataset.test().inputs.transpose(0, 2, 3, 1)  # (N, H, W, 3)
        self._loop = loop
        self._closed = threading.Event()

    def samples(self) -> Iterator[Sample]:
        for index in itertools.count():
            if self._closed.is_set() or (index == len(self._pictures) and not self._loop):
                return
            yield self._sample(index)

    def _sample(self, index: int) -> Sample:
        picture = numpy.ascontiguousarray(self._pictures[index % len(self._pictures)], numpy.uint8)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        return Sample(self.name, index, file.getvalue(), PNG, lambda: picture)

    def close(self) -> None:
        self._closed.set()
