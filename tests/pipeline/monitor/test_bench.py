"""`sparse bench` from end to end, in its short form: what it measures, what it leaves behind, what it refuses."""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from brokers.server.local_broker import start_broker
from monitor.analysis.run_metrics import MEASUREMENTS_READ, compute_run_metrics
from monitor.bench.manifest import load_manifest
from monitor.bench.suite import SUITES_FOLDER
from monitor.stores.sqlite import SqliteReader
from tests.support.environment.checkout import ROOT
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually

SHORT = ("--requests", "30", "--warm-up", "5", "--repeats", "1")
SPLIT = ROOT / "examples" / "split.toml"


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.parametrize(
    "places", [("cloud", "cloudlet"), ("hybrid-on-device", "device"), ("hybrid-off-device", "server")], ids="-and-".join
)
def test_suites_are_measured_against_one_another(sandbox: ProcessSandbox, places: tuple[str, str]) -> None:
    require_dependency("mosquitto")
    out = sandbox.folder / "bench"
    names = [f"detect-{place}" for place in places]
    said = sandbox.start_sparse("bench", *names, *SHORT, "--out", out).wait(timeout_s=280)
    assert said.returncode == 0, said.stderr
    runs = results(out)["runs"]
    assert list(runs) == [f"{name}-1" for name in names]
    for name in names:
        run = runs[f"{name}-1"]
        points = {each: SqliteReader(out / f"{name}-1" / "telemetry.sqlite").points(each) for each in MEASUREMENTS_READ}
        assert len(points["request"]) == 30
        assert run["samples"] == 25
        assert run["throughput_per_s"] == round(compute_run_metrics(points, 5).throughput_per_s, 4)
        assert any(key.startswith("links.") for key in run) == (name != "detect-device")
        assert {"cpu_s.stage", "cpu_s.source", "cpu_s.broker", "cpu_s.run"} <= set(run)
        assert "cpu_s.monitor" not in run  # it measures
        # All of the latency is somewhere.
        stages = sum(value for key, value in run.items() if key.startswith("stages."))
        assert stages + run["network_ms"] == pytest.approx(run["latency_ms.mean"], rel=0.01)
        assert f"{name}-1: " in said.stderr
        assert name in said.stdout
    if "server" in places:
        # A cut costs bytes: `sparse cuts` says what crosses the second; of the uncut network JPEGs do.
        cut = runs["detect-hybrid-off-device-1"]["links.cloudlet - cloud.bytes_out"]
        assert cut == pytest.approx(1_384_448, rel=0.05)
        assert runs["detect-server-1"]["links.device - cloud.bytes_out"] < cut / 10
    found = load_manifest(out)
    assert found is not None
    assert (found.warm_up, found.requests, found.repeats, found.mode) == (5, 30, 1, "run")
    assert found.ended_at is not None
    assert [suite.runs for suite in found.suites] == [(f"{name}-1",) for name in names]
    with (out / "results.csv").open() as file:
        assert [line["run"] for line in csv.DictReader(file)] == list(runs)
    sandbox.assert_nothing_left()


