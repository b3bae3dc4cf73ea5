"""From the settings of a pipeline file to a source, or to a data set."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brokers.config.schema import SourceTable
from brokers.errors import UsageError
from brokers.process.import_string import CannotLoad, describe_exception, import_string
from sources.datasets.dataset import Dataset
from sources.datasets.validation import CheckedDataset
from sources.errors import BadSetting, BadSourceClass, UnknownSource
from sources.inputs.demo_videos import find_video
from sources.inputs.source import Source

DATASET_KINDS = ("digits", "cifar10")
SOURCE_KINDS = ("video", "images", "camera", *DATASET_KINDS, "ingress")  # the last is the gateway's: it makes no source


def make_source(table: SourceTable, base: Path) -> Source:
    """Return the source that `[source]` of a pipeline file describes; relative paths are below `base`, its folder.

    A kind `"package.module:Class"` gives `Class(name, **settings)`. Raises a `UsageError` that names what is wrong.
    """
    kind, name = table.kind, table.name
    # PyAV is imported by the sources that need it only: a sensor's machine may do without it.
    if kind == "camera":
        from sources.inputs.camera import Camera

        device = 0 if table.device is None else table.device
        return Camera(device, name=name, limit=table.limit, encoding=table.encoding, quality=table.quality)
    if kind in DATASET_KINDS:
        from sources.inputs.test_set import DatasetSource

        return DatasetSource(make_dataset(table, base), name=name, limit=table.limit, loop=table.loop)
    if kind in ("video", "images") and not table.path:
        what = "file" if kind == "video" else "folder"
        raise BadSetting("path", table.path, f"the {what} to read for kind {kind!r}")
    if kind == "video":
        return _video(table, base)
    if kind == "images":
        from sources.inputs.images import ImageFolder

        folder = base / Path(str(table.path)).expanduser()
        return ImageFolder(folder, table.pattern, name=name, limit=table.limit, loop=table.loop)
    if ":" in kind:
        source: Source = _own(kind, base, (name,), table.settings, ("samples", "close", "name"), Source)
        return source
    raise UnknownSource(kind, SOURCE_KINDS)


def make_dataset(table: SourceTable, base: Path) -> Dataset:
    """Return the data set that `[source]` of a pipeline file describes; relative paths are below `base`, its folder.

    A kind `"package.module:Class"` gives `Class(**settings)`. `limit` is how many examples there are to train on. What
    the data set gives is checked as it comes. Raises a `UsageError` that names what is wrong.
    """
    kind = table.kind
    if kind == "digits":
        from sources.datasets.digits import Digits

        return CheckedDataset(Digits(), kind, base, table.limit)
    if kind == "cifar10":
        from sources.datasets.cifar10 import Cifar10

        root = None if table.path is None else base / Path(table.path).expanduser()
        return CheckedDataset(Cifar10(root), kind, base, table.limit)
    if ":" in kind:
        dataset = _own(kind, base, (), table.settings, ("name", "classes", "horizontal_flip", "train", "test"), Dataset)
        return CheckedDataset(dataset, kind, base, table.limit)
    raise UnknownSource(kind, DATASET_KINDS)


def _video(table: SourceTable, base: Path) -> Source:
    from sources.inputs.video import VideoFile

    return VideoFile(
        find_video(str(table.path), base),
        name=table.name,
        loop=table.loop,
        pace=table.pace,
        limit=table.limit,
        encoding=table.encoding,
        quality=table.quality,
    )


def _own(
    target: str,
    base: Path,
    arguments: tuple[str, ...],
    options: Mapping[str, Any],
    attributes: tuple[str, ...],
    looks_like: type,
) -> Any:
    """What a class of the user's own makes, which must have the attributes of the protocol."""
    try:
        make = import_string(target, base)
    except CannotLoad as error:
        raise BadSourceClass(target, error.problem) from error
    try:
        made = make(*arguments, **options)
    except UsageError:
        raise
    except Exception as error:  # whatever a user's own code raises, its author needs to see: which class, and what
        raise BadSourceClass(target, describe_exception(error, base)) from error
    for attribute in attributes:
        if not hasattr(made, attribute):
            raise BadSourceClass(target, f"has no {attribute!r}: see {looks_like.__module__}.{looks_like.__name__}")
    return made
