"""`sparse report` on the command line: from telemetry to files for a paper, and a page that a browser shows."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
from PIL import Image

from brokers.server.local_broker import LocalBroker
from monitor.stores.influx.store import InfluxStore
from monitor.stores.sqlite import TELEMETRY_FILE, SqliteReader
from tests.support.environment.browser import CHROMIUM, render_page
from tests.support.environment.external_programs import require_dependency
from tests.support.monitor.influx_servers import start_influx
from tests.support.monitor.synthetic_runs import SyntheticRun, write_run_folder
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import CommandResult, ProcessSandbox, eventually

HOSTILE = "<script>alert(1)</script> & $x^2$ _"
INFERENCE_FIGURES = ("completion", "where", "latency", "network", "network-cdf", "link-bytes", "cpu", "cpu-seconds")


def run_report(sandbox: ProcessSandbox, *runs: str | Path, **environment: str) -> CommandResult:
    """Make a report of these runs in the folder `report`."""
    out = sandbox.folder / "report"
    return sandbox.start_sparse("report", *runs, "--json", "--out", out, environment=environment).wait()


def read_csv(sandbox: ProcessSandbox, name: str) -> list[dict[str, str]]:
    with (sandbox.folder / "report" / "data" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_two_runs_are_compared_in_every_figure(sandbox: ProcessSandbox) -> None:
    slow, fast = SyntheticRun("slow", rate_per_s=10), SyntheticRun("fast", rate_per_s=25)
    report = run_report(sandbox, *(write_run_folder(run.points(), sandbox.folder / run.name) for run in (slow, fast)))
    assert report.returncode == 0, report.stderr
    assert tuple(report.json_output["figures"]) == INFERENCE_FIGURES
    assert [row["run"] for row in report.json_output["runs"]] == ["slow", "fast"]
    assert report.json_output["runs"][1]["throughput (requests/s) ratio"] == pytest.approx(2.5, rel=0.02)
    images = sandbox.folder / "report" / "figures"
    for name in INFERENCE_FIGURES:
        with Image.open(images / f"{name}.png") as image:
            assert image.width == 940
            assert round(image.info["dpi"][0]) == 200
        svg = (images / f"{name}.svg").read_text()
        assert svg.count("<svg") == 1
        assert "var(" not in svg
        assert (images / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert {row["run"] for row in read_csv(sandbox, name)} == {"slow", "fast"}
    sandbox.assert_nothing_left()


def test_csv_file_equals_the_telemetry(sandbox: ProcessSandbox) -> None:
    """Computed from the raw records, without the code of the report."""
    folder = write_run_folder(SyntheticRun("one", request_count=40).points(), sandbox.folder / "one")
    assert run_report(sandbox, folder).returncode == 0
    requests = SqliteReader(folder / TELEMETRY_FILE).points("request")
    begin_ns = min(request.time_ns - round(float(str(request.fields["latency_ms"])) * 1e6) for request in requests)
    expected = [0.0, 0.0]
    for count, request in enumerate(requests, start=1):
        expected += [(request.time_ns - begin_ns) / 1e9, count / 40]
    written = [float(row[column]) for row in read_csv(sandbox, "completion") for column in ("time_s", "share")]
    assert written == pytest.approx(expected)


@pytest.mark.parametrize("width", [1280, 375])
def test_browser_shows_every_figure_without_errors(sandbox: ProcessSandbox, width: int) -> None:
    require_dependency(CHROMIUM)
    hostile = sandbox.folder / HOSTILE.replace("/", ".")
    runs = [
        write_run_folder(SyntheticRun("cloud", has_gpu=True).points(), sandbox.folder / "cloud"),
        write_run_folder(SyntheticRun(HOSTILE, pipeline=HOSTILE).points(), hostile),
    ]
    report = run_report(sandbox, *runs)
    assert report.returncode == 0, report.stderr
    page = render_page(sandbox, sandbox.folder / "report" / "index.html", width)
    assert page.console_errors == []
    assert page.requests == []
    assert page.viewport_width == width
    assert page.scroll_width <= width
    assert tuple(page.figure_boxes) == tuple(report.json_output["figures"])
    for name, (figure_width, height, right) in page.figure_boxes.items():
        assert figure_width > 250, name
        assert height > 100, name
        assert right <= width, name


def test_report_of_training(sandbox: ProcessSandbox) -> None:
    run = SyntheticRun("digits", pipeline="digits")
    report = run_report(sandbox, write_run_folder(run.training_points(steps=30), sandbox.folder / "digits"))
    assert report.returncode == 0, report.stderr
    assert {"learning-step", "learning-time", "where"} <= set(report.json_output["figures"])
    assert report.json_output["runs"][0]["samples"] == 30 * 64


def test_report_of_a_real_run(sandbox: ProcessSandbox, embedded_broker: LocalBroker) -> None:
    stages = [stage_table("first", "double"), stage_table("second", "double")]
    path = write_pipeline_file(sandbox.folder, stages, counting_source_table(30))
    arguments = ("run", path, "--broker", embedded_broker.address, "--json", "--out", sandbox.folder / "run")
    own_monitor = {"SPARSE_MONITOR": ""}
    run = sandbox.start_sparse(*arguments, environment=own_monitor).wait()
    assert run.returncode == 0, run.stderr
    report = run_report(sandbox, sandbox.folder / "run")
    assert report.returncode == 0, report.stderr
    assert report.json_output["runs"][0]["samples"] == 30
    assert list(dict.fromkeys(row["stage"] for row in read_csv(sandbox, "where"))) == ["first", "second", ""]
    sandbox.assert_nothing_left()


def test_run_in_influxdb_has_the_figures_of_a_file(sandbox: ProcessSandbox) -> None:
    run = SyntheticRun("one", has_gpu=True)
    points = run.points()
    with start_influx(sandbox.folder / "influx") as server:
        store = InfluxStore(server.target, sandbox.folder / "spool")
        try:
            store.write(points)
            processes = sum(point.measurement == "process" for point in points)
            eventually("all points in InfluxDB", lambda: server.count_points("process", "pid") == processes)
            eventually("all hops in InfluxDB", lambda: server.count_points("hop", "place") == 3 * run.request_count)
        finally:
            store.close()
        environment = {
            "SPARSE_INFLUX_URL": server.target.url,
            "SPARSE_INFLUX_BUCKET": server.target.bucket,
            "SPARSE_INFLUX_TOKEN": server.target.token,
        }
        report = run_report(sandbox, "influx:one", **environment)
        assert report.returncode == 0, report.stderr
        unknown = run_report(sandbox, "influx:two", **environment)
    assert (unknown.returncode, len(unknown.stderr.splitlines())) == (2, 1)
    assert "influx:two: there is no such run in bucket" in unknown.stderr
    data = sandbox.folder / "report" / "data"
    from_influx = {path.name: path.read_text() for path in data.iterdir()}
    assert run_report(sandbox, write_run_folder(points, sandbox.folder / "one")).returncode == 0
    assert from_influx == {path.name: path.read_text() for path in data.iterdir()}


def test_unreachable_influxdb_is_one_line(sandbox: ProcessSandbox) -> None:
    report = run_report(sandbox, "influx:one", SPARSE_INFLUX_URL="http://127.0.0.1:9")
    assert report.returncode in (1, 2)
    assert len(report.stderr.splitlines()) == 1
    assert "127.0.0.1:9" in report.stderr


def test_input_that_is_no_run_is_one_line(sandbox: ProcessSandbox) -> None:
    report = run_report(sandbox, sandbox.folder / "nowhere")
    assert (report.returncode, report.stdout) == (2, "")
    (line,) = report.stderr.splitlines()
    assert line == f"sparse: cannot report on {sandbox.folder / 'nowhere'}: there is no such file or folder"
    assert not (sandbox.folder / "report").exists()


def test_without_matplotlib_the_extra_is_named(sandbox: ProcessSandbox) -> None:
    program = "import sys; sys.modules['matplotlib'] = None; from brokers.cli import main; sys.exit(main(sys.argv[1:]))"
    report = sandbox.start(sys.executable, "-c", program, "report", sandbox.folder).wait()
    assert report.returncode == 2
    (line,) = report.stderr.splitlines()
    assert "[report]" in line
