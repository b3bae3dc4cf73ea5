"""Validation of a data set when it is loaded: a wrong label is one error line here, not a crash in a remote stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy

from brokers.errors import UsageError
from brokers.process.import_string import describe_exception
from sources.datasets.dataset import Dataset, Examples


def bad_class(kind: str, reason: str) -> UsageError:
    """The error for a source or data set class of the user that cannot be used."""
    return UsageError("BadSourceClass", f"source {kind!r}: {reason}", key="source.kind", kind=kind)


class CheckedDataset(Dataset):
    """Wraps the data set that a pipeline file names as `kind`; at most `limit` examples are trained on.

    Raises `UsageError`: "BadSourceClass" for attributes of a wrong type and any exception of the user's code,
    "LabelOutOfRange" for the first label without a class, and what `Examples` and the data set raise.
    """

    def __init__(self, dataset: Dataset, kind: str, folder: Path, limit: int | None = None) -> None:
        self._dataset = dataset
        self._kind = kind
        self._folder = folder
        self._limit = limit
        self.name = str(dataset.name)
        self.horizontal_flip = bool(dataset.horizontal_flip)
        classes: object = dataset.classes
        if not (isinstance(classes, tuple | list) and classes and all(isinstance(name, str) for name in classes)):
            raise bad_class(kind, f"its 'classes' are {classes!r}, expected a tuple of names")
        self.classes = tuple(classes)

    def train(self) -> Examples:
        return self._load("train", self._dataset.train).first(self._limit)

    def test(self) -> Examples:
        return self._load("test", self._dataset.test)

    def _load(self, subset: str, load: Callable[[], object]) -> Examples:
        try:
            examples = load()
        except UsageError:
            raise
        except Exception as error:  # the user's code may raise anything: report the exception and its line
            raise bad_class(self._kind, describe_exception(error, self._folder)) from error
        if not isinstance(examples, Examples):
            raise bad_class(self._kind, f"{subset}() returned {type(examples).__name__}, expected sources.Examples")
        wrong = (examples.labels < 0) | (examples.labels >= len(self.classes))
        if wrong.any():
            index = int(numpy.argmax(wrong))
            message = (
                f"data set {self.name!r}: label {index} of {subset}() is {examples.labels[index]}, "
                f"expected 0 to {len(self.classes) - 1} for {len(self.classes)} classes"
            )
            raise UsageError("LabelOutOfRange", message, key="source.kind", index=index)
        return examples
