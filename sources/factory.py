"""From the settings of a pipeline file to a source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brokers.errors import UsageError
from brokers.own_code import CannotLoad, load_named, told
from brokers.tables import SourceTable
from sources.assets import find_video
from sources.errors import BadSetting, BadSourceClass, UnknownSource
from sources.source import Source

KINDS = ("video", "images", "camera", "ingress")  # the last is the gateway's: it makes no source


def make_source(table: SourceTable, base: Path) -> Source:
    """Return the source that `[source]` of a pipeline file describes; relative paths are below `base`, its folder.

    A kind `"package.module:Class"` gives `Class(name, **settings)`. Raises a `UsageError` that names what is wrong.
    """
    kind, name = table.kind, table.name
    # PyAV is imported by the sources that need it only: a sensor's machine may do without it.
    if kind == "camera":
        from sources.camera import Camera

        device = 0 if table.device is None else table.device
        return Camera(device, name=name, limit=table.limit, encoding=table.encoding, quality=table.quality)
    if kind in ("video", "images") and not table.path:
        what = "file" if kind == "video" else "folder"
        raise BadSetting("path", table.path, f"the {what} to read for kind {kind!r}")
    if kind == "video":
        from sources.video import VideoFile

        return VideoFile(
            find_video(str(table.path), base),
            name=name,
            loop=table.loop,
            pace=table.pace,
            limit=table.limit,
            encoding=table.encoding,
            quality=table.quality,
        )
    if kind == "images":
        from sources.images import PictureFolder

        folder = base / Path(str(table.path)).expanduser()
        return PictureFolder(folder, table.pattern, name=name, limit=table.limit, loop=table.loop)
    if ":" in kind:
        return _own_source(kind, base, name, table.settings)
    raise UnknownSource(kind, KINDS)


def _own_source(target: str, base: Path, name: str, options: Mapping[str, Any]) -> Source:
    try:
        make = load_named(target, base)
    except CannotLoad as error:
        raise BadSourceClass(target, error.problem) from error
    try:
        source = make(name, **options)
    except UsageError:
        raise
    except Exception as error:  # whatever a user's own code raises, its author needs to see: which class, and what
        raise BadSourceClass(target, told(error, base)) from error
    for attribute in ("samples", "close", "name"):
        if not hasattr(source, attribute):
            raise BadSourceClass(target, f"has no {attribute!r}: see sources.source.Source")
    return source  # type: ignore[no-any-return]  # checked just above, by hand
