"""What a training run leaves behind: its events, the picture of them, and what becomes of both when it is resumed."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy
import pytest
from PIL import Image

from brokers.errors import BadFile
from sources.training.history import MIN_CURVE_POINTS, Rollback, TrainingHistory
from sources.training.learning_curves import plot_learning_curves
from sources.training.run_folder import TrainingRunFolder
from tests.support.training.training_events import EventDict, evaluation_event, rollback_event, run_events, step_event


def fill(folder: Path, events: Iterable[EventDict], *, pictures: bool = False) -> TrainingRunFolder:
    record = TrainingRunFolder(folder, "digits", pictures)
    for event in events:
        record.add(event)
    return record


def lines(folder: Path) -> list[EventDict]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def pixels(path: Path) -> numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.uint8]]:
    with Image.open(path) as picture:
        assert picture.size == (1200, 900)
        return numpy.asarray(picture.convert("RGB"))


def test_an_event_is_a_whole_line_as_soon_as_it_is_there(tmp_path: Path) -> None:
    record = fill(tmp_path / "run", [step_event(1)])
    assert lines(tmp_path / "run") == [step_event(1)]
    record.add(evaluation_event(1))
    assert lines(tmp_path / "run") == [step_event(1), evaluation_event(1)]
    record.close()


def test_a_run_ends_with_a_picture_and_a_summary_that_names_what_is_there(tmp_path: Path) -> None:
    record = fill(tmp_path, run_events(rollbacks={17: 10}), pictures=True)
    summary = record.finish({"steps": 40, "files": {"model": "model.safetensors"}})
    assert summary == {
        "steps": 40, "outputs": str(tmp_path),
        "files": {"model": "model.safetensors", "events": "training.jsonl", "curves": "training.png"},
    }  # fmt: skip
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert {path.name for path in tmp_path.iterdir()} == {"training.jsonl", "training.png", "summary.json"}


def test_the_picture_has_curves_points_and_bars_in_their_colours(tmp_path: Path) -> None:
    plot_learning_curves(TrainingHistory.from_events(run_events(rollbacks={17: 10})), tmp_path / "a.png", "digits")
    found = {tuple(color) for color in pixels(tmp_path / "a.png").reshape(-1, 3)}
    training, test, forward, update = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x56, 0xB4, 0xE9), (0x00, 0x9E, 0x73)
    assert {training, test, forward, update} <= found


@pytest.mark.parametrize(
    "events",
    [
        *(
            [],
            [step_event(1)],
            [step_event(1), rollback_event(0, 1)],
            [evaluation_event(5)],
            [step_event(1, accuracy=None)],
        ),
        [step_event(1, time={}), step_event(2, steps=2, epochs=100)],
        [*run_events(rollbacks={number: number - 1 for number in range(2, 39)})],
    ],
)
def test_a_picture_of_little_or_of_trouble_is_a_picture_still(tmp_path: Path, events: list[EventDict]) -> None:
    plot_learning_curves(TrainingHistory.from_events(events), tmp_path / "a.png", "a $title$ of_mine")
    assert pixels(tmp_path / "a.png").std() > 1


def test_a_resumed_run_goes_on_in_the_same_record_and_its_picture_is_of_the_whole(tmp_path: Path) -> None:
    events = list(run_events())
    fill(tmp_path, events[:20], pictures=True).finish({})
    first = pixels(tmp_path / "training.png")
    again = TrainingRunFolder(tmp_path, "digits", pictures=True)
    assert list(again.recorded_events()) == events[:20]
    for event in events[20:]:
        again.add(event)
    again.finish({})
    assert lines(tmp_path) == events
    plot_learning_curves(TrainingHistory.from_events(events), tmp_path / "whole.png", "digits")
    assert (pixels(tmp_path / "training.png") == pixels(tmp_path / "whole.png")).all()
    assert (pixels(tmp_path / "training.png") != first).any()


def test_a_line_that_a_kill_cut_off_spoils_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(tmp_path, [step_event(1), step_event(2)]).close()
    path = tmp_path / "training.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    again = fill(tmp_path, [step_event(2), step_event(3)])
    assert [event["step"] for event in again.recorded_events()] == [1, 2, 3]
    assert "line 2 is not whole" in caplog.text
    again.close()


def test_a_step_that_was_done_again_counts_once_as_it_was_done_the_last_time() -> None:
    history = TrainingHistory.from_events(
        [
            step_event(1),
            step_event(2, loss=7.0),
            evaluation_event(2),
            rollback_event(1, 2),
            step_event(2, loss=3.0),
            step_event(3),
        ]
    )
    assert [(point.step, point.loss) for point in history.train_curve.plot_points][1] == (2, 3.0)
    assert [point.step for point in history.train_curve.plot_points] == [1, 2, 3]
    assert history.test_curve.plot_points == []
    assert list(history.rollbacks) == [Rollback(1, 2, "worker tail-1 is gone")]
    assert history.executed_steps == 4


def test_a_source_that_began_again_further_back_has_gone_back() -> None:
    history = TrainingHistory.from_events([step_event(1), step_event(2), step_event(3), step_event(2), step_event(3)])
    assert [point.step for point in history.train_curve.plot_points] == [1, 2, 3]
    assert list(history.rollbacks) == [Rollback(1, 3, "begun again")]


def test_a_run_that_undoes_what_it_did_draws_the_curves_of_a_calm_one() -> None:
    calm, killed = (
        TrainingHistory.from_events(run_events()),
        TrainingHistory.from_events(run_events(rollbacks={17: 10, 33: 20})),
    )
    assert killed.train_curve.plot_points == calm.train_curve.plot_points
    assert killed.test_curve.plot_points == calm.test_curve.plot_points


def test_a_long_curve_is_thinned_out_evenly_and_keeps_its_end() -> None:
    history = TrainingHistory.from_events(step_event(number, steps=50_000) for number in range(1, 50_001))
    steps = numpy.array([point.step for point in history.train_curve.plot_points])
    assert MIN_CURVE_POINTS <= len(steps) <= 2 * MIN_CURVE_POINTS + 1
    assert (steps[0], steps[-1]) == (1, 50_000)
    assert set(numpy.diff(steps)[:-1]) == {16}


def test_without_matplotlib_there_is_no_picture_and_the_log_says_what_to_install(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    summary = fill(tmp_path, [step_event(1)], pictures=True).finish({})
    assert summary["files"] == {"events": "training.jsonl"}
    assert "install the extra 'train'" in caplog.text


def test_no_picture_is_drawn_when_none_is_wanted_or_there_is_nothing_to_see(tmp_path: Path) -> None:
    assert fill(tmp_path / "a", [step_event(1)], pictures=False).finish({})["files"] == {"events": "training.jsonl"}
    assert fill(tmp_path / "b", [], pictures=True).finish({})["files"] == {"events": "training.jsonl"}


def test_a_full_disk_costs_lines_and_a_warning_and_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    record = fill(tmp_path, [step_event(1)])
    with Path("/dev/full").open("ab", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr(record._lines, "_file", full)
        record.add(step_event(2))
        record.add(step_event(3))
    record.add(step_event(4))
    record.finish({})
    assert [event["step"] for event in record.recorded_events()] == [1, 4]
    assert caplog.text.count("training goes on without") == 1
    assert "2 events are missing" in caplog.text


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFile, match="the results cannot be written"):
        TrainingRunFolder(tmp_path / "file", "digits", pictures=True)
