"""The test pictures of a data set as a source: what a trained network is shown, one by one."""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator

import numpy
from PIL import Image

from brokers.protocol.messages import PNG
from sources.datasets.dataset import Dataset
from sources.inputs.sample import RgbImage, Sample
from sources.inputs.source import Source


class DatasetSource(Source):
    """The pictures that a data set keeps for testing, in its order, as PNG. Raises what its `test` raises."""

    def __init__(self, dataset: Dataset, *, name: str, limit: int | None = None, loop: bool = False) -> None:
        self.name = name
        self._pictures = dataset.test().inputs.transpose(0, 2, 3, 1)  # (N, H, W, 3)
        self._count = limit if loop else min(len(self._pictures), limit or len(self._pictures))  # None: without end
        self._closed = threading.Event()

    def samples(self) -> Iterator[Sample]:
        index = 0
        while not self._closed.is_set() and (self._count is None or index < self._count):
            picture = numpy.ascontiguousarray(self._pictures[index % len(self._pictures)], numpy.uint8)
            yield Sample(self.name, index, _png(picture), PNG, functools.partial(_itself, picture))
            index += 1

    def close(self) -> None:
        self._closed.set()


def _itself(picture: RgbImage) -> RgbImage:
    return picture


def _png(picture: RgbImage) -> bytes:
    body = io.BytesIO()
    Image.fromarray(picture).save(body, "PNG")
    return body.getvalue()
