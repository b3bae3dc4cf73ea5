"""The output folder of a training run: events, learning curves, summary; and what a resumed run does with them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from brokers.process.image_decode import RgbImage
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_array
from sources.training.learning_curves import plot_learning_curves
from sources.training.run_stats import TrainingRunStats
from sources.training.training_run import MODEL_FILE, TrainingRunFolder, write_weights
from stages.partition.partition import partition
from tests.support.environment.full_disk import full_disk
from tests.support.training.training_events import EventDict, evaluation_event, rollback_event, run_events, step_event
from tests.support.training.training_network import CUTS, SmallNetwork


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
    stats = TrainingRunStats("digits")
    for event in events:
        stats.add(event)
    plot_learning_curves(stats, tmp_path / "a.png", "a $title$ of_mine")
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
    assert resumed.stats == stats


def test_missing_matplotlib_costs_the_plot_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    summary = write_events(tmp_path, [step_event(1)], pictures=True).finish({}, {})
    assert summary["files"] == {"events": "training.jsonl"}
    assert "install the extra 'train'" in caplog.text


def test_plot_that_fails_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Failed to process string\nwith tex")

    monkeypatch.setattr("sources.training.training_run.plot_learning_curves", fail)
    summary = write_events(tmp_path, [step_event(1)], pictures=True).finish({}, {})
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["files"] == {"events": "training.jsonl"}
    reason = "RuntimeError: Failed to process string with tex"
    assert caplog.messages == [f"the learning curves could not be plotted: {reason}"]


def test_nothing_is_plotted_without_pictures_or_steps(tmp_path: Path) -> None:
    for name, events, pictures in (("a", [step_event(1)], False), ("b", [], True)):
        files = write_events(tmp_path / name, events, pictures=pictures).finish({}, {})["files"]
        assert files == {"events": "training.jsonl"}


# Weights: each part, and all of them joined.


def to_content(module: nn.Module) -> TensorContent:
    return TensorContent({name: from_array(tensor.detach()) for name, tensor in module.state_dict().items()})


def parts_of(model: nn.Module) -> dict[str, TensorContent]:
    return {f"part-{index}": to_content(part.module) for index, part in enumerate(partition(model, CUTS))}


def test_joined_parts_are_the_state_of_the_uncut_network(tmp_path: Path) -> None:
    model = SmallNetwork()
    parts = parts_of(model)
    assert write_weights(tmp_path, parts) == {"model": "model.safetensors", "parts": "parts/"}
    other = SmallNetwork()
    other.load_state_dict(load_file(tmp_path / MODEL_FILE), strict=True)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    names = {stage: set(load_file(tmp_path / "parts" / f"{stage}.safetensors")) for stage in parts}
    assert names == {stage: set(part.tensors) for stage, part in parts.items()}


def test_former_weights_are_replaced(tmp_path: Path) -> None:
    write_weights(tmp_path, {"head": TensorContent({"w": from_array(torch.zeros(3))})})
    write_weights(tmp_path, {"head": TensorContent({"w": from_array(torch.ones(3))})})
    assert load_file(tmp_path / MODEL_FILE)["w"].tolist() == [1, 1, 1]


def test_full_disk_leaves_the_former_weights(tmp_path: Path) -> None:
    write_weights(tmp_path, {"head": TensorContent({"w": from_array(torch.zeros(10_000))})})
    before = sorted(tmp_path.rglob("*"))
    with full_disk(20_000), pytest.raises(OSError, match="File too large"):
        write_weights(tmp_path, {"head": TensorContent({"w": from_array(torch.ones(10_000))})})
    assert sorted(tmp_path.rglob("*")) == before
    assert not load_file(tmp_path / MODEL_FILE)["w"].any()
