"""A file of JSON lines that is read while it grows, and that outlives whoever writes it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from brokers.errors import BadFile

log = logging.getLogger(__name__)


class JsonlWriter:
    """Appends one object a line. A line is whole as soon as it is there, and one that was cut off spoils no other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what could not be written does not come later, in the midst of something else.
            self._file = path.open("ab", buffering=0)
            self._torn = not _ends_a_line(path)
        except OSError as error:
            raise BadFile(str(path.parent), f"the results cannot be written: {error.strerror}") from None

    def append(self, found: Mapping[str, Any]) -> None:
        """Write one line; raise `OSError` where there is no room for it."""
        left = (b"\n" if self._torn else b"") + json.dumps(found).encode() + b"\n"
        while left:
            self._torn = True
            left = left[self._file.write(left) or 0 :]
        self._torn = False

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of such a file; a line that was cut off, by a kill or a full disk, is read over."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                found = None
            if isinstance(found, dict):
                yield found
            elif line.strip():
                log.warning("%s: line %d is not whole, and is read over", path, number)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that is there as a whole or not at all; raise `OSError` where it cannot be."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_bytes(data)
    partial.replace(path)


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
