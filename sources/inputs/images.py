"""Pictures in a folder as a source: each file is sent as it is."""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from brokers.protocol.messages import JPEG, PNG
from sources.errors import NoPictures, NoSuchFile
from sources.inputs.sample import Sample, decode_image
from sources.inputs.source import Source

log = logging.getLogger(__name__)

_CONTENT_TYPES = {"JPEG": JPEG, "PNG": PNG}
_SUFFIXES = (".jpg", ".jpeg", ".png")


class ImageFolder(Source):
    """The JPEG and PNG files of a folder, or one file, in the order of their names (`2.jpg` before `10.jpg`).

    `pattern` is a glob below the folder, such as `"**/*.jpg"`; left out, the JPEG and PNG files in the folder itself.
    Only the head of a file is looked at here; a body that is damaged is refused by the stage that decodes it. A file
    that is no picture is left out, counted, and named in the log.
    """

    def __init__(
        self,
        path: Path | str,
        pattern: str | None = None,
        *,
        name: str = "pictures",
        limit: int | None = None,
        loop: bool = False,
    ) -> None:
        self.name = name
        self.path = Path(path)
        self._limit, self._loop = limit, loop
        self._closed = threading.Event()
        self._files = _pictures_of(self.path, pattern)

    @property
    def count(self) -> int | None:
        """How many samples will come; None: without end."""
        if self._loop:
            return self._limit
        return len(self._files) if self._limit is None else min(len(self._files), self._limit)

    def samples(self) -> Iterator[Sample]:
        index, unread = 0, set[Path]()
        while True:
            for file in self._files:
                if self._closed.is_set() or (self._limit is not None and index >= self._limit):
                    return
                if file in unread:
                    continue
                sample = self._sample(file, index)
                if sample is None:
                    unread.add(file)
                    continue
                yield sample
                index += 1
            if len(unread) == len(self._files):
                raise NoPictures(str(self.path), "*", tuple(file.name for file in self._files))
            if not self._loop:
                return

    def close(self) -> None:
        self._closed.set()

    def _sample(self, file: Path, index: int) -> Sample | None:
        try:
            data = file.read_bytes()
            with Image.open(file) as image:  # reads the head only
                content_type = _CONTENT_TYPES.get(image.format or "")
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
            # Pillow raises SyntaxError and ValueError too for heads that are broken in some ways.
            self._leave_out(file, str(error))
            return None
        if content_type is None:
            self._leave_out(file, "expected JPEG or PNG")
            return None
        return Sample(self.name, index, data, content_type, functools.partial(decode_image, data))

    def _leave_out(self, file: Path, reason: str) -> None:
        self.unreadable += 1
        log.warning("%s is left out: %s", file, reason)


def _pictures_of(path: Path, pattern: str | None) -> tuple[Path, ...]:
    if path.is_file():
        return (path,)
    if not path.is_dir():
        raise NoSuchFile(str(path), "a picture, or a folder of pictures")
    files = [file for file in path.glob(pattern or "*") if file.is_file()]
    if pattern is None:
        files = [file for file in files if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")]
    if not files:
        raise NoPictures(str(path), pattern or "*.jpg, *.jpeg, *.png")
    return tuple(sorted(files, key=_natural_key))


def _natural_key(file: Path) -> tuple[tuple[tuple[int, str], ...], str]:
    """Numbers inside names count as numbers; the name itself decides between `1.jpg` and `01.jpg`."""
    parts = re.findall(r"\d+|\D+", str(file))
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in parts), str(file)
