"""The output folder of a training run: events, learning curves, summary; and what a resumed run does with them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy
import pytest
from PIL import Image

from brokers.process.image_decode import RgbImage
from sources.training.history import TrainingHistory
from sources.training.learning_curves import plot_learning_curves
from sources.training.run_folder import TrainingRunFolder
from sources.training.run_stats import TrainingRunStats
from tests.support.training.training_events import EventDict, evaluation_event, rollback_event, run_events, step_event


def write_events(path: Path, events: Iterable[EventDict], *, pictures: bool = False) -> TrainingRunFolder:
    folder = TrainingRunFolder(path, "digits", pictures)
    for event in events:
        folder.add(event)
    return folder


def read_events(path: Path) -> list[EventDict]:
    return [json.loads(line) for line in (path / "training.jsonl").read_text().splitlines()]


def read_pixels(path: Path) -> RgbImage:
    with Image.open(path) as picture:
        assert picture.size == (1200, 900)
        return numpy.asarray(picture.convert("RGB"))


def test_event_is_written_at_once(tmp_path: Path) -> None:
    folder = write_events(tmp_path / "run", [step_event(1)])
    assert read_events(tmp_path / "run") == [step_event(1)]
    folder.add(evaluation_event(1))
    assert read_events(tmp_path / "run") == [step_event(1), evaluation_event(1)]
    folder.close()


def test_finished_run_has_events_curves_and_summary(tmp_path: Path) -> None:
    folder = write_events(tmp_path, run_events(rollbacks={17: 10}), pictures=True)
    summary = folder.finish({"steps": 40}, {"model": "model.safetensors"})
    assert summary == {
        "steps": 40, "outputs": str(tmp_path),
        "files": {"model": "model.safetensors", "events": "training.jsonl", "curves": "training.png"},
    }  # fmt: skip
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert {path.name for path in tmp_path.iterdir()} == {"training.jsonl", "training.png", "summary.json"}
    pixels = read_pixels(tmp_path / "training.png")
    training, test, forward, update = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x56, 0xB4, 0xE9), (0x00, 0x9E, 0x73)
    for colour in (training, test, forward, update):
        assert (pixels == colour).all(axis=2).any()


@pytest.mark.parametrize(
    "events",
    [
        [],
        [step_event(1, accuracy=None), rollback_event(0, 1)],
        [step_event(1, time={}), step_event(2, steps=2, epochs=100), evaluation_event(2)],
        [*run_events(rollbacks={number: number - 1 for number in range(2, 39)})],
    ],
    ids=["empty", "undone-without-accuracy", "without-times", "many-rollbacks"],
)
def test_unusual_runs_can_be_plotted(tmp_path: Path, events: list[EventDict]) -> None:
    history = TrainingHistory()
    for event in events:
        history.add(event)
    plot_learning_curves(history, tmp_path / "a.png", "a $title$ of_mine")
    assert read_pixels(tmp_path / "a.png").std() > 1


def test_resumed_run_continues_the_events_and_the_statistics(tmp_path: Path) -> None:
    events = list(run_events(rollbacks={17: 10}))
    write_events(tmp_path, events[:20]).close()
    resumed = write_events(tmp_path, events[20:])
    resumed.close()
    assert read_events(tmp_path) == events
    stats = TrainingRunStats("digits")
    for event in events:
        stats.add(event)
    assert resumed.stats.summary() == stats.summary()
    assert resumed.stats.history == stats.history


def test_missing_matplotlib_costs_the_plot_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    summary = write_events(tmp_path, [step_event(1)], pictures=True).finish({}, {})
    assert summary["files"] == {"events": "training.jsonl"}
    assert "install the extra 'train'" in caplog.text


def test_nothing_is_plotted_without_pictures_or_steps(tmp_path: Path) -> None:
    for name, events, pictures in (("a", [step_event(1)], False), ("b", [], True)):
        files = write_events(tmp_path / name, events, pictures=pictures).finish({}, {})["files"]
        assert files == {"events": "training.jsonl"}
