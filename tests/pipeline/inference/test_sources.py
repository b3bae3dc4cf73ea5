"""Source processes that are faster or slower than their pipeline, or that fail."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from brokers.server.local_broker import LocalBroker
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import CommandResult, ProcessSandbox, process_sandbox

pytestmark = pytest.mark.usefixtures("workers")
STAGES = [
    stage_table("slow", "SleepExecutor", settings={"seconds": 0.05}),
    stage_table("reject", "reject_negative"),
]


@pytest.fixture(scope="module", name="workers")
def _start_workers(tmp_path_factory: pytest.TempPathFactory, embedded_broker: LocalBroker) -> Iterator[None]:
    """A worker for each stage, for all tests of this file."""
    with process_sandbox(tmp_path_factory.mktemp("workers")) as sandbox:
        path = write_pipeline_file(sandbox.folder, STAGES)
        for stage in STAGES:
            sandbox.start_sparse("stage", path, stage["name"], "--broker", embedded_broker.address)
        yield


def run_source(
    sandbox: ProcessSandbox, broker: LocalBroker, source: Mapping[str, Any]
) -> tuple[CommandResult, list[dict[str, Any]]]:
    """Run `sparse source` to its end; returns its results, too."""
    path = write_pipeline_file(sandbox.folder, STAGES, source)
    out = sandbox.folder / "out"
    result = sandbox.run_sparse("source", path, "--broker", broker.address, "--json", "--out", out)
    sandbox.assert_nothing_left()
    return result, [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("options", [{"live": True, "every_s": 0.01}, {"keep": "latest"}], ids=["live", "keep-latest"])
def test_fast_source_drops_its_older_samples(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker, options: dict[str, Any]
) -> None:
    source = counting_source_table(60, window=2, **options)
    result, results = run_source(sandbox, embedded_broker, source)
    assert result.returncode == 0, result.stderr
    summary = result.json_output
    assert summary["dropped"] > 0
    assert summary["requests"] + summary["dropped"] == 60
    assert summary["results"] == len(results) == summary["requests"]
    indices = [each["index"] for each in results]
    assert indices == sorted(set(indices))
    assert indices[-1] == 59  # the newest is never dropped
    dropped = [each["dropped"] for each in results]
    assert dropped == sorted(dropped)


def test_source_that_can_wait_loses_nothing(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    result, results = run_source(sandbox, embedded_broker, counting_source_table(20, window=2))
    assert result.returncode == 0, result.stderr
    assert [each["index"] for each in results] == list(range(20))
    assert [each["values"] for each in results] == [{"values": float(index)} for index in range(20)]
    assert result.json_output["dropped"] == 0


def test_failed_requests_are_results_and_status_1(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    result, results = run_source(sandbox, embedded_broker, counting_source_table(3, sign=-1))
    summary = result.json_output
    assert result.returncode == 1
    assert (summary["requests"], summary["results"], summary["failed"], summary["lost"]) == (3, 1, 2, 0)
    assert summary["failures"] == {"ArithmeticError": 2}
    failures = [(each.get("error"), each.get("stage")) for each in results]
    assert failures == [(None, None), ("ArithmeticError", "reject"), ("ArithmeticError", "reject")]


def test_deadline_of_the_file_applies_to_each_request(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    source = counting_source_table(8, window=8, deadline_ms=120)
    result, results = run_source(sandbox, embedded_broker, source)
    summary = result.json_output
    assert summary["failures"] == {"DeadlinePassed": summary["failed"]}
    assert summary["results"] + summary["failed"] == 8
    assert summary["failed"] >= 3  # of eight that start together and take 50 ms each, at most two end in 120 ms
    assert summary["lost"] == 0
    assert {each.get("error") for each in results} <= {None, "DeadlinePassed"}


def test_failing_source_ends_with_its_error_and_its_results(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    source = {"kind": "tests.support.pipelines.example_code:FailingSource", "name": "failing", "settings": {"count": 2}}
    path = write_pipeline_file(sandbox.folder, STAGES, source)
    out = sandbox.folder / "out"
    result = sandbox.run_sparse("run", path, "--broker", embedded_broker.address, "--out", out)
    assert result.returncode == 1
    line = f"sparse: source ended with status 1: ValueError: no sample 2 (its log: {out}/logs/source.log)"
    assert result.stderr.splitlines()[-1] == line
    sandbox.assert_nothing_left()
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [each["values"] for each in results] == [{"values": 0.0}, {"values": 1.0}]
    assert json.loads((out / "summary.json").read_text())["results"] == 2
