"""Creates the source or data set that `[source]` of a pipeline file describes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brokers.config.schema import SourceTable
from brokers.errors import UsageError
from brokers.process.import_string import CannotLoad, describe_exception, import_string
from sources.datasets.dataset import Dataset
from sources.datasets.validation import CheckedDataset, bad_class
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
        from sources.inputs.camera import Camera

        return Camera(table)
    if kind in DATASET_KINDS:
        from sources.inputs.dataset_source import DatasetSource

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
        from sources.datasets.digits import Digits

        dataset = Digits()
    elif kind == "cifar10":
        from sources.datasets.cifar10 import Cifar10

        dataset = Cifar10(None if table.path is None else folder / Path(table.path).expanduser())
    elif ":" in kind:
        attributes = ("name", "classes", "horizontal_flip", "train", "test")
        dataset = _make_own(table, folder, (), Dataset, attributes)
    else:
        raise _unknown_kind(kind, DATASET_KINDS)
    return CheckedDataset(dataset, kind, folder, table.limit)


def _path(table: SourceTable, what: str) -> str:
    if table.path:
        return table.path
    message = f"source setting 'path' is {table.path!r}, expected the {what} to read for kind {table.kind!r}"
    raise UsageError("BadSetting", message, key="source.path")


def _unknown_kind(kind: str, known: tuple[str, ...]) -> UsageError:
    message = f"source kind {kind!r}: expected one of {', '.join(known)}, or a class as 'package.module:Class'"
    return UsageError("UnknownSource", message, key="source.kind", kind=kind, known=known)


def _make_own(
    table: SourceTable, folder: Path, arguments: tuple[str, ...], protocol: type, attributes: tuple[str, ...]
) -> Any:
    """Create an instance of the user's class, and check that it has the attributes of the protocol."""
    settings: Mapping[str, Any] = table.settings
    try:
        created = import_string(table.kind, folder)(*arguments, **settings)
    except CannotLoad as error:
        raise bad_class(table.kind, error.problem) from error
    except UsageError:
        raise
    except Exception as error:  # the user's code may raise anything: report the exception and its line
        raise bad_class(table.kind, describe_exception(error, folder)) from error
    for attribute in attributes:
        if not hasattr(created, attribute):
            raise bad_class(table.kind, f"has no {attribute!r}: see {protocol.__module__}.{protocol.__name__}")
    return created
