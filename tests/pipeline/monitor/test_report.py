"""`sparse report`: from the telemetry of runs to a page that a browser shows, and files that a paper can use."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from brokers.server.local_broker import LocalBroker
from monitor.stores.influx.store import InfluxStore
from monitor.stores.sqlite import TELEMETRY_FILE, SqliteReader, SqliteStore
from tests.support.environment.browser import CHROMIUM, render_page
from tests.support.environment.external_programs import require_dependency
from tests.support.monitor.influx_servers import start_influx
from tests.support.monitor.synthetic_runs import SyntheticRun, make_manifest, time_ns_at, write_run_folder
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import CommandResult, ProcessSandbox, eventually

HOSTILE = "<script>alert(1)</script> & $x^2$ _"
INFERENCE = ("completion", "where", "latency", "network", "network-cdf", "link-bytes", "cpu", "cpu-seconds")


def report(sandbox: ProcessSandbox, *runs: str | Path, **environment: str) -> CommandResult:
    """A report of these, in the machine's folder."""
    return sandbox.start_sparse(
        "report", *runs, "--json", "--out", sandbox.folder / "report", environment=environment
    ).wait()


def page(sandbox: ProcessSandbox) -> str:
    return (sandbox.folder / "report" / "index.html").read_text()


def test_two_runs_are_compared_in_every_figure(sandbox: ProcessSandbox) -> None:
    slow, fast = SyntheticRun("slow", rate_per_s=10), SyntheticRun("fast", rate_per_s=25)
    said = report(sandbox, *(write_run_folder(each.points(), sandbox.folder / each.name) for each in (slow, fast)))
    assert said.returncode == 0, said.stderr
    assert tuple(said.json_output["figures"]) == INFERENCE
    assert [row["run"] for row in said.json_output["runs"]] == ["slow", "fast"]
    assert said.json_output["runs"][1]["throughput (requests/s) ratio"] == pytest.approx(2.5, rel=0.02)
    for name in INFERENCE:
        with Image.open(sandbox.folder / "report" / "figures" / f"{name}.png") as picture:
            assert picture.width == 940
            assert round(picture.info["dpi"][0]) == 200
        with (sandbox.folder / "report" / "data" / f"{name}.csv").open() as file:
            assert {row["run"] for row in csv.DictReader(file)} == {"slow", "fast"}
        svg = (sandbox.folder / "report" / "figures" / f"{name}.svg").read_text()
        assert svg.count("<svg") == 1
        assert "var(" not in svg
        assert (sandbox.folder / "report" / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    sandbox.assert_nothing_left()


def test_a_csv_file_has_what_the_telemetry_says(sandbox: ProcessSandbox) -> None:
    """From the raw records to the file, without any code of the report."""
    folder = write_run_folder(SyntheticRun("one", request_count=40).points(), sandbox.folder / "one")
    assert report(sandbox, folder).returncode == 0
    requests = SqliteReader(folder / TELEMETRY_FILE).points("request")
    began_ns = min(point.time_ns - round(float(str(point.fields["latency_ms"])) * 1e6) for point in requests)
    by_hand = [(0.0, 0.0), *(((each.time_ns - began_ns) / 1e9, (n + 1) / 40) for n, each in enumerate(requests))]
    with (sandbox.folder / "report" / "data" / "completion.csv").open() as file:
        written = [(float(row["time_s"]), float(row["share"])) for row in csv.DictReader(file)]
    assert [number for each in written for number in each] == pytest.approx([n for each in by_hand for n in each])


@pytest.mark.parametrize("width", [1280, 375])
def test_a_browser_shows_every_figure_and_has_no_complaint(sandbox: ProcessSandbox, width: int) -> None:
    require_dependency(CHROMIUM)
    names = ("cloud", HOSTILE)
    folders = [sandbox.folder / f"run-{number}" for number in range(2)]
    for folder, name in zip(folders, names, strict=True):
        write_run_folder(SyntheticRun(name, has_gpu=name == "cloud").points(), folder / name.replace("/", "."))
    said = report(sandbox, *(next(folder.iterdir()) for folder in folders))
    assert said.returncode == 0, said.stderr
    found = render_page(sandbox, sandbox.folder / "report" / "index.html", width)
    assert found.console_errors == []
    assert found.requests == []
    assert found.viewport_width == width
    assert found.scroll_width <= width
    assert tuple(found.figure_boxes) == tuple(said.json_output["figures"])
    for name, (wide, high, right) in found.figure_boxes.items():
        assert wide > 250, name
        assert high > 100, name
        assert right <= width, name


def test_a_hostile_name_is_text_wherever_it_stands(sandbox: ProcessSandbox) -> None:
    folder = write_run_folder(
        SyntheticRun(HOSTILE, pipeline=HOSTILE).points(), sandbox.folder / HOSTILE.replace("/", ".")
    )
    said = report(sandbox, folder)
    assert said.returncode == 0, said.stderr
    assert "<script" not in page(sandbox)
    assert "&lt;script&gt;" in page(sandbox)


def test_a_page_asks_nobody_for_anything(sandbox: ProcessSandbox) -> None:
    assert report(sandbox, write_run_folder(SyntheticRun("one").points(), sandbox.folder / "one")).returncode == 0
    wanted = re.findall(r'(?:src|href)="([^"#][^"]*)"', page(sandbox))
    assert {link.partition("/")[0] for link in wanted} == {"data:,", "figures", "data"}
    assert all((sandbox.folder / "report" / link).is_file() for link in wanted if not link.startswith("data:"))
    assert not re.search(r"@import|url\((?!#)", page(sandbox))


def bench(folder: Path, suites: Mapping[str, Sequence[SyntheticRun]], **about: object) -> Path:
    """The folder of a benchmark, with its runs."""
    runs = {suite: [f"{suite}-{number}" for number in range(1, len(repeats) + 1)] for suite, repeats in suites.items()}
    for suite, repeats in suites.items():
        for name, made_up in zip(runs[suite], repeats, strict=True):
            write_run_folder(made_up.points(), folder / name)
    (folder / "manifest.json").write_text(json.dumps(make_manifest(runs, warm_up=20, **about)))
    return folder


def test_the_repeats_of_a_benchmark_are_one_line_and_its_manifest_is_told(sandbox: ProcessSandbox) -> None:
    suites = {
        "cloud": [SyntheticRun("cloud", rate_per_s=rate) for rate in (10, 12, 20)],
        "cloudlet": [SyntheticRun("cloudlet", rate_per_s=rate) for rate in (20, 24, 40)],
    }
    folder = bench(sandbox.folder / "bench", suites)
    SqliteStore(folder / "cloud-2" / "telemetry.sqlite").close()
    write_run_folder([], folder / "cloudlet-3" / "x")
    (folder / "cloudlet-3" / TELEMETRY_FILE).unlink()
    said = report(sandbox, folder)
    assert said.returncode == 0, said.stderr
    assert [(row["run"], row["repeats"], row["samples"]) for row in said.json_output["runs"]] == [
        ("cloud", 3, 180), ("cloudlet", 2, 180)
    ]  # fmt: skip
    assert said.json_output["runs"][1]["throughput (requests/s)"] == pytest.approx(22)
    (left_out,) = said.json_output["left_out"]
    assert f"{folder / 'cloudlet-3'}" in left_out
    assert "8 ms, 50 Mbit/s, emulated" in page(sandbox)
    assert "torch 2.7.0" in page(sandbox)


def test_a_run_of_a_benchmark_has_its_warm_up_cut_off_and_a_strangers_manifest_says_nothing(
    sandbox: ProcessSandbox,
) -> None:
    bench(sandbox.folder / "bench", {"cloud": [SyntheticRun("cloud", request_count=60)]})
    alone = write_run_folder(SyntheticRun("alone", request_count=60).points(), sandbox.folder / "app" / "alone")
    (sandbox.folder / "app" / "manifest.json").write_text('{"name": "an app of the web"}')
    said = report(sandbox, sandbox.folder / "bench" / "cloud-1", alone)
    assert said.returncode == 0, said.stderr
    assert [row["samples"] for row in said.json_output["runs"]] == [40, 60]


def test_no_figure_of_an_earlier_report_stays_and_no_other_folder_is_written_to(sandbox: ProcessSandbox) -> None:
    folder = write_run_folder(SyntheticRun("one", request_count=40).points(), sandbox.folder / "one")
    assert report(sandbox, folder).returncode == 0
    old = sandbox.folder / "report" / "figures" / "sweep.pdf"
    old.write_bytes(b"of another comparison")
    assert report(sandbox, folder).returncode == 0
    assert not old.exists()
    web = sandbox.folder / "web"
    (web / "figures").mkdir(parents=True)
    (web / "index.html").write_text("<!DOCTYPE html>\n<title>Report: our year</title>\n")
    (web / "figures" / "gpu.png").write_bytes(b"a photo")
    note = sandbox.folder / "report" / "data" / "note.txt"
    note.write_text("of a person")
    for other in (folder, web, sandbox.folder / "report"):
        said = sandbox.start_sparse("report", folder, "--out", other).wait()
        assert said.returncode == 2
        assert said.stderr.splitlines() == [
            f"sparse: {other}: it holds something else than a report: name another folder, or an empty one"
        ]
    assert (web / "figures" / "gpu.png").exists()
    assert note.exists()
    assert (sandbox.folder / "report" / "index.html").exists()


def test_a_sweep_is_drawn_over_what_it_varied(sandbox: ProcessSandbox) -> None:
    points = {f"batch {batch}": [SyntheticRun("x", rate_per_s=4.0 * batch)] * 2 for batch in (1, 4, 2)}
    folder = bench(
        sandbox.folder / "sweep", points, **{name: {"sweep": "batch", "batch": int(name.split()[1])} for name in points}
    )
    said = report(sandbox, folder)
    assert said.returncode == 0, said.stderr
    with (sandbox.folder / "report" / "data" / "sweep.csv").open() as file:
        found = [(float(row["value"]), float(row["throughput_per_s"])) for row in csv.DictReader(file)]
    assert [value for value, _ in found] == [1.0, 2.0, 4.0]
    assert [rate for _, rate in found] == pytest.approx([4.0, 8.0, 16.0])


def test_training_is_reported_by_its_steps(sandbox: ProcessSandbox) -> None:
    folder = write_run_folder(
        SyntheticRun("digits", pipeline="digits").training_points(steps=30), sandbox.folder / "digits"
    )
    said = report(sandbox, folder)
    assert said.returncode == 0, said.stderr
    assert {"learning-step", "learning-time", "where"} <= set(said.json_output["figures"])
    assert said.json_output["runs"][0]["samples"] == 30 * 64


def test_a_real_run_is_reported(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    path = write_pipeline_file(
        sandbox.folder, [stage_table("first", "double"), stage_table("second", "double")], counting_source_table(30)
    )
    words = ("run", path, "--broker", embedded_broker.address, "--json", "--out", sandbox.folder / "run")
    run = sandbox.start_sparse(*words, environment={"SPARSE_MONITOR": ""}).wait()  # with a monitor of its own
    assert run.returncode == 0, run.stderr
    said = report(sandbox, sandbox.folder / "run")
    assert said.returncode == 0, said.stderr
    assert said.json_output["runs"][0]["samples"] == 30
    with (sandbox.folder / "report" / "data" / "where.csv").open() as file:
        assert list(dict.fromkeys(row["stage"] for row in csv.DictReader(file))) == ["first", "second", ""]
    sandbox.assert_nothing_left()


def test_a_run_in_influxdb_has_the_figures_of_the_same_run_in_a_file(sandbox: ProcessSandbox) -> None:
    made_up = SyntheticRun("one", has_gpu=True)
    points = made_up.points()
    with start_influx(sandbox.folder / "influx") as server:
        store = InfluxStore(server.target, sandbox.folder / "spool")
        try:
            store.write(points)
            kept = sum(point.measurement == "process" for point in points)
            eventually("all points in InfluxDB", lambda: server.count_points("process", "pid") == kept)
            eventually("all hops in InfluxDB", lambda: server.count_points("hop", "place") == 3 * made_up.request_count)
        finally:
            store.close()
        there = {
            "SPARSE_INFLUX_URL": server.target.url,
            "SPARSE_INFLUX_BUCKET": server.target.bucket,
            "SPARSE_INFLUX_TOKEN": server.target.token,
        }
        said = report(sandbox, "influx:one", **there)
        assert said.returncode == 0, said.stderr
        unknown = report(sandbox, "influx:two", **there)
    assert (unknown.returncode, len(unknown.stderr.splitlines())) == (2, 1)
    assert "influx:two: there is no such run in bucket" in unknown.stderr
    data = sandbox.folder / "report" / "data"
    from_influx = {path.name: path.read_text() for path in data.iterdir()}
    assert report(sandbox, write_run_folder(points, sandbox.folder / "one")).returncode == 0
    assert from_influx == {path.name: path.read_text() for path in data.iterdir()}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere", "nowhere: there is no such file or folder"),
        (
            "folder",
            f"expected the folder of a run, which has {TELEMETRY_FILE} in it, or of a benchmark, with manifest.json",
        ),
        ("empty.sqlite", "it holds no telemetry of Sparse"),
        ("text.sqlite", "no telemetry of Sparse: file is not a database"),
        ("new", "the run has no samples"),
        ("all-failed", "the run has no samples: none of the 1 requests after its warm-up has a result"),
        ("no-json", "no manifest of a benchmark"),
        ("no-runs", "none of its runs can be read"),
        ("influx:one", "influx:one: set SPARSE_INFLUX_URL to the address of InfluxDB"),
    ],
)
def test_what_is_no_run_gives_one_line(sandbox: ProcessSandbox, name: str, told: str) -> None:
    for folder in ("folder", "no-json", "no-runs"):
        (sandbox.folder / folder).mkdir()
    (sandbox.folder / "empty.sqlite").touch()
    (sandbox.folder / "text.sqlite").write_text("no telemetry at all" * 100)
    (sandbox.folder / "no-json" / "manifest.json").write_text("{")
    (sandbox.folder / "no-runs" / "manifest.json").write_text(json.dumps(make_manifest({"cloud": ["cloud-1"]})))
    write_run_folder([], sandbox.folder / "new")
    failed = [point for point in SyntheticRun("all-failed", request_count=1).points() if point.measurement == "request"]
    write_run_folder([type(each)(each.measurement, time_ns_at(1), each.tags, {**each.fields, "error": "NoWorker"}) for each in failed],
         sandbox.folder / "all-failed")  # fmt: skip
    said = report(sandbox, name if name.startswith("influx:") else sandbox.folder / name)
    assert (said.returncode, len(said.stderr.splitlines()), said.stdout) == (2, 1, "")
    assert said.stderr.startswith("sparse: ")
    assert told in said.stderr
    assert not (sandbox.folder / "report").exists()


