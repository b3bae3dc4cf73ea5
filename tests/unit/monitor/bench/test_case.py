"""The overrides of a case: its runs end, are alike, and measure the requested number of samples."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.errors import UsageError
from monitor.bench.case import BenchCase, case_from_suite
from monitor.bench.suite import Suite, find_suites
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file


def suite_of(path: Path) -> Suite:
    return Suite(path.stem, path, load_pipeline(path))


def load_case(case: BenchCase, folder: Path) -> Pipeline:
    """The pipeline of the case's runs, from a file in another folder."""
    path = folder / "run.toml"
    path.write_text(case.to_toml())
    return load_pipeline(path)


def test_requests_limit_and_loop_the_source(tmp_path: Path) -> None:
    (suite,) = find_suites(["detect-cloud"])
    pipeline = load_case(case_from_suite(suite, 30, 5), tmp_path)
    assert (pipeline.source.limit, pipeline.source.loop) == (30, True)
    assert pipeline.stage == suite.pipeline.stage
    assert case_from_suite(suite, None, 5).overrides == {}


@pytest.mark.parametrize(("requested", "steps"), [(30, 30), (31, 36), (6, 6), (4, 4), (1, 1)])
def test_steps_come_in_whole_epochs(tmp_path: Path, requested: int, steps: int) -> None:
    (suite,) = find_suites(["train-cloud"])
    pipeline = load_case(case_from_suite(suite, requested, 0), tmp_path)
    training = pipeline.training
    assert training.evaluate_every == 0
    assert pipeline.source.limit is not None
    assert training.epochs * pipeline.source.limit // training.batch == steps


def test_runs_do_not_share_checkpoints(tmp_path: Path) -> None:
    path = write_pipeline_file(tmp_path, [stage_table("head")], model="vgg11-small", kind="training")
    path.write_text(path.read_text() + '[training]\ncheckpoints = "kept"\n')
    assert load_case(case_from_suite(suite_of(path), None, 0), tmp_path).training.checkpoints is None


def test_paths_become_absolute_and_names_stay(tmp_path: Path) -> None:
    (tmp_path / "street.mp4").touch()
    (tmp_path / "cloud.pw").touch()
    path = tmp_path / "mine.toml"
    path.write_text(
        '[pipeline]\nname = "mine"\nmodel = "yolov3-tiny"\nweights = "yolov3-tiny"\n[[stage]]\nname = "whole"\n'
        '[[site]]\nname = "local"\nlinks = [{ to = "far", user = "fog", password_file = "cloud.pw" }]\n'
        '[[site]]\nname = "far"\n[source]\nkind = "video"\npath = "street.mp4"\n'
    )
    (tmp_path / "elsewhere").mkdir()
    pipeline = load_case(case_from_suite(suite_of(path), None, 0), tmp_path / "elsewhere")
    assert pipeline.source.path == str(tmp_path / "street.mp4")
    assert pipeline.site[0].links[0].password_file == str(tmp_path / "cloud.pw")
    assert pipeline.pipeline.weights == "yolov3-tiny"


def test_overrides_leave_the_rest_of_the_file_alone(tmp_path: Path) -> None:
    path = write_pipeline_file(tmp_path, [stage_table("a", "Double", settings={"f": 2})], counting_source_table(3))
    original = tomllib.loads(path.read_text())
    overrides = {"pipeline.name": None, "pipeline.new.key": 3, "extra.key": "k"}
    changed = tomllib.loads(BenchCase("a", path, load_pipeline(path), overrides).to_toml())
    assert changed["pipeline"] == {"new": {"key": 3}}
    assert changed["extra"] == {"key": "k"}
    assert (changed["stage"], changed["source"]) == (original["stage"], original["source"])


def test_warm_up_must_leave_requests_to_measure(tmp_path: Path) -> None:
    path = write_pipeline_file(tmp_path, [stage_table("a", "Double")], {"kind": "video", "path": "street", "limit": 10})
    (detect, train) = find_suites(["detect-cloud", "train-cloud"])
    for suite, requests, warm_up, count in ((detect, 30, 30, 30), (train, 7, 8, 7), (suite_of(path), None, 20, 10)):
        with pytest.raises(UsageError) as caught:
            case_from_suite(suite, requests, warm_up)
        assert caught.value.code == "WarmUpTooLong"
        assert caught.value.fields == {"count": count, "warm_up": warm_up}


@pytest.mark.parametrize(
    ("source", "requests", "code"),
    [
        ({"kind": "ingress"}, 10, "EndlessSuite"),
        ({"kind": "camera"}, None, "EndlessSuite"),
        ({"kind": "video", "path": "street", "loop": True}, None, "EndlessSuite"),
        (counting_source_table(5), 10, "FixedLength"),
    ],
)
def test_suite_needs_a_length(tmp_path: Path, source: dict[str, object], requests: int | None, code: str) -> None:
    path = write_pipeline_file(tmp_path, [stage_table("a", "Double")], source)
    with pytest.raises(UsageError) as caught:
        case_from_suite(suite_of(path), requests, 0)
    assert caught.value.code == code