def test_two_deployments_train_the_same_and_say_how_fast(sandbox: ProcessSandbox) -> None:
    require_dependency("mosquitto")
    out = sandbox.folder / "bench"
    options = ("--requests", "12", "--warm-up", "2", "--repeats", "1", "--json", "--out", out)
    said = sandbox.start_sparse("bench", "train-hybrid-on-device", "train-device", *options).wait(timeout_s=280)
    assert said.returncode == 0, said.stderr
    assert said.json_output["suites"].keys() == {"train-hybrid-on-device", "train-device"}
    for name in ("train-hybrid-on-device-1", "train-device-1"):
        run = said.json_output["runs"][name]
        assert (run["kind"], run["samples"]) == ("training", 10 * 32)
        steps = SqliteReader(out / name / "telemetry.sqlite").points("step")
        assert len(steps) == 12
        took_s = sum(float(step.fields["step_ms"] or 0) for step in steps[2:]) / 1000
        assert run["throughput_per_s"] == pytest.approx(320 / took_s, rel=1e-3)
    losses = [
        [step.fields["loss"] for step in SqliteReader(out / f"{name}-1" / "telemetry.sqlite").points("step")]
        for name in ("train-hybrid-on-device", "train-device")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    sandbox.assert_nothing_left()


def test_repeats_go_round_by_round_and_a_run_that_fails_leaves_the_others_alone(sandbox: ProcessSandbox) -> None:
    good = write_pipeline_file(sandbox.folder, [stage_table("a", "double")], counting_source_table(40), name="good")
    bad = write_pipeline_file(sandbox.folder, [stage_table("a", "Gone")], counting_source_table(40), name="bad")
    out = sandbox.folder / "bench"
    options = ("--repeats", "2", "--warm-up", "10", "--out", out)
    said = sandbox.start_sparse("bench", good, bad, *options).wait()
    assert said.returncode == 1, said.stderr
    runs = results(out)["runs"]
    assert list(runs) == ["good-1", "bad-1", "good-2", "bad-2"]
    assert [runs[f"good-{number}"]["samples"] for number in (1, 2)] == [30, 30]
    assert "tests.support.pipelines.example_code:Gone" in runs["bad-1"]["error"]
    assert f"bad-1: failed: {runs['bad-1']['error']}" in said.stderr
    assert "Traceback" not in said.stderr
    found = load_manifest(out)
    assert found is not None
    assert [suite.runs for suite in found.suites] == [("good-1", "good-2"), ("bad-1", "bad-2")]
    assert found.suites[0].overrides == {}


def test_ctrl_c_keeps_what_was_finished(sandbox: ProcessSandbox) -> None:
    slow = write_pipeline_file(
        sandbox.folder, [stage_table("a", "double")], counting_source_table(100_000, every_s=0.01), name="slow"
    )
    fast = write_pipeline_file(sandbox.folder, [stage_table("a", "double")], counting_source_table(30), name="fast")
    out = sandbox.folder / "bench"
    running = sandbox.start_sparse("bench", fast, slow, "--repeats", "2", "--warm-up", "5", "--out", out)
    eventually("the second run's requests", (out / "slow-1" / "results.jsonl").is_file)
    said = running.wait(signal.SIGINT)
    assert said.returncode == 130, said.stderr
    assert list(results(out)["runs"]) == ["fast-1"]
    assert "slow-1: stopped, it does not count" in said.stderr
    found = load_manifest(out)
    assert found is not None
    assert [suite.runs for suite in found.suites] == [("fast-1",), ()]
    assert found.ended_at is not None
    sandbox.assert_nothing_left()


def test_a_benchmark_that_is_killed_leaves_no_run_behind(sandbox: ProcessSandbox) -> None:
    slow = write_pipeline_file(
        sandbox.folder, [stage_table("a", "double")], counting_source_table(100_000, every_s=0.01), name="slow"
    )
    out = sandbox.folder / "bench"
    running = sandbox.start_sparse("bench", slow, "--out", out)
    eventually("the run's requests", (out / "slow-1" / "results.jsonl").is_file)
    running.wait(signal.SIGKILL)
    eventually("the run's end", lambda: not sandbox.live_processes())


def test_stages_that_are_up_elsewhere_are_measured_from_the_source_alone(sandbox: ProcessSandbox) -> None:
    require_dependency("mosquitto")
    path = write_pipeline_file(
        sandbox.folder, [stage_table("a", "double", site="here")], counting_source_table(40, site="here"), name="far"
    )
    with start_broker(kind="mosquitto") as broker:
        path.write_text(path.read_text() + f'[[site]]\nname = "here"\nbroker = "{broker.address}"\n')
        sandbox.start_sparse("stage", path, "a")
        out = sandbox.folder / "bench"
        said = sandbox.start_sparse(
            "bench", path, "--source-only", "--repeats", "1", "--warm-up", "10", "--out", out
        ).wait()
    assert said.returncode == 0, said.stderr
    run = results(out)["runs"]["far-1"]
    assert run["samples"] == 30
    assert "stages.a.compute_ms" in run
    lives = SqliteReader(out / "far-1" / "telemetry.sqlite").points("life")
    assert "source" in {life.tags["role"] for life in lives}  # it had a monitor, though no `sparse run` was there
    found = load_manifest(out)
    assert found is not None
    assert found.mode == "source"


def test_a_sweep_of_batch_sizes_names_the_best(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(
        sandbox.folder, [stage_table("a")], {"kind": "digits"}, name="swept", model="vgg11-small"
    )
    out = sandbox.folder / "sweep"
    options = ("--batch", "1,4", "--requests", "40", "--warm-up", "10", "--repeats", "2", "--json", "--out", out)
    said = sandbox.start_sparse("bench", "sweep", path, *options).wait()
    assert said.returncode == 0, said.stderr
    assert list(said.json_output["runs"]) == ["batch-1-1", "batch-4-1", "batch-1-2", "batch-4-2"]
    best = said.json_output["best"]
    assert {best["best"], best["second"]} == {"batch-1", "batch-4"}
    found = load_manifest(out)
    assert found is not None
    assert [suite.sweep_point for suite in found.suites] == [{"sweep": "batch", "batch": size} for size in (1, 4)]
    with (out / "results.csv").open() as file:
        assert [line["batch"] for line in csv.DictReader(file)] == ["1", "4", "1", "4"]


def test_a_sweep_of_cuts_tries_not_to_cut_as_well(sandbox: ProcessSandbox) -> None:
    require_dependency("mosquitto")
    out = sandbox.folder / "sweep"
    said = sandbox.start_sparse("bench", "sweep", SPLIT, "--cuts", "8", *SHORT, "--out", out).wait(timeout_s=280)
    assert said.returncode == 0, said.stderr
    runs = results(out)["runs"]
    assert list(runs) == ["cut-8-1", "uncut-at-device-1", "uncut-at-cloud-1"]
    assert [key for key in runs["uncut-at-device-1"] if key.startswith("links.")] == []
    assert "stages.whole.compute_ms" in runs["uncut-at-cloud-1"]
    found = load_manifest(out)
    assert found is not None
    assert found.suites[0].sweep_point == {"sweep": "cut", "cut": 8, "cut_bytes": 346_112}
    assert "best: " in said.stdout


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no suite": ((), "which suite?"),
    "an unknown suite": (("detect-clod",), "there is no suite 'detect-clod' (did you mean 'detect-cloud'?)"),
    "a file that is not there": (("gone.toml",), "gone.toml: no such file"),
    "no requests": (("detect", "--requests", "0"), "--requests"),
    "no repeats": (("detect", "--repeats", "0"), "--repeats"),
    "a warm-up that takes all": (
        ("detect-cloud", "--requests", "20", "--warm-up", "20"),
        "detect-cloud: a warm-up of 20 leaves nothing of 20 requests to measure",
    ),
    "nobody to be a source for": (("detect-cloud", "--source-only"), "site 'device'"),
    "no sweep": (("sweep", str(SPLIT)), "what is to be tried?"),
    "two sweeps": (("sweep", str(SPLIT), "--batch", "1", "--cuts", "8"), "what is to be tried?"),
    "a cut that is none": (("sweep", str(SPLIT), "--cuts", "99"), "its network has no cut 99: expected 1 to 23"),
    "cuts that are no numbers": (("sweep", str(SPLIT), "--cuts", "8,x"), "--cuts '8,x': expected whole numbers"),
    "a batch of nothing": (("sweep", str(SPLIT), "--batch", "0"), "--batch '0': expected whole numbers from 1"),
    "three stages": (("sweep", "detect-cloud", "--cuts", "8"), "one network in two stages, it has 3"),
    "several files to sweep": (("sweep", "detect", "--batch", "1"), "a sweep is of one pipeline, 'detect' are 6"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_a_mistake_is_one_line(sandbox: ProcessSandbox, mistake: str) -> None:
    words, expected = BAD[mistake]
    out = sandbox.folder / "bench"
    said = sandbox.start_sparse("bench", *words, "--out", out).wait()
    assert said.returncode == 2, said.stderr
    (line,) = said.stderr.strip().splitlines()
    assert line.startswith("sparse: ")
    assert expected in line
    assert not out.exists()


def test_a_folder_that_is_not_empty_is_left_alone(sandbox: ProcessSandbox) -> None:
    (sandbox.folder / "mine").write_text("kept")
    said = sandbox.start_sparse("bench", "detect-device", "--out", sandbox.folder).wait()
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)
    assert "it is not empty" in said.stderr
    assert not (sandbox.folder / "manifest.json").exists()


def test_a_folder_below_a_file_is_one_line(sandbox: ProcessSandbox) -> None:
    (sandbox.folder / "file").touch()
    said = sandbox.start_sparse("bench", "detect-device", "--out", sandbox.folder / "file" / "bench").wait()
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)
    assert "results cannot be put into" in said.stderr


def test_a_run_that_has_no_samples_after_its_warm_up_says_so(sandbox: ProcessSandbox) -> None:
    path = write_pipeline_file(sandbox.folder, [stage_table("a", "double")], counting_source_table(5), name="short")
    said = sandbox.start_sparse("bench", path, "--repeats", "1", "--out", sandbox.folder / "bench").wait()
    assert said.returncode == 1
    assert "short-1: failed: the run has no samples: its warm-up of 20 takes all 5 requests" in said.stderr


def test_the_suites_are_listed(sandbox: ProcessSandbox) -> None:
    said = sandbox.start_sparse("bench", "--list").wait()
    assert said.returncode == 0
    for path in SUITES_FOLDER.glob("*.toml"):
        assert f"  {path.stem} " in said.stdout
    assert max(len(line) for line in said.stdout.splitlines()) <= 80