def test_an_influxdb_that_is_not_there_gives_one_line(sandbox: ProcessSandbox) -> None:
    said = report(sandbox, "influx:one", SPARSE_INFLUX_URL="http://127.0.0.1:9")
    assert said.returncode in (1, 2)
    assert len(said.stderr.splitlines()) == 1
    assert "127.0.0.1:9" in said.stderr


def test_inference_and_training_are_not_compared(sandbox: ProcessSandbox) -> None:
    inference = write_run_folder(SyntheticRun("street").points(), sandbox.folder / "street")
    training = write_run_folder(SyntheticRun("digits").training_points(), sandbox.folder / "digits")
    said = report(sandbox, inference, training)
    assert said.returncode == 2
    (line,) = said.stderr.splitlines()
    assert line.startswith("sparse: cannot compare 'street' with 'digits': the first is of inference, the second of")


def test_without_matplotlib_one_line_names_the_extra(sandbox: ProcessSandbox) -> None:
    program = "import sys; sys.modules['matplotlib'] = None; from brokers.cli import main; sys.exit(main(sys.argv[1:]))"
    folder = write_run_folder(SyntheticRun("one").points(), sandbox.folder / "one")
    said = sandbox.start(sys.executable, "-c", program, "report", folder, "--out", sandbox.folder / "report").wait()
    assert said.returncode == 2
    assert len(said.stderr.splitlines()) == 1
    assert "[report]" in said.stderr
