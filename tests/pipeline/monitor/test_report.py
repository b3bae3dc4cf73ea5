"""`sparse report` on the command line: from telemetry to files for a paper, and a page that a browser shows."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from brokers.server.local_broker import LocalBroker
from monitor.stores.influx.store import InfluxStore
from tests.support.environment.browser import CHROMIUM, render_page
from tests.support.environment.external_programs import require_dependency
from tests.support.monitor.influx_servers import start_influx
from tests.support.monitor.synthetic_runs import SyntheticRun, write_run_folder
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import CommandResult, ProcessSandbox, eventually, process_sandbox

HOSTILE = "<script>alert(1)</script> & $x^2$ _"
INFERENCE_FIGURES = ("completion", "where", "latency", "network", "network-cdf", "link-bytes", "cpu", "cpu-seconds")


def run_report(sandbox: ProcessSandbox, *runs: str | Path, **environment: str) -> CommandResult:
    """`sparse report` of these runs, into the folder `report`."""
    out = sandbox.folder / "report"
    return sandbox.start_sparse("report", *runs, "--json", "--out", out, environment=environment).wait()


def read_csv(sandbox: ProcessSandbox, name: str) -> list[dict[str, str]]:
    with (sandbox.folder / "report" / "data" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", name="comparison_sandbox")
def _comparison_sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessSandbox]:
    with process_sandbox(tmp_path_factory.mktemp("comparison")) as sandbox:
        yield sandbox


@pytest.fixture(scope="module", name="comparison")
def _comparison(comparison_sandbox: ProcessSandbox) -> CommandResult:
    """A report of two runs, one of which has a name with HTML and LaTeX in it."""
    folder = comparison_sandbox.folder
    slow, fast = SyntheticRun("slow", rate_per_s=10, has_gpu=True), SyntheticRun(HOSTILE, HOSTILE, rate_per_s=25)
    folders = folder / "slow", folder / HOSTILE.replace("/", ".")
    write_run_folder(slow.points(), folders[0])
    write_run_folder(fast.points(), folders[1])
    result = run_report(comparison_sandbox, *folders)
    assert result.returncode == 0, result.stderr
    comparison_sandbox.assert_nothing_left()
    return result


def test_two_runs_are_compared_in_every_figure(comparison_sandbox: ProcessSandbox, comparison: CommandResult) -> None:
    assert set(comparison.json_output["figures"]) >= set(INFERENCE_FIGURES)
    slow, fast = comparison.json_output["runs"]
    assert slow["run"] == "slow"
    assert fast["throughput (requests/s) ratio"] == pytest.approx(2.5, rel=0.02)
    images = comparison_sandbox.folder / "report" / "figures"
    for name in INFERENCE_FIGURES:
        with Image.open(images / f"{name}.png") as image:
            assert image.width == 940
            assert round(image.info["dpi"][0]) == 200
        svg = (images / f"{name}.svg").read_text()
        assert svg.count("<svg") == 1
        assert "var(" not in svg
        assert (images / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert {row["run"] for row in read_csv(comparison_sandbox, name)} == {slow["run"], fast["run"]}


@pytest.mark.parametrize("width", [1280, 375])
def test_browser_shows_every_figure_without_errors(
    comparison_sandbox: ProcessSandbox, comparison: CommandResult, width: int
) -> None:
    require_dependency(CHROMIUM)
    page = render_page(comparison_sandbox, comparison_sandbox.folder / "report" / "index.html", width)
    assert page.console_messages == []
    assert page.requests == []
    assert page.viewport_width == width
    assert page.scroll_width <= width
    assert tuple(page.figure_boxes) == tuple(comparison.json_output["figures"])
    for name, (figure_width, height, right) in page.figure_boxes.items():
        assert figure_width > 250, name
        assert height > 100, name
        assert right <= width, name


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


def test_report_of_a_run_in_influxdb(sandbox: ProcessSandbox) -> None:
    """tests/contract/monitor/test_stores.py shows that all stores return the same points."""
    run = SyntheticRun("one")
    points = run.points()
    with start_influx(sandbox.folder / "influx") as server:
        store = InfluxStore(server.target, sandbox.folder / "spool")
        try:
            store.write(points)
            eventually("all points", lambda: server.count_points("hop", "place") == 3 * run.request_count)
        finally:
            store.close()
        environment = {
            "SPARSE_INFLUX_URL": server.target.url,
            "SPARSE_INFLUX_BUCKET": server.target.bucket,
            "SPARSE_INFLUX_TOKEN": server.target.token,
        }
        report = run_report(sandbox, "influx:one", **environment)
        unknown = run_report(sandbox, "influx:two", **environment)
    assert report.returncode == 0, report.stderr
    assert report.json_output["runs"][0]["samples"] == run.request_count
    assert (unknown.returncode, len(unknown.stderr.splitlines())) == (2, 1)
    assert "influx:two: there is no such run in bucket" in unknown.stderr


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


def test_settings_of_matplotlib_do_not_matter(sandbox: ProcessSandbox) -> None:
    write_run_folder(SyntheticRun("one").points(), sandbox.folder / "one")
    settings = sandbox.folder / "matplotlibrc"
    settings.write_text("text.usetex: True\n")
    environment = {"MPLBACKEND": "nonsense", "MATPLOTLIBRC": str(settings)}
    out = sandbox.folder / "report"
    command = ("report", sandbox.folder / "one", "--json", "--out", out)
    report = sandbox.start_sparse(*command, environment=environment, forked=False).wait()
    assert report.returncode == 0, report.stderr
    assert set(report.json_output["figures"]) >= {"latency", "cpu"}


def test_without_matplotlib_the_extra_is_named(sandbox: ProcessSandbox) -> None:
    program = "import sys; sys.modules['matplotlib'] = None; from brokers.cli import main; sys.exit(main(sys.argv[1:]))"
    report = sandbox.start(sys.executable, "-c", program, "report", sandbox.folder).wait()
    assert report.returncode == 2
    (line,) = report.stderr.splitlines()
    assert "[report]" in line
