"""Examples in batches, each a pure function of the step's number, so that a step can be done again after a crash."""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

from sources.datasets.dataset import Examples, Inputs, Labels
from sources.errors import CannotAugment

SHIFT_DIVISOR = 8  # pictures are shifted by up to an eighth of their side: the 4 pixels that are usual for CIFAR's 32
# Streams of random numbers below one seed. The stream stands before the number that counts: numpy fills a short seed
# with zeros, so that (seed, 1) and (seed, 1, 0) would be the same.
ORDER_STREAM, AUGMENTATION_STREAM = 0, 1


class Batches:
    """The batches of as many epochs as are asked for.

    An epoch has each example once; its last batch is smaller where the rows do not divide. `seed`, with the number of
    the epoch or the step, decides the order (`shuffle`) and how pictures are changed (`augment`): they are shifted by
    up to an eighth of their side, black coming in, and half of them mirrored where that keeps their sense (`mirrors`).
    Raises `CannotAugment` for inputs that are no pictures.
    """

    def __init__(
        self,
        examples: Examples,
        batch: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        augment: bool = False,
        horizontal_flip: bool = False,
    ) -> None:
        if augment and examples.inputs.ndim != 4:
            raise CannotAugment(examples.inputs.shape[1:])
        self._examples, self._batch = examples, batch
        self._seed = seed % 2**64  # numpy's seeds are not negative
        self._shuffle, self._augment, self._mirrors = shuffle, augment, horizontal_flip

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._examples) // self._batch)

    def batch(self, step: int) -> tuple[Inputs, Labels]:
        """The inputs (B, ...) and labels (B,) of a step, counted from 0 over all epochs: memory of the caller's own."""
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = self._order(epoch)[index * self._batch : (index + 1) * self._batch]
        inputs, labels = self._examples.inputs[rows], self._examples.labels[rows]
        if self._augment:
            inputs = self._augmented(inputs, numpy.random.default_rng((self._seed, AUGMENTATION_STREAM, step)))
        return inputs, labels

    def _order(self, epoch: int) -> NDArray[numpy.int64]:
        """The rows of an epoch, in its order, (N,)."""
        if not self._shuffle:
            return numpy.arange(len(self._examples))
        return numpy.random.default_rng((self._seed, ORDER_STREAM, epoch)).permutation(len(self._examples))

    def _augmented(self, pictures: NDArray[Any], random: numpy.random.Generator) -> NDArray[Any]:
        """Pictures (B, C, H, W), each shifted and maybe mirrored, in one gather."""
        count, _, height, width = pictures.shape
        down, right = height // SHIFT_DIVISOR, width // SHIFT_DIVISOR
        padded = numpy.pad(pictures, ((0, 0), (0, 0), (down, down), (right, right)))
        rows = random.integers(0, 2 * down + 1, (count, 1)) + numpy.arange(height)  # (B, H)
        columns = random.integers(0, 2 * right + 1, (count, 1)) + numpy.arange(width)  # (B, W)
        if self._mirrors:
            mirrored = random.random((count, 1)) < 0.5
            columns = numpy.where(mirrored, columns[:, ::-1], columns)
        picture = numpy.arange(count)[:, numpy.newaxis, numpy.newaxis]
        taken = padded[picture, :, rows[:, :, numpy.newaxis], columns[:, numpy.newaxis, :]]  # (B, H, W, C)
        return numpy.ascontiguousarray(taken.transpose(0, 3, 1, 2))


def split_micro_batches(inputs: Inputs, labels: Labels, count: int) -> list[tuple[Inputs, Labels]]:
    """A batch in `count` pieces in order, views of nearly equal size; where it has fewer rows, in a piece for each."""
    pieces = min(count, len(labels))
    rows: list[Any] = numpy.array_split(inputs, pieces)  # numpy's types forget the dtype
    return list(zip(rows, numpy.array_split(labels, pieces), strict=True))
