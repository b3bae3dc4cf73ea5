"""Creates the source or data set that `[source]` of a pipeline file describes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

from brokers.config.schema import SourceTable
from brokers.errors import UsageError
from brokers.process.import_string import CannotLoad, describe_exception, import_string
from sources.datasets.dataset import Dataset, Examples
from sources.inputs.source import Source

DATASET_KINDS = ("digits", "cifar10")
SOURCE_KINDS = ("video", "images", "camera", *DATASET_KINDS, "ingress")  # "ingress" is served by the gateway


def make_source(table: SourceTable, folder: Path) -> Source:
    """Create a source; relative paths are below `folder`, that of the pipeline file.

    A kind `"package.module:Class"` is created as `Class(name, **settings)`. Raises `UsageError`.
    """
    kind = table.kind
    # Imported where needed: PyAV may be missing on a device that sends sensor readings only.
    if kind == "camera":
        from sources.inputs.video import Camera

        return Camera(table)
    if kind in DATASET_KINDS:
        from sources.inputs.images import DatasetSource

        return DatasetSource(make_dataset(table, folder), table.name, loop=table.loop)
    if kind == "video":
        from sources.inputs.video import VideoFile, find_video

        return VideoFile(table, find_video(_path(table, "file"), folder))
    if kind == "images":
        from sources.inputs.images import ImageFolder

        return ImageFolder(table, folder / Path(_path(table, "folder")).expanduser())
    if ":" in kind:
        source: Source = _make_own(table, folder, (table.name,), Source, ("samples", "close", "name"))
        return source
    raise _unknown_kind(kind, SOURCE_KINDS)


def make_dataset(table: SourceTable, folder: Path) -> Dataset:
    """Create a data set; relative paths are below `folder`, that of the pipeline file.

    A kind `"package.module:Class"` is created as `Class(**settings)`. `limit` bounds the training examples. The data
    set checks its examples when they are loaded. Raises `UsageError`.
    """
    kind = table.kind
    dataset: Dataset
    if kind == "digits":
        from sources.datasets.bundled import Digits

        dataset = Digits()
    elif kind == "cifar10":
        from sources.datasets.bundled import Cifar10

        dataset = Cifar10(None if table.path is None else folder / Path(table.path).expanduser())
    elif ":" in kind:
        attributes = ("name", "classes", "horizontal_flip", "train", "test")
        dataset = _make_own(table, folder, (), Dataset, attributes)
    else:
        raise _unknown_kind(kind, DATASET_KINDS)
    return CheckedDataset(dataset, kind, folder, table.limit)


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
        if not (isinstance(classes, tuple | list) and all(isinstance(name, str) for name in classes)):
            raise self._bad_classes(classes)
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
            raise _bad_class(self._kind, describe_exception(error, self._folder)) from error
        if not isinstance(examples, Examples):
            raise _bad_class(self._kind, f"{subset}() returned {type(examples).__name__}, expected sources.Examples")
        if examples.labels.dtype != numpy.int64:  # values, not classes
            return examples
        if not self.classes:
            raise self._bad_classes(self.classes)
        wrong = (examples.labels < 0) | (examples.labels >= len(self.classes))
        if wrong.any():
            index = int(numpy.argwhere(wrong)[0, 0])
            message = (
                f"data set {self.name!r}: label {index} of {subset}() is {examples.labels[wrong][0]}, "
                f"expected 0 to {len(self.classes) - 1} for {len(self.classes)} classes"
            )
            raise UsageError("LabelOutOfRange", message, key="source.kind", index=index)
        return examples

    def _bad_classes(self, classes: object) -> UsageError:
        return _bad_class(self._kind, f"its 'classes' are {classes!r}, expected a tuple of names for integer labels")


def _path(table: SourceTable, what: str) -> str:
    if table.path:
        return table.path
    message = f"source setting 'path' is {table.path!r}, expected the {what} to read for kind {table.kind!r}"
    raise UsageError("BadSetting", message, key="source.path")


def _unknown_kind(kind: str, known: tuple[str, ...]) -> UsageError:
    message = f"source kind {kind!r}: expected one of {', '.join(known)}, or a class as 'package.module:Class'"
    return UsageError("UnknownSource", message, key="source.kind", kind=kind, known=known)


def _bad_class(kind: str, reason: str) -> UsageError:
    return UsageError("BadSourceClass", f"source {kind!r}: {reason}", key="source.kind", kind=kind)


def _make_own(
    table: SourceTable, folder: Path, arguments: tuple[str, ...], protocol: type, attributes: tuple[str, ...]
) -> Any:
    """Create an instance of the user's class, and check that it has the attributes of the protocol."""
    try:
        created = import_string(table.kind, folder)(*arguments, **table.settings)
    except CannotLoad as error:
        raise _bad_class(table.kind, error.problem) from error
    except UsageError:
        raise
    except Exception as error:  # the user's code may raise anything: report the exception and its line
        raise _bad_class(table.kind, describe_exception(error, folder)) from error
    for attribute in attributes:
        if not hasattr(created, attribute):
            raise _bad_class(table.kind, f"has no {attribute!r}: see {protocol.__module__}.{protocol.__name__}")
    return created
