"""Suites are comparable and found by name, task and file; the runs of a case are alike and have the set length."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.errors import BadFile, UsageError
from monitor.bench.suite import (
    DEPLOYMENTS,
    SUITES_FOLDER,
    TASKS,
    BenchCase,
    find_suites,
    packaged_suites,
)
from tests.support.environment.checkout import ROOT
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file

FILES = sorted(SUITES_FOLDER.glob("*.toml"))
# The delays of the paper's Table I, one way, and the rates that docs/benchmarks.md explains.
DEVICE_CLOUDLET = {"to": "cloudlet", "delay_ms": 1.0, "rate_mbit": 200.0}
CLOUDLET_CLOUD = {"to": "cloud", "delay_ms": 8.0, "rate_mbit": 50.0}
DEVICE_CLOUD = {"to": "cloud", "delay_ms": 9.0, "rate_mbit": 50.0}
LINKS = {
    "cloud": [DEVICE_CLOUD],
    "cloudlet": [DEVICE_CLOUDLET],
    "hybrid-off-device": [DEVICE_CLOUDLET, CLOUDLET_CLOUD],
    "hybrid-on-device": [DEVICE_CLOUDLET, CLOUDLET_CLOUD],
    "server": [DEVICE_CLOUD],
    "device": [],
}
STAGE_SITES = {
    "cloud": ["cloud", "cloud", "cloud"],
    "cloudlet": ["cloudlet", "cloudlet", "cloudlet"],
    "hybrid-off-device": ["cloudlet", "cloudlet", "cloud"],
    "hybrid-on-device": ["device", "cloudlet", "cloud"],
    "server": ["cloud"],
    "device": ["device"],
}


def common_settings(pipeline: Pipeline) -> dict[str, Any]:
    """The settings that all suites of a task must share."""
    return {
        "pipeline": pipeline.pipeline.model_dump(exclude={"name", "cuts"}),
        "source": pipeline.source.model_dump(),
        "training": pipeline.training.model_dump(),
        "threads": {stage.threads for stage in pipeline.stage},
        "wire": {stage.wire for stage in pipeline.stage},
        "batch": {stage.max_batch for stage in pipeline.stage},
    }


@pytest.mark.parametrize("task", TASKS)
def test_suites_of_a_task_differ_only_in_deployment(task: str) -> None:
    suites = find_suites([task])
    assert [suite.name for suite in suites] == [f"{task}-{deployment}" for deployment in DEPLOYMENTS]
    for suite, deployment in zip(suites, DEPLOYMENTS, strict=True):
        pipeline = suite.pipeline
        assert common_settings(pipeline) == common_settings(suites[0].pipeline)
        assert (pipeline.name, pipeline.source.site) == (deployment, "device")
        assert [stage.site for stage in pipeline.stage] == STAGE_SITES[deployment]
        links = [link for site in pipeline.site for link in site.links]
        assert [link.model_dump(include={"to", "delay_ms", "rate_mbit"}) for link in links] == LINKS[deployment]


def test_each_file_is_a_suite_and_names_its_command() -> None:
    assert {path.stem for path in FILES} == {name for names in packaged_suites().values() for name in names}
    for path in FILES:
        commands = re.findall(r"^#     (.+)$", path.read_text(), flags=re.MULTILINE)
        assert commands == [f"sparse run {path.relative_to(ROOT)}"]


def test_description_is_the_first_sentence_of_the_file() -> None:
    (suite,) = find_suites(["train-hybrid-on-device"])
    assert suite.description == (
        "Hybrid on-device: the first stage is on the device itself, the second in the cloudlet, the third in the cloud."
    )


def test_suite_that_is_named_twice_is_found_once() -> None:
    suites = find_suites(["detect-cloud", "detect", str(SUITES_FOLDER / "detect-device.toml")])
    assert [suite.name for suite in suites] == ["detect-cloud", *(f"detect-{name}" for name in DEPLOYMENTS[1:])]


def test_files_of_one_name_are_numbered(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(SUITES_FOLDER / "train-device.toml", tmp_path / folder / "my suite.toml")
    suites = find_suites([str(tmp_path / folder / "my suite.toml") for folder in ("a", "b")])
    assert [suite.name for suite in suites] == ["my-suite", "my-suite-2"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("detect-clod", "(did you mean 'detect-cloud'?)"),
        ("zzz", "expected a pipeline file or one of detect, train, detect-cloud, "),
    ],
)
def test_unknown_suite_raises_usage_error_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_suites([name])
    assert (caught.value.code, caught.value.fields) == ("UnknownSuite", {"name": name})
    assert hint in str(caught.value)


def test_missing_file_is_reported_as_a_file() -> None:
    with pytest.raises(BadFile):
        find_suites(["gone.toml"])


def suite_of(path: Path) -> BenchCase:
    return BenchCase(path.stem, path, load_pipeline(path))


def load_case(case: BenchCase, folder: Path) -> Pipeline:
    """The pipeline of the case's runs, from a file in another folder."""
    path = folder / "run.toml"
    path.write_text(case.to_toml())
    return load_pipeline(path)


def test_requests_limit_and_loop_the_source(tmp_path: Path) -> None:
    (suite,) = find_suites(["detect-cloud"])
    pipeline = load_case(suite.with_run_length(30, 5), tmp_path)
    assert (pipeline.source.limit, pipeline.source.loop) == (30, True)
    assert pipeline.stage == suite.pipeline.stage
    assert suite.with_run_length(None, 5).overrides == {}


@pytest.mark.parametrize(("requested", "steps"), [(30, 30), (31, 36), (6, 6), (4, 4), (1, 1)])
def test_steps_come_in_whole_epochs(tmp_path: Path, requested: int, steps: int) -> None:
    (suite,) = find_suites(["train-cloud"])
    pipeline = load_case(suite.with_run_length(requested, 0), tmp_path)
    training = pipeline.training
    assert training.evaluate_every == 0
    assert pipeline.source.limit is not None
    assert training.epochs * pipeline.source.limit // training.batch == steps


def test_runs_do_not_share_checkpoints(tmp_path: Path) -> None:
    path = write_pipeline_file(tmp_path, [stage_table("head")], model="vgg11-small", kind="training")
    path.write_text(path.read_text() + '[training]\ncheckpoints = "kept"\n')
    assert load_case(suite_of(path).with_run_length(None, 0), tmp_path).training.checkpoints is None


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
    pipeline = load_case(suite_of(path).with_run_length(None, 0), tmp_path / "elsewhere")
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
            suite.with_run_length(requests, warm_up)
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
        suite_of(path).with_run_length(requests, 0)
    assert caught.value.code == code
