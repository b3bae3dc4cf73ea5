"""The output folder of an inference run, `runs/NAME-TIME/`: results as JSON lines, pictures, a summary.

The files of JSON lines may be read while they grow, and stay readable after a crash of the writer.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brokers.errors import BadFile, describe_error
from brokers.process.files import check_writable, write_atomic
from sources.inputs.source import Sample

if TYPE_CHECKING:
    from sources.gallery.gallery import Gallery

log = logging.getLogger(__name__)

RESULTS_FILE = "results.jsonl"
SUMMARY_FILE = "summary.json"


class InferenceRunFolder:
    """Writes each result as it arrives, pictures and the summary at the end. Raises `BadFile`."""

    def __init__(self, folder: Path, *, title: str, frames_per_s: float, pictures: bool) -> None:
        self.folder = folder
        self._results = JsonlWriter(folder / RESULTS_FILE)
        self._title = title
        self._frames_per_s = frames_per_s
        self._pictures = pictures
        self._gallery: Gallery | None = None

    def add(self, sample: Sample, result: Mapping[str, Any]) -> None:
        """Write one result, and add its picture to the gallery. Blocks: not for the event loop."""
        self._results.append(result)
        if self._pictures and sample.load_image is not None and "error" not in result:
            if self._gallery is None:  # imported here: a device without pictures may not have PyAV
                from sources.gallery.gallery import Gallery

                self._gallery = Gallery(self.folder, fps=self._frames_per_s, title=self._title)
            self._gallery.add(sample.load_image, result)

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write pictures and summary; return the summary with the names of the files."""
        self._results.close()
        files: dict[str, Any] = {}
        try:
            files = self._gallery.finish() if self._gallery else {}
        except Exception as error:  # noqa: BLE001 - the results are written, so the run has not failed
            log.warning("the pictures could not be written: %s", describe_error(error))
        return write_summary(self.folder, summary, {"results": RESULTS_FILE, **files})


def write_summary(folder: Path, summary: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
    """Write `summary.json`; return the summary with its folder, `outputs`, and the names of the run's `files`."""
    complete = {**summary, "outputs": str(folder), "files": dict(files)}
    try:
        write_atomic(folder / SUMMARY_FILE, (json.dumps(complete, indent=2) + "\n").encode())
    except OSError as error:  # the command prints the summary as well
        log.warning("the summary could not be written: %s", error)
    return complete


class JsonlWriter:
    """Appends one object a line. A line is complete once `append` returns; a torn line does not damage the next one.

    Lines that cannot be written, for example on a full disk, are counted: the run goes on. Raises `BadFile` where the
    file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._missing = 0
        try:
            check_writable(path.parent)
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
