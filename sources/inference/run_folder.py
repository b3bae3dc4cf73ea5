"""The output folder of an inference run, `runs/NAME-TIME/`: results as JSON lines, pictures, a summary."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brokers.process.files import write_atomic
from sources.inputs.sample import Sample
from sources.jsonl import JsonlWriter

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
            self._open_gallery().add(sample.load_image, result)

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Write pictures and summary; return the summary with the names of the files."""
        self._results.close()
        files: dict[str, Any] = {}
        try:
            files = self._gallery.finish() if self._gallery else {}
        except OSError as error:  # the results are written, so the run has not failed
            log.warning("the pictures could not be written: %s", error)
        return write_summary(self.folder, summary, {"results": RESULTS_FILE, **files})

    def _open_gallery(self) -> Gallery:
        if self._gallery is None:
            from sources.gallery.gallery import Gallery  # imports PyAV, which a device without pictures may not have

            self._gallery = Gallery(self.folder, fps=self._frames_per_s, title=self._title)
        return self._gallery


def write_summary(folder: Path, summary: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
    """Write `summary.json`; return the summary with its folder, `outputs`, and the names of the run's `files`."""
    complete = {**summary, "outputs": str(folder), "files": dict(files)}
    try:
        write_atomic(folder / SUMMARY_FILE, (json.dumps(complete, indent=2) + "\n").encode())
    except OSError as error:  # the command prints the summary as well
        log.warning("the summary could not be written: %s", error)
    return complete
