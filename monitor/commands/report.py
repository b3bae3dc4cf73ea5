"""`sparse report RUN...`: the figures of runs, beside each other, as pictures, CSV files and one page."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

from brokers.config.pipeline_file import new_run_folder
from brokers.errors import BadFile
from monitor.errors import ExtraMissing


def command(
    runs: Annotated[
        list[str],
        typer.Argument(help="Folders of runs or benchmarks, .sqlite files, influx:RUN; the first is the baseline."),
    ],
    out: Annotated[Path | None, typer.Option(help="The report's folder; left out: a new folder below runs/.")] = None,
    json: Annotated[bool, typer.Option("--json", help="End with the headline numbers as one line of JSON.")] = False,
) -> int:
    """Draw the figures of one run, or of several beside each other, on one page.

    Repeats of one suite are shown together: their median, and how far they spread. The page has every figure's numbers;
    beside it each figure lies as PNG, SVG and PDF, its numbers as CSV. influx:RUN asks the InfluxDB that
    SPARSE_INFLUX_URL names.

    Example: sparse report runs/cloud-20260101-120000 runs/cloudlet-20260101-121500
    """
    from monitor.report.folder import check_folder
    from monitor.report.inputs import find_runs

    try:
        import matplotlib  # noqa: F401 - looked for before anything is read, which may take a while
    except ImportError:
        raise ExtraMissing("drawing figures", "report") from None
    from monitor.report.plots import KINDS

    found = find_runs(runs)
    folder = out or new_run_folder(Path("runs"), "report")
    try:
        check_folder(folder, KINDS)
        answer = _write(folder, found)
    except OSError as error:
        raise BadFile(str(error.filename or folder), f"the report cannot be written: {error.strerror}") from None
    if json:
        print(jsonlib.dumps(answer))  # noqa: T201 - the answer of the command
    else:
        print(answer["page"])  # noqa: T201 - the same
    return 0


def _write(folder: Path, found: Any) -> dict[str, Any]:
    """Everything into the folder; returns what `--json` ends with."""
    from monitor.report.figures import figures_of
    from monitor.report.folder import DATA, FIGURES, PAGE, PERCENTILES, SUMMARY, make_room
    from monitor.report.page import Content, page
    from monitor.report.plots import KINDS, draw, picture
    from monitor.report.summary import summary, summary_table

    columns, rows = summary(found.runs)
    figures, absent = figures_of(found.runs)
    make_room(folder, KINDS)
    drawn = {}
    for figure in figures:
        print(f"drawing {figure.title}", file=sys.stderr)  # noqa: T201 - for a person
        canvas = draw(figure, [row.label for row in rows])
        pictures = {kind: picture(canvas, kind) for kind in KINDS}
        for kind, content in pictures.items():
            (folder / FIGURES / f"{figure.name}.{kind}").write_bytes(content)
        (folder / DATA / f"{figure.name}.csv").write_text(figure.table.csv())
        if figure.beside is not None:
            (folder / DATA / f"{figure.name}{PERCENTILES}.csv").write_text(figure.beside.csv())
        drawn[figure.name] = pictures["svg"].decode()
    numbers = summary_table(columns, rows)
    (folder / DATA / f"{SUMMARY}.csv").write_text(numbers.csv())
    when = time.strftime("%Y-%m-%d at %H:%M")
    told = Content(found.runs, columns, rows, figures, drawn, absent, found.left_out, when)
    style = files("monitor.report").joinpath("report.css").read_text()
    (folder / PAGE).write_text(page(told, style))
    return {
        "page": str(folder / PAGE),
        "runs": [_row(dict(zip(numbers.columns, row, strict=True))) for row in numbers.rows],
        "figures": [figure.name for figure in figures],
        "not_shown": {each.title: each.reason for each in absent},
        "left_out": list(found.left_out),
    }


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}
