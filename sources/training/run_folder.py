"""What a training run leaves behind in its folder: its events as JSON lines, the picture of them, a summary."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sources.inference.run_folder import write_summary
from sources.jsonl import JsonlWriter, read_jsonl
from sources.training.history import TrainingHistory
from sources.training.learning_curves import plot_learning_curves

log = logging.getLogger(__name__)

EVENTS_FILE = "training.jsonl"
CURVES_FILE = "training.png"


class TrainingRunFolder:
    """Takes events as they happen. In a folder that has some already, which is a run that is resumed, they go on.

    A run is worth more than its record: where there is no room for a line, a warning says so, and training goes on.
    """

    def __init__(self, folder: Path, title: str, pictures: bool) -> None:
        self.folder = folder
        self._lines = JsonlWriter(folder / EVENTS_FILE)
        self._title = title
        self._pictures = pictures
        self._history = TrainingHistory.from_events(self.recorded_events())
        self._unwritten = 0

    def recorded_events(self) -> Iterator[dict[str, Any]]:
        """The events that are in the record: those of the run so far, for one that goes on with it to count them."""
        return read_jsonl(self.folder / EVENTS_FILE)

    def add(self, event: Mapping[str, Any]) -> None:
        """Keep one event."""
        self._history.add(event)
        try:
            self._lines.append(event)
        except OSError as error:
            self._unwritten += 1
            if self._unwritten == 1:
                log.warning("%s: cannot be written, training goes on without: %s", self._lines.path, error.strerror)

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Draw the curves and write the summary; return it with what was written in its `files`, beside its own."""
        self._lines.close()
        if self._unwritten:
            log.warning("%s: %d events are missing", self._lines.path, self._unwritten)
        files = {**summary.get("files", {}), "events": EVENTS_FILE, **self._draw()}
        return write_summary(self.folder, summary, files)

    def close(self) -> None:
        """Leave the record as it stands, to be gone on with."""
        self._lines.close()

    def _draw(self) -> dict[str, str]:
        if not self._pictures or not self._history.executed_steps:
            return {}
        try:
            plot_learning_curves(self._history, self.folder / CURVES_FILE, self._title)
        except ImportError as error:
            log.warning("the curves are not drawn, %s: install the extra 'train' of sparse-mqtt", error)
            return {}
        except OSError as error:  # the events are there: no run is lost for want of its picture
            log.warning("the curves could not be written: %s", error)
            return {}
        return {"curves": CURVES_FILE}
