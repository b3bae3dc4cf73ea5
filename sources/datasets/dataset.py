"""A data set: examples with labels, some to train on and some to test with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy
from numpy.typing import NDArray

from sources.errors import BadArray, CountsDiffer, NoExamples

Inputs = NDArray[numpy.uint8] | NDArray[numpy.float32]  # pictures (N, C, H, W) of bytes, or anything (N, ...) of floats
Labels = NDArray[numpy.int64]  # (N,): which of the classes


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Inputs and their labels, one row each, at least one.

    `pictures` is uint8 (N, C, H, W), which the network's own normalisation scales, or float32 (N, ...), which goes into
    the network as it is. Raises `BadArray`, `CountsDiffer` and `NoExamples`.
    """

    inputs: Inputs
    labels: Labels

    def __post_init__(self) -> None:
        pictures: NDArray[Any] = self.inputs
        if pictures.dtype not in (numpy.uint8, numpy.float32) or not pictures.ndim:
            expected = "uint8 (N, C, H, W) or float32 (N, ...)"
            raise BadArray("inputs", expected, str(pictures.dtype), pictures.shape)
        if pictures.dtype == numpy.uint8 and pictures.ndim != 4:
            raise BadArray("pictures", "uint8 (N, C, H, W)", "uint8", pictures.shape)
        if self.labels.dtype != numpy.int64 or self.labels.ndim != 1:
            raise BadArray("labels", "int64 (N,)", str(self.labels.dtype), self.labels.shape)
        if len(pictures) != len(self.labels):
            raise CountsDiffer(len(pictures), len(self.labels))
        if not len(pictures):
            raise NoExamples()

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Examples:
        """The first `count` of them; None: all."""
        return Examples(self.inputs[:count], self.labels[:count])


class Dataset(Protocol):
    """Where examples come from. Derive from it, or look like it; a pipeline file names it as `"package.module:Class"`.

    A whole one, whose `settings` in the file are the arguments of `__init__`:

        class Waves(Dataset):
            name = "waves"
            classes = ("sine", "square")

            def __init__(self, count: int = 1000) -> None:
                self.count = count

            def train(self) -> Examples:
                return Examples(*record_waves(self.count))  # float32 (count, 64), int64 (count,)

            def test(self) -> Examples:
                return Examples(*record_waves(100))
    """

    name: str
    classes: tuple[str, ...]
    """What the labels 0, 1, ... stand for."""
    horizontal_flip: bool = False
    """Whether a picture keeps its sense in a mirror: a cat does, a digit does not."""

    def train(self) -> Examples:
        """What a network learns from, the same at every call. Raise a `UsageError` when it cannot be had."""
        ...

    def test(self) -> Examples:
        """What it is judged by, none of it among what `train` gives."""
        ...
