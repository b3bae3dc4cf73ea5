"""The output folder of a training run: its events as JSON lines, weights, learning curves, a summary."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brokers.process.files import atomic_path
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import pack
from sources.inference.run_folder import JsonlWriter, read_jsonl, write_summary
from sources.training.learning_curves import plot_learning_curves
from sources.training.run_stats import TrainingRunStats

log = logging.getLogger(__name__)

EVENTS_FILE = "training.jsonl"
CURVES_FILE = "training.png"
MODEL_FILE = "model.safetensors"
PARTS_FOLDER = "parts"


class TrainingRunFolder:
    """Writes each event as it happens, and keeps the statistics. Events of a run that is resumed come first.

    Raises `BadFile` where the folder cannot be written.
    """

    def __init__(self, folder: Path, title: str, pictures: bool) -> None:
        self.folder = folder
        self.stats = TrainingRunStats(title)
        self._events = JsonlWriter(folder / EVENTS_FILE)
        self._title = title
        self._pictures = pictures
        for event in read_jsonl(folder / EVENTS_FILE):
            self.stats.add(event)

    def add(self, event: Mapping[str, Any]) -> None:
        self.stats.add(event)
        self._events.append(event)

    def finish(self, summary: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
        """Plot the curves and write the summary; return it with the names of all files."""
        self.close()
        return write_summary(self.folder, summary, {**files, "events": EVENTS_FILE, **self._plot()})

    def close(self) -> None:
        self._events.close()

    def _plot(self) -> dict[str, str]:
        if not self._pictures or not self.stats.executed_steps:
            return {}
        try:
            plot_learning_curves(self.stats, self.folder / CURVES_FILE, self._title)
        except ImportError as error:
            log.warning("no learning curves, %s: install the extra 'train' of sparse-mqtt", error)
            return {}
        except OSError as error:  # the events are written, so the run has not failed
            log.warning("the learning curves could not be written: %s", error)
            return {}
        return {"curves": CURVES_FILE}


def write_weights(folder: Path, parts: Mapping[str, TensorContent]) -> dict[str, str]:
    """Write the weights of a trained pipeline atomically; return the names of the files by kind.

    `parts/STAGE.safetensors` are those of each stage, `model.safetensors` has the names of the uncut network. Raises
    `OSError`.
    """
    (folder / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for part in parts.values() for name, tensor in part.tensors.items()}
    files = {f"{PARTS_FOLDER}/{stage}.safetensors": part for stage, part in parts.items()}
    for name, content in {**files, MODEL_FILE: TensorContent(tensors)}.items():
        # Message content has the format of a safetensors file.
        with atomic_path(folder / name) as partial, partial.open("wb") as file:
            file.writelines(pack(content.tensors, content.metadata))
    return {"model": MODEL_FILE, "parts": f"{PARTS_FOLDER}/"}
