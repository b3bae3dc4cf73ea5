"""Dataset, the interface of everything that provides labelled examples, and the batches of one.

A batch is a function of its step number only, so that a step can be repeated after a crash.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

import numpy
from numpy.typing import NDArray

from brokers.errors import UsageError

Inputs = Any  # an array (N, ...), or a dict of such arrays by the names of the network's inputs
Labels = NDArray[Any]  # int64 or float32 (N, ...)
INPUT_DTYPES = (numpy.uint8, numpy.float32, numpy.int32, numpy.int64, numpy.bool_)
LABEL_DTYPES = (numpy.int64, numpy.float32)
RESERVED_PREFIX = "sparse."  # of the tensors that the protocol adds to a micro-batch
SHIFT_DIVISOR = 8  # augmentation shifts by up to an eighth of the side: the usual 4 pixels for the 32 of CIFAR
# Random streams below one seed, modulo 2^64: numpy's are not negative. The stream precedes the step number: numpy pads
# a short seed with zeros, so (seed, 1) and (seed, 1, 0) would be equal.
ORDER_STREAM = 0
AUGMENTATION_STREAM = 1


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """N inputs and their labels, N at least 1.

    Args:
        inputs: pictures, uint8 (N, C, H, W), which the network normalises itself, or any float32, int32, int64 or bool
            (N, ...). Several inputs are a dict of such arrays by the names of the arguments of the network's `forward`.
        labels: class indices, int64 (N,) or (N, ...), or values, float32 (N, ...).

    Raises `UsageError`: "BadArray" for another dtype, shape or name, "CountsDiffer", "NoExamples".
    """

    inputs: Inputs
    labels: Labels

    def __post_init__(self) -> None:
        if isinstance(self.inputs, Mapping) and not self.inputs:
            raise UsageError("BadArray", "the inputs of a data set are an empty dict", key="source.kind")
        for name, inputs in named_inputs(self.inputs).items():
            what = f"inputs {name!r}" if isinstance(self.inputs, Mapping) else "inputs"
            if not isinstance(name, str) or not name or name.startswith(RESERVED_PREFIX):
                message = f"the {what} of a data set: expected a name that does not begin with {RESERVED_PREFIX!r}"
                raise UsageError("BadArray", message, key="source.kind")
            if inputs.dtype not in INPUT_DTYPES or not inputs.ndim:
                raise _bad_array(what, inputs, "uint8 (N, C, H, W), or float32, int32, int64 or bool (N, ...)")
            if inputs.dtype == numpy.uint8 and inputs.ndim != 4:
                raise _bad_array("pictures", inputs, "uint8 (N, C, H, W)")
            if self.labels.ndim and len(inputs) != len(self.labels):
                message = (
                    f"a data set with {len(inputs)} {what} has {len(self.labels)} labels, expected one for each input"
                )
                raise UsageError("CountsDiffer", message, key="source.kind")
        if self.labels.dtype not in LABEL_DTYPES or not self.labels.ndim:
            raise _bad_array("labels", self.labels, "int64 or float32 (N, ...)")
        if not len(self):
            message = "a data set has no examples, expected at least one for training and one for testing"
            raise UsageError("NoExamples", message, key="source.kind")

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Examples:
        """The first `count` examples; all for None."""
        return Examples(map_inputs(self.inputs, lambda array: array[:count]), self.labels[:count])


def named_inputs(inputs: Inputs) -> Mapping[str, Any]:
    """The arrays by name; a single array is named "input", which any network with one input accepts."""
    return inputs if isinstance(inputs, Mapping) else {"input": inputs}


def map_inputs(inputs: Inputs, function: Callable[[NDArray[Any]], Any]) -> Inputs:
    """Apply a function to the array, or to each array of a dict."""
    if isinstance(inputs, Mapping):
        return {name: function(array) for name, array in inputs.items()}
    return function(inputs)


def _bad_array(what: str, array: NDArray[Any], expected: str) -> UsageError:
    message = f"the {what} of a data set are {array.dtype} {list(array.shape)}, expected {expected}"
    return UsageError("BadArray", message, key="source.kind")


class Dataset(Protocol):
    """Provides labelled examples. Subclass it, or provide the same attributes.

    A pipeline file names your class as `kind = "package.module:Class"`; it is created as `Class(**settings)`. A
    complete data set:

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
    classes: tuple[str, ...] = ()
    """Class names by label: 0, 1, ...; none where labels are values."""
    horizontal_flip: bool = False
    """Whether augmentation may mirror a picture: a mirrored cat is a cat, a mirrored digit is not a digit."""

    def train(self) -> Examples:
        """The training examples, the same at every call. Raise `UsageError` if they cannot be loaded."""
        ...

    def test(self) -> Examples:
        """The test examples, none of them among the training examples."""
        ...


