"""Dataset: the interface of everything that provides labelled examples, for training and for testing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy
from numpy.typing import NDArray

from brokers.errors import UsageError

Inputs = NDArray[numpy.uint8] | NDArray[numpy.float32]
Labels = NDArray[numpy.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """N inputs and their labels, N at least 1.

    Args:
        inputs: pictures, uint8 (N, C, H, W), which the network normalises itself, or any float32 (N, ...).
        labels: class indices, int64 (N,).

    Raises `UsageError`: "BadArray" for another dtype or shape, "CountsDiffer", "NoExamples".
    """

    inputs: Inputs
    labels: Labels

    def __post_init__(self) -> None:
        inputs: NDArray[Any] = self.inputs
        if inputs.dtype not in (numpy.uint8, numpy.float32) or not inputs.ndim:
            raise _bad_array("inputs", inputs, "uint8 (N, C, H, W) or float32 (N, ...)")
        if inputs.dtype == numpy.uint8 and inputs.ndim != 4:
            raise _bad_array("pictures", inputs, "uint8 (N, C, H, W)")
        if self.labels.dtype != numpy.int64 or self.labels.ndim != 1:
            raise _bad_array("labels", self.labels, "int64 (N,)")
        if len(inputs) != len(self.labels):
            message = f"a data set with {len(inputs)} inputs has {len(self.labels)} labels, expected one for each input"
            raise UsageError("CountsDiffer", message, key="source.kind")
        if not len(inputs):
            message = "a data set has no examples, expected at least one for training and one for testing"
            raise UsageError("NoExamples", message, key="source.kind")

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> Examples:
        """The first `count` examples; all for None."""
        return Examples(self.inputs[:count], self.labels[:count])


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
    classes: tuple[str, ...]
    """Class names by label: 0, 1, ..."""
    horizontal_flip: bool = False
    """Whether augmentation may mirror a picture: a mirrored cat is a cat, a mirrored digit is not a digit."""

    def train(self) -> Examples:
        """The training examples, the same at every call. Raise `UsageError` if they cannot be loaded."""
        ...

    def test(self) -> Examples:
        """The test examples, none of them among the training examples."""
        ...
