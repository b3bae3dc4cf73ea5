"""Pictures as a source: the JPEG and PNG files of a folder, sent unchanged, or the test set of a data set."""

import functools
import io
import itertools
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy
from PIL import Image

from brokers.config.schema import SourceTable
from brokers.errors import UsageError
from brokers.process.image_decode import decode_picture
from brokers.protocol.messages import JPEG, JPEG_SIGNATURE, PNG, PNG_SIGNATURE
from sources.datasets.dataset import Dataset
from sources.inputs.source import Sample, Source

log = logging.getLogger(__name__)

_SUFFIXES = (".jpg", ".jpeg", ".png")


class ImageFolder(Source):
    """Yields the JPEG and PNG files of a folder, or one file, in natural order (`2.jpg` before `10.jpg`).

    `pattern` of the pipeline file is a glob below the folder, such as `"**/*.jpg"`; the default is the JPEG and PNG
    files in the folder itself. A file that begins like neither format is skipped, counted and logged; a damaged one is
    refused by the stage that decodes it.

    Raises `UsageError`: "NoSuchFile", or "NoPictures" where no file matches or none can be sent.
    """

    def __init__(self, table: SourceTable, path: Path) -> None:
        self.name = table.name
        self._path = path
        self._loop = table.loop
        self._files = _find_files(path, table.pattern)
        self._closed = threading.Event()

    def samples(self) -> Iterator[Sample]:
        index = 0
        files = self._files
        while files:
            readable = []
            for file in files:
                if self._closed.is_set():
                    return
                if sample := self._read(file, index):
                    readable.append(file)
                    yield sample
                    index += 1
            files = tuple(readable) if self._loop else ()
        if not index:
            names = ", ".join(file.name for file in self._files[:3]) + (", ..." if len(self._files) > 3 else "")
            message = f"{self._path}: none of its {len(self._files)} files is a JPEG or PNG picture: {names}"
            raise UsageError("NoPictures", message, key="source.path", path=str(self._path))

    def close(self) -> None:
        self._closed.set()

    def _read(self, file: Path, index: int) -> Sample | None:
        try:
            data = file.read_bytes()
        except OSError as error:
            self._skip(file, error.strerror or str(error))
            return None
        if data.startswith(JPEG_SIGNATURE):
            content_type = JPEG
        elif data.startswith(PNG_SIGNATURE):
            content_type = PNG
        else:
            self._skip(file, "expected JPEG or PNG")
            return None
        return Sample(self.name, index, data, content_type, functools.partial(decode_picture, data))

    def _skip(self, file: Path, reason: str) -> None:
        self.unreadable += 1
        log.warning("skipped %s: %s", file, reason)


class DatasetSource(Source):
    """Yields the test pictures of a data set in order, as PNG. Raises what `Dataset.test` raises."""

    def __init__(self, dataset: Dataset, name: str, *, loop: bool = False) -> None:
        self.name = name
        self._pictures = dataset.test().inputs.transpose(0, 2, 3, 1)  # (N, H, W, 3)
        self._loop = loop
        self._closed = threading.Event()

    def samples(self) -> Iterator[Sample]:
        for index in itertools.count():
            if self._closed.is_set() or (index == len(self._pictures) and not self._loop):
                return
            picture = numpy.ascontiguousarray(self._pictures[index % len(self._pictures)], numpy.uint8)
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "PNG")
            yield Sample(self.name, index, file.getvalue(), PNG, functools.partial(numpy.asarray, picture))

    def close(self) -> None:
        self._closed.set()


def _find_files(path: Path, pattern: str | None) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    if not path.is_dir():
        message = f"{path}: no such file or folder; expected a picture, or a folder of pictures"
        raise UsageError("NoSuchFile", message, key="source.path", path=str(path))
    files = [file for file in path.glob(pattern or "*") if file.is_file()]
    if pattern is None:
        files = [file for file in files if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")]
    if not files:
        message = f"{path}: no file matches {pattern or '*.jpg, *.jpeg, *.png'!r}"
        raise UsageError("NoPictures", message, key="source.path", path=str(path))
    return tuple(sorted(files, key=_natural_key))


def _natural_key(file: Path) -> tuple[tuple[tuple[int, str], ...], str]:
    """Compares digits as numbers; the plain name breaks the tie between `1.jpg` and `01.jpg`."""
    parts = re.findall(r"\d+|\D+", str(file))
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts), str(file)
