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

from brokers.errors import BadFile
from brokers.process.files import new_run_folder
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
    from monitor.report.inputs import load_runs

    try:
        import matplotlib  # noqa: F401 - looked for before anything is read, which may take a while
    except ImportError:
        raise ExtraMissing("drawing figures", "report") from None
    from monitor.report.plots import IMAGE_FORMATS

    found = load_runs(runs)
    folder = out or new_run_folder(Path("runs"), "report")
    try:
        check_folder(folder, IMAGE_FORMATS)
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
    from monitor.report.figures import build_figures
    from monitor.report.folder import (
        DATA_FOLDER,
        FIGURES_FOLDER,
        PAGE_FILE,
        PERCENTILES_SUFFIX,
        SUMMARY_NAME,
        prepare_folder,
    )
    from monitor.report.page import PageContent, render_page
    from monitor.report.plots import IMAGE_FORMATS, draw_figure, render_image
    from monitor.report.summary import summarize, summary_table

    columns, rows = summarize(found.runs)
    figures, absent = build_figures(found.runs)
    prepare_folder(folder, IMAGE_FORMATS)
    drawn = {}
    for figure in figures:
        print(f"drawing {figure.title}", file=sys.stderr)  # noqa: T201 - for a person
        canvas = draw_figure(figure, [row.label for row in rows])
        pictures = {kind: render_image(canvas, kind) for kind in IMAGE_FORMATS}
        for kind, content in pictures.items():
            (folder / FIGURES_FOLDER / f"{figure.name}.{kind}").write_bytes(content)
        (folder / DATA_FOLDER / f"{figure.name}.csv").write_text(figure.table.to_csv())
        if figure.percentiles is not None:
            (folder / DATA_FOLDER / f"{figure.name}{PERCENTILES_SUFFIX}.csv").write_text(figure.percentiles.to_csv())
        drawn[figure.name] = pictures["svg"].decode()
    numbers = summary_table(columns, rows)
    (folder / DATA_FOLDER / f"{SUMMARY_NAME}.csv").write_text(numbers.to_csv())
    when = time.strftime("%Y-%m-%d at %H:%M")
    told = PageContent(found.runs, columns, rows, figures, drawn, absent, found.left_out, when)
    style = files("monitor.report").joinpath("report.css").read_text()
    (folder / PAGE_FILE).write_text(render_page(told, style))
    return {
        "page": str(folder / PAGE_FILE),
        "runs": [_row(dict(zip(numbers.columns, row, strict=True))) for row in numbers.rows],
        "figures": [figure.name for figure in figures],
        "not_shown": {each.title: each.reason for each in absent},
        "left_out": list(found.left_out),
    }


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}
