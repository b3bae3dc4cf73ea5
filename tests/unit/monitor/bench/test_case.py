"""What is changed of a pipeline file for a benchmark: that its runs end, are alike, and measure what was asked for."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from brokers.config.pipeline_file import load_pipeline
from monitor.bench.case import BenchCase, case_from_suite
from monitor.bench.errors import NoEnd, NothingLeft
from monitor.bench.overrides import apply_overrides
from monitor.bench.suite import Suite, find_suites
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file


def suite(path: Path) -> Suite:
    return Suite(path.stem, path, load_pipeline(path))


def as_run(case: BenchCase, folder: Path) -> Path:
    """The file that a run of the case has."""
    path = folder / "changed.toml"
    path.write_text(apply_overrides(case.path.read_text(), case.pipeline.folder, case.overrides))
    return path


def test_a_number_of_requests_is_asked_of_the_source(tmp_path: Path) -> None:
    (detect,) = find_suites(["detect-cloud"])
    changed = load_pipeline(as_run(case_from_suite(detect, 30, 5), tmp_path))
    assert (changed.source.limit, changed.source.loop) == (30, True)
    assert changed.stage == detect.pipeline.stage
    assert case_from_suite(detect, None, 5).overrides == {}


@pytest.mark.parametrize(("asked", "steps"), [(30, 30), (31, 36), (6, 6), (4, 4), (1, 1)])
def test_a_number_of_steps_comes_in_whole_epochs(tmp_path: Path, asked: int, steps: int) -> None:
    (train,) = find_suites(["train-cloud"])
    changed = load_pipeline(as_run(case_from_suite(train, asked, 0), tmp_path))
    table = changed.training
    assert table.evaluate_every == 0
    assert changed.source.limit is not None
    assert table.epochs * changed.source.limit // table.batch == steps


def test_checkpoints_of_one_run_are_not_gone_on_with_by_the_next(tmp_path: Path) -> None:
    path = write_pipeline_file(tmp_path, [stage_table("head")], model="vgg11-small", kind="training")
    path.write_text(path.read_text() + '[training]\ncheckpoints = "kept"\n')
    changed = load_pipeline(as_run(case_from_suite(suite(path), None, 0), tmp_path))
    assert changed.training.checkpoints is None


def test_files_that_are_named_are_found_from_another_folder(tmp_path: Path) -> None:
    (tmp_path / "street.mp4").touch()
    (tmp_path / "cloud.pw").touch()
    (tmp_path / "mine.toml").write_text(
        '[pipeline]\nname = "mine"\nmodel = "yolov3-tiny"\nweights = "yolov3-tiny"\n[[stage]]\nname = "whole"\n'
        '[[site]]\nname = "local"\nlinks = [{ to = "far", user = "fog", password_file = "cloud.pw" }]\n'
        '[[site]]\nname = "far"\n[source]\nkind = "video"\npath = "street.mp4"\n'
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    changed = load_pipeline(as_run(case_from_suite(suite(tmp_path / "mine.toml"), None, 0), elsewhere))
    assert changed.source.path == str(tmp_path / "street.mp4")
    assert changed.pipeline.weights == "yolov3-tiny"
    assert changed.site[0].links[0].password_file == str(tmp_path / "cloud.pw")


def test_a_change_leaves_the_rest_of_the_file_alone() -> None:
    text = '[a]\nb = 1\nc = [1.5, true, "x"]\n[[d]]\ne = { f = 2 }\n'
    changed = tomllib.loads(apply_overrides(text, Path("nowhere"), {"a.b": None, "a.g.h": 3, "i.j": "k"}))
    assert changed == {"a": {"c": [1.5, True, "x"], "g": {"h": 3}}, "d": [{"e": {"f": 2}}], "i": {"j": "k"}}


def test_a_warm_up_that_takes_all_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (detect, train) = find_suites(["detect-cloud", "train-cloud"])
    with pytest.raises(NothingLeft, match="detect-cloud: a warm-up of 30 leaves nothing of 30 requests"):
        case_from_suite(detect, 30, 30)
    with pytest.raises(NothingLeft, match="train-cloud: a warm-up of 8 leaves nothing of 7 steps"):
        case_from_suite(train, 7, 8)
    path = write_pipeline_file(tmp_path, [stage_table("a", "Double")], {"kind": "video", "path": "street", "limit": 10})
    with pytest.raises(NothingLeft, match="of 10 requests"):
        case_from_suite(suite(path), None, 20)


@pytest.mark.parametrize(
    ("source", "requests", "said"),
    [
        ({"kind": "ingress"}, 10, "nothing feeds here"),
        ({"kind": "camera"}, None, "never ends"),
        ({"kind": "video", "path": "street", "loop": True}, None, "never ends"),
        (counting_source_table(5), 10, "decides itself how many samples it gives"),
    ],
)
def test_a_suite_without_an_end_is_refused(
    tmp_path: Path, source: dict[str, object], requests: int | None, said: str
) -> None:
    path = write_pipeline_file(tmp_path, [stage_table("a", "Double")], source)
    with pytest.raises(NoEnd, match=said):
        case_from_suite(suite(path), requests, 0)
