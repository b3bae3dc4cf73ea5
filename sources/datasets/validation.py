"""A data set whose examples are looked at before a network is: a wrong label is one line, and no crash far away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy

from brokers.errors import UsageError
from brokers.process.import_string import describe_exception
from sources.datasets.dataset import Dataset, Examples
from sources.errors import BadSourceClass, LabelOutOfRange


class CheckedDataset(Dataset):
    """Another data set, named by `kind` in a pipeline file, of which at most `limit` examples are trained on.

    Raises `BadSourceClass` for what is no data set, and for whatever a user's own raises; `LabelOutOfRange`, which
    names the first label that has no class; what `Examples` and the data set itself raise.
    """

    def __init__(self, dataset: Dataset, kind: str, base: Path, limit: int | None = None) -> None:
        self._dataset, self._kind, self._base, self._limit = dataset, kind, base, limit
        self.name, self.horizontal_flip = str(dataset.name), bool(dataset.horizontal_flip)
        classes: object = dataset.classes
        if not (isinstance(classes, tuple | list) and classes and all(isinstance(name, str) for name in classes)):
            raise BadSourceClass(kind, f"its 'classes' are {classes!r}, expected a tuple of names")
        self.classes = tuple(classes)

    def train(self) -> Examples:
        return self._checked("train", self._dataset.train).first(self._limit)

    def test(self) -> Examples:
        return self._checked("test", self._dataset.test)

    def _checked(self, part: str, load: Callable[[], object]) -> Examples:
        try:
            examples = load()
        except UsageError:
            raise
        except Exception as error:  # whatever a user's own code raises, its author needs to see: which class, and what
            raise BadSourceClass(self._kind, describe_exception(error, self._base)) from error
        if not isinstance(examples, Examples):
            given = type(examples).__name__
            raise BadSourceClass(self._kind, f"its {part}() gave {given}, expected sources.datasets.dataset.Examples")
        wrong = (examples.labels < 0) | (examples.labels >= len(self.classes))
        if wrong.any():
            index = int(numpy.argmax(wrong))
            raise LabelOutOfRange(self.name, part, index, int(examples.labels[index]), len(self.classes))
        return examples
