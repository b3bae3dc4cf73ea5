"""The packaged suites are comparable, and suites are found by name, task and file."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from brokers.config.pipeline_file import Pipeline
from brokers.errors import BadFile, UsageError
from monitor.bench.suite import DEPLOYMENTS, SUITES_FOLDER, TASKS, find_suites, packaged_suites
from tests.support.environment.checkout import ROOT

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
