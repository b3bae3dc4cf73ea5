"""Runs are loaded from run folders, benchmark folders and SQLite files, or refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from brokers.errors import UsageError
from monitor.points.points import TelemetryPoint
from monitor.report.inputs import load_runs
from monitor.stores.influx.config import URL_VARIABLE
from monitor.stores.sqlite import TELEMETRY_FILE, SqliteStore
from tests.support.monitor.synthetic_runs import SyntheticRun, make_manifest, write_run_folder
from tests.unit.monitor.report.report_runs import make_point, make_request, make_steps


def tag_run(points: Sequence[TelemetryPoint], run: str) -> list[TelemetryPoint]:
    return [TelemetryPoint(each.measurement, each.time_ns, {**each.tags, "run": run}, each.fields) for each in points]


def write_run(folder: Path, requests: int = 3, run: str = "x") -> Path:
    points = [make_request(number, 1.0 + number, 500.0) for number in range(requests)]
    return write_run_folder(tag_run(points, run), folder)


def write_bench(folder: Path, suites: Mapping[str, Sequence[str]], **sweep_points: object) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(make_manifest(suites, warm_up=1, **sweep_points)))
    return folder


def test_run_folder_is_named_after_the_folder(tmp_path: Path) -> None:
    inputs = load_runs([str(write_run(tmp_path / "cloud")), str(write_run(tmp_path / "b" / "cloud"))])
    assert [(run.label, run.warm_up, len(run.points["request"])) for run in inputs.runs] == [
        ("cloud", 0, 3),
        ("cloud (2)", 0, 3),
    ]


def test_file_has_all_runs_of_a_monitor(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "node.sqlite")
    store.write([*tag_run([make_request(1, 2.0, 500.0)], "a"), *tag_run([make_request(1, 3.0, 500.0)], "b")])
    store.close()
    assert [run.label for run in load_runs([str(tmp_path / "node.sqlite")]).runs] == ["a", "b"]


def test_samples_of_a_node_are_those_around_the_run(tmp_path: Path) -> None:
    samples = [
        make_point("process", second, {"role": "stage", "name": "w", "run": ""}, cpu_s=1.0) for second in range(-9, 20)
    ]
    missing = make_point("missing", -9, {"node": "pi", "sensor": "gpu", "run": ""}, reason="no driver")
    folder = write_run_folder([*tag_run([make_request(1, 2.0, 500.0)], "a"), *samples, missing], tmp_path / "a")
    (run,) = load_runs([str(folder)]).runs
    assert [run.seconds_since_start(point) for point in run.points["process"]] == [-1.5, -0.5, 0.5, 1.5, 2.5]
    assert len(run.points["missing"]) == 1


def test_benchmark_has_its_repeats_and_skips_failed_runs(tmp_path: Path) -> None:
    folder = write_bench(tmp_path / "bench", {"cloud": ["cloud-1", "cloud-2", "cloud-3"], "server": ["server-1"]})
    for name in ("cloud-1", "cloud-2", "server-1"):
        write_run(folder / name, requests=0 if name == "cloud-2" else 3)
    inputs = load_runs([str(folder)])
    assert [(run.label, run.name, run.warm_up) for run in inputs.runs] == [
        ("cloud", "cloud-1", 1),
        ("server", "server-1", 1),
    ]
    assert all(run.manifest is not None for run in inputs.runs)
    assert [str(folder / name) in text for name, text in zip(("cloud-2", "cloud-3"), inputs.skipped, strict=True)] == [
        True,
        True,
    ]


def test_sweep_has_its_settings(tmp_path: Path) -> None:
    points = {"cut-8": {"sweep": "cut", "cut": 8}, "uncut": {"sweep": "cut", "cut": None}}
    folder = write_bench(tmp_path / "sweep", {name: [f"{name}-1"] for name in points}, **points)
    for name in points:
        write_run(folder / f"{name}-1")
    assert [(run.sweep_name, run.sweep_setting) for run in load_runs([str(folder)]).runs] == [
        ("swept", ("cut", 8.0)),
        ("swept", ("cut", None)),
    ]


def test_run_of_a_benchmark_keeps_its_warm_up(tmp_path: Path) -> None:
    folder = write_bench(tmp_path / "bench", {"cloud": ["cloud-1"]})
    other = tmp_path / "app"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "a web app"}')
    names = [write_run(folder / "cloud-1"), write_run(folder / "mine"), write_run(other / "alone")]
    assert [run.warm_up for run in load_runs([str(name) for name in names]).runs] == [1, 0, 0]


def test_inference_and_training_are_not_compared(tmp_path: Path) -> None:
    training = write_run_folder(tag_run(make_steps(4.0, 2.0), "digits"), tmp_path / "digits")
    with pytest.raises(UsageError) as caught:
        load_runs([str(training), str(write_run(tmp_path / "street"))])
    assert caught.value.code == "CannotCompare"
    assert "'street' (inference) with 'digits' (training)" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("nowhere", "there is no such file or folder"),
        ("folder", f"expected the folder of a run, with {TELEMETRY_FILE}, or of a benchmark, with manifest.json"),
        ("empty.sqlite", "it holds no telemetry of Sparse"),
        ("text.sqlite", "file is not a database"),
        ("new", "the run has no samples"),
        ("all-failed", "the run has no samples"),
        ("no-runs", "none of its runs can be read"),
        ("influx:one", f"set {URL_VARIABLE} to the address of InfluxDB"),
    ],
)
def test_other_inputs_raise_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, problem: str
) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.sqlite").touch()
    (tmp_path / "text.sqlite").write_text("no telemetry at all" * 100)
    write_bench(tmp_path / "no-runs", {"cloud": ["cloud-1"]})
    write_run_folder([], tmp_path / "new")
    write_run_folder(tag_run([make_request(1, 2.0, 500.0, error="NoWorker")], "x"), tmp_path / "all-failed")
    argument = name if name.startswith("influx:") else str(tmp_path / name)
    with pytest.raises(UsageError) as caught:
        load_runs([argument])
    assert (caught.value.code, caught.value.fields["name"]) == ("NotARun", argument)
    assert problem in caught.value.fields["problem"]


def test_invalid_manifest_is_reported(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UsageError) as caught:
        load_runs([str(tmp_path)])
    assert caught.value.code == "BadManifest"


def test_synthetic_run_has_every_measurement_of_a_report(tmp_path: Path) -> None:
    folder = write_run_folder(SyntheticRun("one", request_count=40, has_gpu=True).points(), tmp_path / "one")
    (run,) = load_runs([str(folder)]).runs
    assert {name for name, points in run.points.items() if points} >= {"request", "hop", "link", "process", "gpu"}
