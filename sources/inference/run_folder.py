"""What a run leaves behind in `runs/NAME-TIME/`: results as JSON lines, pictures worth looking at, a summary."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sources.inference.inference_run import SampleResult
from sources.jsonl import JsonlWriter, write_atomic

if TYPE_CHECKING:
    from sources.gallery.gallery import Gallery

log = logging.getLogger(__name__)

RESULTS_FILE = "results.jsonl"
SUMMARY_FILE = "summary.json"


class InferenceRunFolder:
    """Takes reports as they come, and writes the rest at the end. Each line is whole as soon as it is there."""

    def __init__(self, folder: Path, *, title: str, frames_per_s: float, pictures: bool) -> None:
        self.folder = folder
        self._lines = JsonlWriter(folder / RESULTS_FILE)
        self._title = title
        self._frames_per_s = frames_per_s
        self._pictures = pictures
        self._album: Gallery | None = None

    def add(self, report: SampleResult) -> None:
        """Keep one report; its picture, if it has one, may come into the album. Not on the loop: it draws."""
        self._lines.append(report.result)
        if self._pictures and report.sample.load_image is not None and "error" not in report.result:
            self._open_album().add(report.sample.load_image, report.result)

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write what remains to be written; return the summary with what was written in it."""
        self._lines.close()
        files: dict[str, Any] = {}
        try:
            files = self._album.finish() if self._album else {}
        except OSError as error:  # the results are there: no run is lost for want of its pictures
            log.warning("the pictures could not be written: %s", error)
        return write_summary(self.folder, summary, {"results": RESULTS_FILE, **files})

    def _open_album(self) -> Gallery:
        if self._album is None:
            from sources.gallery.gallery import Gallery  # PyAV and Pillow: not on a machine that sends numbers

            self._album = Gallery(self.folder, fps=self._frames_per_s, title=self._title)
        return self._album


def write_summary(folder: Path, summary: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
    """Write `summary.json`; return the summary with where the run's files are, which stand by name in `files`."""
    whole = {**summary, "outputs": str(folder), "files": dict(files)}
    try:
        write_atomic(folder / SUMMARY_FILE, (json.dumps(whole, indent=2) + "\n").encode())
    except OSError as error:  # whoever asked for the run has it from here
        log.warning("the summary could not be written: %s", error)
    return whole
