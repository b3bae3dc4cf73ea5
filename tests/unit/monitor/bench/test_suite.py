"""The suites that come with Sparse can be held against one another, and are found by name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from brokers.config.pipeline_file import Pipeline
from brokers.errors import BadFile
from monitor.bench.errors import UnknownSuite
from monitor.bench.suite import DEPLOYMENTS, SUITES_FOLDER, TASKS, find_suites, packaged_suites
from tests.support.environment.checkout import ROOT

FILES = sorted(SUITES_FOLDER.glob("*.toml"))
# From the device on, each way: what the paper's Table I has of delay, and the rates that docs/benchmarks.md explains.
NEAR = {"to": "cloudlet", "delay_ms": 1.0, "rate_mbit": 200.0}
FAR = {"to": "cloud", "delay_ms": 8.0, "rate_mbit": 50.0}
DIRECT = {"to": "cloud", "delay_ms": 9.0, "rate_mbit": 50.0}
LINKS = {
    "cloud": [DIRECT],
    "cloudlet": [NEAR],
    "hybrid-off-device": [NEAR, FAR],
    "hybrid-on-device": [NEAR, FAR],
    "server": [DIRECT],
    "device": [],
}
STAGES = {
    "cloud": ["cloud", "cloud", "cloud"],
    "cloudlet": ["cloudlet", "cloudlet", "cloudlet"],
    "hybrid-off-device": ["cloudlet", "cloudlet", "cloud"],
    "hybrid-on-device": ["device", "cloudlet", "cloud"],
    "server": ["cloud"],
    "device": ["device"],
}


def network(pipeline: Pipeline) -> dict[str, Any]:
    """What has to be the same of all suites of a task."""
    table = pipeline.pipeline.model_dump(exclude={"name", "cuts"})
    threads = {stage.threads for stage in pipeline.stage}
    return {
        "pipeline": table,
        "source": pipeline.source.model_dump(),
        "training": pipeline.training.model_dump(),
        "threads": threads,
        "wire": {stage.wire for stage in pipeline.stage},
        "batch": {stage.max_batch for stage in pipeline.stage},
    }


@pytest.mark.parametrize("task", TASKS)
def test_the_suites_of_a_task_differ_in_where_the_parts_are_and_in_nothing_else(task: str) -> None:
    suites = find_suites([task])
    assert [suite.name for suite in suites] == [f"{task}-{place}" for place in DEPLOYMENTS]
    assert all(network(suite.pipeline) == network(suites[0].pipeline) for suite in suites)
    for suite, place in zip(suites, DEPLOYMENTS, strict=True):
        pipeline = suite.pipeline
        assert pipeline.name == place
        assert pipeline.source.site == "device"
        assert [stage.site for stage in pipeline.stage] == STAGES[place]
        links = [
            link.model_dump(include={"to", "delay_ms", "rate_mbit"}) for site in pipeline.site for link in site.links
        ]
        assert links == LINKS[place]


def test_all_files_are_suites_and_each_says_how_it_is_run() -> None:
    assert {path.stem for path in FILES} == {name for names in packaged_suites().values() for name in names}
    for path in FILES:
        commands = re.findall(r"^#     (.+)$", path.read_text(), flags=re.MULTILINE)
        assert commands == [f"sparse run {path.relative_to(ROOT)}"]


def test_each_suite_says_in_a_sentence_what_it_is() -> None:
    (server, device) = find_suites(["detect-server", "train-device"])
    assert server.description.startswith(
        "A baseline that the paper lacks: the device sends its JPEG to one server in the "
    )
    assert server.description.endswith("cloud, which has the uncut network.")
    assert device.description == "A baseline that the paper lacks: the device trains the uncut network by itself."


def test_a_suite_is_asked_for_once_however_often_it_is_named() -> None:
    found = find_suites(["detect-cloud", "detect", str(SUITES_FOLDER / "detect-device.toml")])
    assert [suite.name for suite in found] == ["detect-cloud", *(f"detect-{place}" for place in DEPLOYMENTS[1:])]


def test_two_files_of_one_name_have_runs_of_two_names(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(SUITES_FOLDER / "train-device.toml", tmp_path / folder / "my suite.toml")
    found = find_suites([str(tmp_path / folder / "my suite.toml") for folder in ("a", "b")])
    assert [suite.name for suite in found] == ["my-suite", "my-suite-2"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("detect-clod", "there is no suite 'detect-clod' (did you mean 'detect-cloud'?)"),
        ("zzz", "there is no suite 'zzz': expected a pipeline file, or one of detect, train, detect-cloud, "),
    ],
)
def test_an_unknown_suite_is_told_with_what_is_near(name: str, said: str) -> None:
    with pytest.raises(UnknownSuite) as caught:
        find_suites([name])
    assert str(caught.value).startswith(said)


def test_a_file_that_is_not_there_is_told_as_one() -> None:
    with pytest.raises(BadFile, match=r"gone\.toml: no such file"):
        find_suites(["gone.toml"])