@dataclass(frozen=True)
class Batches:
    """The batches of any number of epochs.

    An epoch has each example once; its last batch is smaller if `batch_size` does not divide their number, and left out
    with `drop_last`. `seed` with the number of the epoch or step determines the order (`shuffle`) and the augmentation
    (`augment`): a shift by up to an eighth of the side, filled with black, and with `horizontal_flip` a mirror image
    for half of the pictures.

    Raises `UsageError`: "CannotAugment" for inputs that are not pictures, "NoBatches" if `drop_last` leaves none.
    """

    examples: Examples
    batch_size: int
    seed: int = 0
    _: KW_ONLY
    shuffle: bool = True
    augment: bool = False
    horizontal_flip: bool = False
    drop_last: bool = False

    def __post_init__(self) -> None:
        inputs = self.examples.inputs
        if self.augment and (isinstance(inputs, Mapping) or inputs.ndim != 4):
            shape = sorted(inputs) if isinstance(inputs, Mapping) else list(inputs.shape[1:])
            message = f"only pictures (C, H, W) can be augmented, the inputs of this data set are {shape}"
            raise UsageError("CannotAugment", message, key="training.augment")
        if not self.steps_per_epoch:
            message = (
                f"drop_last leaves out the only batch: the data set has {len(self.examples)} rows, expected at least "
                f"batch = {self.batch_size}: choose a smaller batch, or drop_last = false"
            )
            raise UsageError("NoBatches", message, key="training.drop_last")

    @property
    def steps_per_epoch(self) -> int:
        full, rest = divmod(len(self.examples), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def batch(self, step: int) -> tuple[Inputs, Labels]:
        """Copies of the inputs (B, ...) and labels (B,) of a step, counted from 0 over all epochs."""
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = self._order(epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        inputs = map_inputs(self.examples.inputs, lambda array: array[rows])
        labels = self.examples.labels[rows]
        if self.augment:
            inputs = self._augmented(inputs, numpy.random.default_rng((self.seed % 2**64, AUGMENTATION_STREAM, step)))
        return inputs, labels

    def _order(self, epoch: int) -> NDArray[numpy.int64]:
        """The row numbers of an epoch in its order, (N,)."""
        if not self.shuffle:
            return numpy.arange(len(self.examples))
        return numpy.random.default_rng((self.seed % 2**64, ORDER_STREAM, epoch)).permutation(len(self.examples))

    def _augmented(self, pictures: NDArray[Any], random: numpy.random.Generator) -> NDArray[Any]:
        """Shift and mirror pictures (B, C, H, W) in one gather."""
        count, _, height, width = pictures.shape
        down, right = height // SHIFT_DIVISOR, width // SHIFT_DIVISOR
        padded = numpy.pad(pictures, ((0, 0), (0, 0), (down, down), (right, right)))
        rows = random.integers(0, 2 * down + 1, (count, 1)) + numpy.arange(height)  # (B, H)
        columns = random.integers(0, 2 * right + 1, (count, 1)) + numpy.arange(width)  # (B, W)
        if self.horizontal_flip:
            flipped = random.random((count, 1)) < 0.5
            columns = numpy.where(flipped, columns[:, ::-1], columns)
        picture = numpy.arange(count)[:, numpy.newaxis, numpy.newaxis]
        augmented = padded[picture, :, rows[:, :, numpy.newaxis], columns[:, numpy.newaxis, :]]  # (B, H, W, C)
        return numpy.ascontiguousarray(augmented.transpose(0, 3, 1, 2))


def split_micro_batches(inputs: Inputs, labels: Labels, count: int) -> list[tuple[Inputs, Labels]]:
    """Split a batch into `count` views whose sizes differ by at most one, in order; fewer if it has fewer rows."""
    count = min(count, len(labels))
    split_labels = numpy.array_split(labels, count)
    if not isinstance(inputs, Mapping):
        return list(zip(numpy.array_split(inputs, count), split_labels, strict=True))
    split_inputs = {name: numpy.array_split(array, count) for name, array in inputs.items()}
    return [({name: arrays[i] for name, arrays in split_inputs.items()}, split_labels[i]) for i in range(count)]


def smallest_micro_batch(rows: int, count: int) -> tuple[int, int]:
    """The size of the smallest of the micro-batches of a batch of `rows`, and the index of the first of that size."""
    count = min(count, rows)
    return rows // count, rows % count
