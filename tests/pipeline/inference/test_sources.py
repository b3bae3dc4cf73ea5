"""What a source owes its pipeline when one is faster than the other, or when it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import CommandResult, ProcessSandbox

SLOW = stage_table("slow", "SleepExecutor", settings={"seconds": 0.05})


@pytest.fixture(autouse=True)
def _embedded_broker_is_there() -> None:
    require_dependency("iotcore")


def run(sandbox: ProcessSandbox, path: Path) -> tuple[CommandResult, list[dict[str, Any]]]:
    """What a run said, and its results."""
    out = sandbox.folder / "out"
    said = sandbox.start_sparse("run", path, "--broker", "embedded", "--json", "--out", out).wait()
    sandbox.assert_nothing_left()
    return said, [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_a_live_source_that_is_too_fast_has_its_older_samples_dropped_and_counted(sandbox: ProcessSandbox) -> None:
    source = counting_source_table(100, every_s=0.01, live=True, window=2)
    said, results = run(sandbox, write_pipeline_file(sandbox.folder, [SLOW], source))
    summary = said.json_output
    assert said.returncode == 0, said.stderr
    assert summary["dropped"] >= 20
    assert summary["requests"] + summary["dropped"] == 100
    assert summary["results"] == len(results) == summary["requests"]
    indices = [result["index"] for result in results]
    assert indices == sorted(set(indices))
    assert indices[-1] == 99  # the newest always counts
    dropped = [result["dropped"] for result in results]
    assert dropped == sorted(dropped)
    assert max(result["age_ms"] for result in results) < 10_000


def test_a_source_that_can_wait_loses_nothing(sandbox: ProcessSandbox) -> None:
    said, results = run(sandbox, write_pipeline_file(sandbox.folder, [SLOW], counting_source_table(40, window=2)))
    assert said.returncode == 0, said.stderr
    assert [result["index"] for result in results] == list(range(40))
    assert [result["values"] for result in results] == [{"values": float(index)} for index in range(40)]
    assert said.json_output["dropped"] == 0


def test_keep_latest_makes_a_file_a_camera(sandbox: ProcessSandbox) -> None:
    said, results = run(
        sandbox, write_pipeline_file(sandbox.folder, [SLOW], counting_source_table(100, window=2, keep="latest"))
    )
    assert said.json_output["requests"] + said.json_output["dropped"] == 100
    assert said.json_output["dropped"] > 0
    assert results[-1]["index"] == 99


def test_requests_that_fail_are_results_too_and_the_run_says_so(sandbox: ProcessSandbox) -> None:
    stages = [stage_table("add", "add_one"), stage_table("return_non_dict", "return_non_dict")]
    said, results = run(sandbox, write_pipeline_file(sandbox.folder, stages, counting_source_table(3)))
    summary = said.json_output
    assert said.returncode == 1
    assert (summary["requests"], summary["results"], summary["failed"], summary["lost"]) == (3, 0, 3, 0)
    assert summary["failures"] == {"TypeError": 3}
    assert [(result["error"], result["stage"]) for result in results] == [("TypeError", "return_non_dict")] * 3


def test_a_deadline_of_the_file_holds_for_each_request(sandbox: ProcessSandbox) -> None:
    source = counting_source_table(8, window=8, deadline_ms=120)
    said, results = run(sandbox, write_pipeline_file(sandbox.folder, [SLOW], source))
    summary = said.json_output
    assert summary["failures"] == {"DeadlinePassed": summary["failed"]}
    assert summary["results"] + summary["failed"] == 8
    assert summary["failed"] >= 3  # of eight that come at once, 50 ms each, two or three are done in 120
    assert summary["lost"] == 0
    assert {result.get("error", "") for result in results} == {"", "DeadlinePassed"}


def test_a_source_that_fails_ends_the_run_with_its_reason(sandbox: ProcessSandbox) -> None:
    out = sandbox.folder / "out"
    path = write_pipeline_file(
        sandbox.folder,
        [stage_table("double", "double")],
        {"kind": "tests.support.pipelines.example_code:FailingSource", "name": "b"},
    )
    said = sandbox.start_sparse("run", path, "--broker", "embedded", "--out", out).wait()
    assert said.returncode == 1
    where = f"(its log: {out}/logs/source.log)"
    assert said.stderr.splitlines()[-1] == f"sparse: source ended with status 1: ValueError: no third one {where}"
    sandbox.assert_nothing_left()
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [result["values"] for result in results] == [{"values": 0.0}, {"values": 2.0}]
    assert json.loads((out / "summary.json").read_text())["results"] == 2
