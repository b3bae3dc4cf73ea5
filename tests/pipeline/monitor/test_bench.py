"""`sparse bench` with real runs: measurements, manifest, failures, interruption."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from brokers.server.local_broker import start_broker
from monitor.analysis.run_metrics import METRIC_INPUTS, compute_run_metrics
from monitor.bench.manifest import Manifest, load_manifest
from monitor.stores.sqlite import SqliteReader
from tests.soak.harness.training_run import BATCH, write_training_pipeline_file
from tests.support.environment.checkout import ROOT
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually, start_with_slow_monitor

BENCH_TIMEOUT_S = 280.0
SHORT = ("--requests", "30", "--warm-up", "5", "--repeats", "1")


def read_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs in results.json."""
    runs: dict[str, dict[str, Any]] = json.loads((folder / "results.json").read_text())["runs"]
    return runs


def read_manifest(folder: Path) -> Manifest:
    manifest = load_manifest(folder)
    assert manifest is not None
    return manifest


def write_pipeline(sandbox: ProcessSandbox, name: str, count: int, executor: str = "double", **source: Any) -> Path:
    """A pipeline of one stage, whose source counts to `count`."""
    stages = [stage_table("a", executor)]
    return write_pipeline_file(sandbox.folder, stages, counting_source_table(count, **source), name=name)


