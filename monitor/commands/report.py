"""`sparse report RUN...`: the figures of runs, compared, as a page, images and CSV files."""

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from brokers.process.files import new_run_folder
from brokers.process.plotting import import_matplotlib
from monitor.errors import extra_missing


def command(
    runs: Annotated[
        list[str],
        typer.Argument(help="Folders of runs or benchmarks, .sqlite files, influx:RUN; the first is the baseline."),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The folder for the report; default: a new folder below runs/.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="End with the headline metrics as one line of JSON.")] = False,
) -> int:
    """Plot the figures of one run, or compare several runs, on one page.

    Repeats of one suite are shown as their median and range. The page contains the data of every figure; beside it each
    figure is a PNG, SVG and PDF file, with its data as CSV. influx:RUN loads a run from the InfluxDB at
    SPARSE_INFLUX_URL.

    Example: sparse report runs/cloud-20260101-120000 runs/cloudlet-20260101-121500
    """
    try:
        import_matplotlib()  # before the runs are loaded, which may take a while
    except ImportError:
        raise extra_missing("plotting figures", "report") from None
    from monitor.report.inputs import load_runs
    from monitor.report.writer import write_report

    inputs = load_runs(runs)
    result = write_report(
        out or new_run_folder(Path("runs"), "report"),
        inputs,
        on_figure=lambda title: print(f"plotting {title}", file=sys.stderr),  # noqa: T201 - progress
    )
    print(jsonlib.dumps(result) if json else result["page"])  # noqa: T201 - the command's output
    return 0
