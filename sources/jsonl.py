"""Files of JSON lines that may be read while they grow, and that stay readable after a crash of the writer."""

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from brokers.errors import BadFile

log = logging.getLogger(__name__)


class JsonlWriter:
    """Appends one object a line. A line is complete once `append` returns; a torn line does not damage the next one.

    Lines that cannot be written, for example on a full disk, are counted: the run goes on. Raises `BadFile` where the
    file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._missing = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: bytes that could not be written must not be written later, in the middle of another line.
            self._file = path.open("ab+", buffering=0)
            self._torn = self._file.seek(0, os.SEEK_END) > 0
            if self._torn:
                self._file.seek(-1, os.SEEK_END)
                self._torn = self._file.read(1) != b"\n"
        except OSError as error:
            raise BadFile(str(path.parent), f"the results cannot be written: {error.strerror}") from None

    def append(self, item: Mapping[str, Any]) -> None:
        rest = (b"\n" if self._torn else b"") + json.dumps(item).encode() + b"\n"
        try:
            while rest:
                self._torn = True
                rest = rest[self._file.write(rest) or 0 :]
            self._torn = False
        except OSError as error:
            self._missing += 1
            if self._missing == 1:
                log.warning("%s: cannot be written, the run goes on without: %s", self._path, error.strerror)

    def close(self) -> None:
        if self._missing and not self._file.closed:
            log.warning("%s: %d lines are missing", self._path, self._missing)
        self._file.close()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file; lines torn by a crash or a full disk are skipped with a warning."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                item = json.loads(line)
            except (ValueError, RecursionError):
                item = None
            if isinstance(item, dict):
                yield item
            elif line.strip():
                log.warning("%s: skipped line %d, which is incomplete", path, number)