def test_inference_suites_are_measured(sandbox: ProcessSandbox) -> None:
    """The suites of a task differ in their deployment only: tests/unit/monitor/bench/test_suite.py."""
    require_dependency("mosquitto")
    out = sandbox.folder / "bench"
    names = ["detect-hybrid-off-device", "detect-server"]
    bench = sandbox.start_sparse("bench", *names, *SHORT, "--out", out).wait(timeout_s=BENCH_TIMEOUT_S)
    assert bench.returncode == 0, bench.stderr
    runs = read_runs(out)
    assert list(runs) == [f"{name}-1" for name in names]
    for name in names:
        run = runs[f"{name}-1"]
        reader = SqliteReader(out / f"{name}-1" / "telemetry.sqlite")
        points = {measurement: reader.points(measurement) for measurement in METRIC_INPUTS}
        assert len(points["request"]) == 30
        assert run["samples"] == 25
        assert run["throughput_per_s"] == round(compute_run_metrics(points, 5).throughput_per_s, 4)
        assert any(key.startswith("links.") for key in run)
        assert {"cpu_s.stage", "cpu_s.source", "cpu_s.broker", "cpu_s.run"} <= set(run)
        assert "cpu_s.monitor" not in run
        # Stages and network add up to the latency.
        stages_ms = sum(value for key, value in run.items() if key.startswith("stages."))
        assert stages_ms + run["network_ms"] == pytest.approx(run["latency_ms.mean"], rel=0.01)
        assert f"{name}-1: " in bench.stderr
        assert name in bench.stdout
    # About the activation after the second cut, as `sparse cuts` has it: requests at the ends of the measured window
    # count in part. A server receives JPEG images.
    cut_bytes = runs["detect-hybrid-off-device-1"]["links.cloudlet - cloud.bytes_out"]
    assert cut_bytes == pytest.approx(1_384_448, rel=0.2)
    assert runs["detect-server-1"]["links.device - cloud.bytes_out"] < cut_bytes / 10
    manifest = read_manifest(out)
    assert (manifest.warm_up, manifest.requests, manifest.repeats, manifest.mode) == (5, 30, 1, "run")
    assert manifest.ended_at is not None
    assert [suite.runs for suite in manifest.suites] == [(f"{name}-1",) for name in names]
    with (out / "results.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == list(runs)
    sandbox.assert_nothing_left()


def test_training_is_measured_with_equal_losses(sandbox: ProcessSandbox) -> None:
    require_dependency("mosquitto")
    out = sandbox.folder / "bench"
    paths = []
    for name, sites in (("three-sites", ("device", "cloudlet", "cloud")), ("one-site", ("local",) * 3)):
        path = write_training_pipeline_file(sandbox.folder, epochs=2, sites=sites)
        paths.append(path.rename(sandbox.folder / f"{name}.toml"))
    options = ("--requests", "6", "--warm-up", "2", "--repeats", "1", "--json", "--out", out)
    bench = sandbox.run_sparse("bench", *paths, *options)
    assert bench.returncode == 0, bench.stderr
    assert bench.json_output["suites"].keys() == {"three-sites", "one-site"}
    losses = []
    for name in ("three-sites-1", "one-site-1"):
        run = bench.json_output["runs"][name]
        steps = SqliteReader(out / name / "telemetry.sqlite").points("step")
        assert (len(steps), run["kind"], run["samples"]) == (6, "training", 4 * BATCH)
        step_s = sum(float(step.fields["step_ms"] or 0) for step in steps[2:]) / 1000
        assert run["throughput_per_s"] == pytest.approx(4 * BATCH / step_s, rel=1e-3)
        losses.append([step.fields["loss"] for step in steps])
    assert losses[0] == losses[1]
    sandbox.assert_nothing_left()


def test_suites_take_turns_and_a_failed_run_stops_no_other(sandbox: ProcessSandbox) -> None:
    good = write_pipeline(sandbox, "good", 40)
    bad = write_pipeline(sandbox, "bad", 40, executor="Gone")
    short = write_pipeline(sandbox, "short", 10)
    out = sandbox.folder / "bench"
    options = ("--repeats", "2", "--warm-up", "10", "--out", out)
    bench = sandbox.start_sparse("bench", good, bad, short, *options).wait(timeout_s=BENCH_TIMEOUT_S)
    assert bench.returncode == 1, bench.stderr
    runs = read_runs(out)
    assert list(runs) == ["good-1", "bad-1", "short-1", "good-2", "bad-2", "short-2"]
    assert [runs[name]["samples"] for name in ("good-1", "good-2")] == [30, 30]
    assert "tests.support.pipelines.example_code:Gone" in runs["bad-1"]["error"]
    assert runs["short-1"]["error"].startswith("the run has no samples")  # its warm-up covers it
    assert f"bad-1: failed: {runs['bad-1']['error']}" in bench.stderr
    assert "Traceback" not in bench.stderr
    suites = read_manifest(out).suites
    assert [suite.runs for suite in suites] == [(f"{name}-1", f"{name}-2") for name in ("good", "bad", "short")]
    assert suites[0].overrides == {}


def test_ctrl_c_keeps_the_finished_runs(sandbox: ProcessSandbox) -> None:
    fast = write_pipeline(sandbox, "fast", 30)
    slow = write_pipeline(sandbox, "slow", 100_000, every_s=0.01)
    out = sandbox.folder / "bench"
    bench = sandbox.start_sparse("bench", fast, slow, "--repeats", "2", "--warm-up", "5", "--out", out)
    eventually("requests of the second run", (out / "slow-1" / "results.jsonl").is_file)
    stopped = bench.wait(signal.SIGINT)
    assert stopped.returncode == 130, stopped.stderr
    assert list(read_runs(out)) == ["fast-1"]
    assert "slow-1: interrupted, not counted" in stopped.stderr
    manifest = read_manifest(out)
    assert [suite.runs for suite in manifest.suites] == [("fast-1",), ()]
    assert manifest.ended_at is not None
    sandbox.assert_nothing_left()


def test_killed_benchmark_leaves_no_processes(sandbox: ProcessSandbox) -> None:
    slow = write_pipeline(sandbox, "slow", 100_000, every_s=0.01)
    out = sandbox.folder / "bench"
    bench = sandbox.start_sparse("bench", slow, "--out", out)
    eventually("requests of the run", (out / "slow-1" / "results.jsonl").is_file)
    bench.wait(signal.SIGKILL)
    eventually("the end of all processes", lambda: not sandbox.live_processes())


def test_source_only_uses_stages_that_are_up(sandbox: ProcessSandbox) -> None:
    require_dependency("mosquitto")
    path = write_pipeline_file(
        sandbox.folder, [stage_table("a", "double", site="here")], counting_source_table(40, site="here"), name="far"
    )
    out = sandbox.folder / "bench"
    options = ("--source-only", "--repeats", "1", "--warm-up", "10", "--out", out)
    with start_broker(kind="mosquitto") as broker:
        path.write_text(path.read_text() + f'[[site]]\nname = "here"\nbroker = "{broker.address}"\n')
        stage = sandbox.start_sparse("stage", path, "a")
        eventually("the stage", lambda: "serves" in stage.read_stderr())
        bench = start_with_slow_monitor(sandbox, "bench", path, *options).wait()
    assert bench.returncode == 0, bench.stderr
    run = read_runs(out)["far-1"]
    assert run["samples"] == 30
    assert "stages.a.compute_ms" in run
    lifecycle_points = SqliteReader(out / "far-1" / "telemetry.sqlite").points("lifecycle")
    assert "source" in {point.tags["role"] for point in lifecycle_points}
    assert read_manifest(out).mode == "source"


def test_sweep_of_cuts_includes_the_uncut_network(sandbox: ProcessSandbox) -> None:
    require_dependency("mosquitto")
    out = sandbox.folder / "sweep"
    options = ("--requests", "8", "--warm-up", "3", "--repeats", "1", "--out", out)
    split = ROOT / "examples" / "split.toml"
    sweep = sandbox.start_sparse("bench", "sweep", split, "--cuts", "8", *options).wait(timeout_s=BENCH_TIMEOUT_S)
    assert sweep.returncode == 0, sweep.stderr
    runs = read_runs(out)
    assert list(runs) == ["cut-8-1", "uncut-at-device-1", "uncut-at-cloud-1"]
    assert not any(key.startswith("links.") for key in runs["uncut-at-device-1"])
    assert "stages.whole.compute_ms" in runs["uncut-at-cloud-1"]
    assert read_manifest(out).suites[0].sweep_point == {"sweep": "cut", "cut": 8, "cut_bytes": 346_112}
    assert "best: " in sweep.stdout
    with (out / "results.csv").open() as file:
        assert [row["cut"] for row in csv.DictReader(file)] == ["8", "", ""]
