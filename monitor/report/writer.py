"""The folder of a report: its page, its figures as images, and their data as CSV files.

The page is one self-contained HTML file, rendered from page.html.jinja.
"""

import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from brokers.errors import describe_error
from monitor.bench.results import SummaryColumn, SummaryRow, summarize
from monitor.errors import bad_folder
from monitor.report import resource_figures, workload_figures
from monitor.report.inputs import ReportInputs
from monitor.report.plots import (
    BACKGROUND,
    FOREGROUND,
    GRIDLINE,
    IDLE_FILL,
    IMAGE_FORMATS,
    LINE_STYLES,
    MUTED,
    draw_figure,
    render_image,
)
from monitor.report.run import ReportRun, group_runs
from monitor.report.table import Cell, DataTable, ReportFigure, Row, format_number

log = logging.getLogger(__name__)

PAGE_FILE, FIGURES_FOLDER, DATA_FOLDER = "index.html", "figures", "data"
PERCENTILES_SUFFIX, SUMMARY_NAME = "-percentiles", "summary"
# The generator of a page is within its first characters.
_HEAD_CHARACTERS = 1000
# The builders of the figures by the names of their files.
_GENERAL: Mapping[str, Callable[[Sequence[ReportRun]], ReportFigure]] = {
    "completion": workload_figures.completion,
    "where": workload_figures.stage_time,
    "latency": workload_figures.latency,
    "network": resource_figures.network,
    "network-cdf": resource_figures.network_distribution,
    "link-bytes": resource_figures.link_bytes,
    "gpu": resource_figures.gpu,
    "cpu": resource_figures.cpu,
    "energy": resource_figures.energy,
    "cpu-seconds": resource_figures.cpu_seconds,
    "sweep": workload_figures.sweep,
}
_TRAINING: Mapping[str, Callable[[Sequence[ReportRun]], ReportFigure]] = {
    "learning-step": partial(workload_figures.learning, x="step"),
    "learning-time": partial(workload_figures.learning, x="time_s"),
}
# All figures that a report may have, so that a new report can remove those of an old one in its folder.
FIGURE_NAMES = (*_GENERAL, *_TRAINING)
# In the head of each page, by which an existing report is recognised.
GENERATOR = "sparse report"
_MAX_TITLE_LABELS = 4
_GIB = 1 << 30
_SVG_PREAMBLE = re.compile(r"^.*?(?=<svg)|<metadata>.*?</metadata>", re.DOTALL)
_SVG_SIZE = re.compile(r'(?<=\s)(?:width|height)="[^"]*"\s*')
_SVG_ID = re.compile(r'(\bid="|href="#|url\(#)')
# The page's variables for the colours of plots; their values depend on the reader's colour scheme.
_COLOUR_VARIABLES = {
    FOREGROUND: "ink",
    MUTED: "muted",
    GRIDLINE: "faint",
    BACKGROUND: "card",
    IDLE_FILL: "idle",
    **{style.colour: f"c{index}" for index, style in enumerate(LINE_STYLES)},
}


def build_figures(runs: Sequence[ReportRun]) -> tuple[list[ReportFigure], list[ReportFigure]]:
    """The figures that have data, and those that have none; all runs are of one kind."""
    builders = {**_GENERAL, **_TRAINING} if runs[0].is_training else _GENERAL
    figures = [replace(build(runs), name=name) for name, build in builders.items()]
    return [figure for figure in figures if figure.table], [figure for figure in figures if not figure.table]


def write_report(folder: Path, inputs: ReportInputs, on_figure: Callable[[str], None]) -> dict[str, Any]:
    """Write a report; returns its headline metrics, with what it shows and omits. `on_figure` reports progress.

    A folder that exists must be empty or hold a report, which is replaced. Raises `UsageError` ("BadFolder").
    """
    try:
        _check_folder(folder)
        return _write(folder, inputs, on_figure)
    except OSError as error:
        raise bad_folder(error.filename or folder, f"the report cannot be written: {error.strerror}") from None


def _write(folder: Path, inputs: ReportInputs, on_figure: Callable[[str], None]) -> dict[str, Any]:
    groups = group_runs(inputs.runs)
    columns, rows = summarize({label: [run.metrics for run in repeats] for label, repeats in groups.items()})
    summary = summary_table(columns, rows)
    figures, omitted = build_figures(inputs.runs)
    for path in _report_files(folder) - {folder / PAGE_FILE}:
        path.unlink(missing_ok=True)
    images, data = folder / FIGURES_FOLDER, folder / DATA_FOLDER
    images.mkdir(parents=True, exist_ok=True)
    data.mkdir(parents=True, exist_ok=True)
    (data / f"{SUMMARY_NAME}.csv").write_text(summary.to_csv())
    plotted: list[ReportFigure] = []
    for figure in figures:
        on_figure(figure.title)
        try:
            drawing = draw_figure(figure, [row.label for row in rows])
            files = {kind: render_image(drawing, kind) for kind in IMAGE_FORMATS}
        except Exception as error:  # noqa: BLE001 - the other figures are as good without this one
            reason = f"could not be plotted: {describe_error(error)}"
            log.warning("figure %r %s", figure.title, reason)
            omitted.append(replace(figure, missing_reason=reason))
            continue
        plotted.append(figure)
        for kind, content in files.items():
            (images / f"{figure.name}.{kind}").write_bytes(content)
        (data / f"{figure.name}.csv").write_text(figure.table.to_csv())
        if figure.percentiles is not None:
            (data / f"{figure.name}{PERCENTILES_SUFFIX}.csv").write_text(figure.percentiles.to_csv())
    svgs = {figure.name: (images / f"{figure.name}.svg").read_text() for figure in plotted}
    page = render_page(PageContent(inputs, columns, rows, plotted, svgs, omitted, time.strftime("%Y-%m-%d, %H:%M")))
    (folder / PAGE_FILE).write_text(page)
    cells = [dict(zip(summary.columns, row, strict=True)) for row in summary.rows]
    return {
        "page": str(folder / PAGE_FILE),
        "runs": [{name: cell for name, cell in row.items() if cell is not None} for row in cells],
        "figures": [figure.name for figure in plotted],
        "omitted": {figure.title: figure.missing_reason for figure in omitted},
        "skipped": inputs.skipped,
    }


def summary_table(columns: Sequence[SummaryColumn], rows: Sequence[SummaryRow]) -> DataTable:
    """For each metric its median, and its ratio to the first row."""
    table_rows: list[Row] = []
    for row in rows:
        cells: list[Cell] = [row.label, row.repeats]
        for column in columns:
            spread = row.values[column.name]
            cells += [spread.median if spread else None, row.ratio_to(rows[0], column.name)]
        table_rows.append(tuple(cells))
    names = [f"{column.name} ({column.unit})" if column.unit else column.name for column in columns]
    headings = [heading for name in names for heading in (name, f"{name} ratio")]
    return DataTable(("run", "repeats", *headings), tuple(table_rows))


def _check_folder(folder: Path) -> None:
    """Raise `UsageError` for a folder with any file that is not part of a report."""
    page = folder / PAGE_FILE
    folders = {folder, folder / FIGURES_FOLDER, folder / DATA_FOLDER}
    # Not recursive: the user may name a folder with a whole disk below it.
    entries = {entry for each in folders if each.is_dir() for entry in each.iterdir()}
    if not entries:
        return
    generator = f'<meta name="generator" content="{GENERATOR}">'
    is_report = page.is_file() and generator in page.read_text(errors="replace")[:_HEAD_CHARACTERS]
    if not is_report or not entries <= folders | _report_files(folder):
        raise bad_folder(folder, "it holds other files than a report: name another folder, or an empty one")


def _report_files(folder: Path) -> set[Path]:
    """All files that a report may have."""
    images = {folder / FIGURES_FOLDER / f"{name}.{kind}" for name in FIGURE_NAMES for kind in IMAGE_FORMATS}
    tables = (*FIGURE_NAMES, *(f"{name}{PERCENTILES_SUFFIX}" for name in FIGURE_NAMES), SUMMARY_NAME)
    return {folder / PAGE_FILE, *images, *(folder / DATA_FOLDER / f"{name}.csv" for name in tables)}


@dataclass(frozen=True)
class PageContent:
    """Everything on the page; `svgs` are the plots by the names of their figures."""

    inputs: ReportInputs
    columns: Sequence[SummaryColumn]
    rows: Sequence[SummaryRow]
    figures: Sequence[ReportFigure]
    svgs: Mapping[str, str]
    omitted: Sequence[ReportFigure]
    created_at: str

    @property
    def title(self) -> str:
        """The labels of the runs; of many runs, only the first ones."""
        labels = [row.label for row in self.rows]
        if len(labels) > _MAX_TITLE_LABELS:
            labels[_MAX_TITLE_LABELS - 1 :] = [f"{len(labels) - _MAX_TITLE_LABELS + 1} more"]
        return f"{', '.join(labels[:-1])} and {labels[-1]}" if len(labels) > 1 else labels[0]

    @property
    def pipelines(self) -> list[str]:
        return sorted({pipeline for run in self.inputs.runs for pipeline in run.tag_values("pipeline")})


def render_page(content: PageContent) -> str:
    """The HTML of the page. All texts are escaped: the names of runs and pipelines come from other machines."""
    runs = content.inputs.runs
    manifests = {id(run.manifest): run.manifest for run in runs if run.manifest is not None}  # each once
    return _template().render(content=content, runs=runs, manifests=list(manifests.values()), generator=GENERATOR)


@cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=format_number, text=_describe, inline=inline_svg)
    return environment.get_template("page.html.jinja")


def _describe(value: Any) -> str:
    """A JSON value as one line of text."""
    if isinstance(value, Mapping):
        items = {name: each for name, each in value.items() if each not in (None, "", {}, [])}
        return ", ".join(
            f"memory {each / _GIB:.1f} GiB" if name == "memory_bytes" else f"{name.replace('_', ' ')} {_describe(each)}"
            for name, each in items.items()
        )
    if isinstance(value, list | tuple):
        return "; ".join(_describe(each) for each in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "unknown" if value is None else str(value)


def inline_svg(svg: str, name: str, alt: str) -> Markup:
    """A plot as an element of the page: as wide as its parent, in the page's colours, with unique ids."""
    opening, _, content = _SVG_PREAMBLE.sub("", svg).partition(">")
    svg = f"{_SVG_SIZE.sub('', opening)}>{content}"
    svg = _SVG_ID.sub(lambda match: f"{match[1]}{name}-", svg)
    for colour, variable in _COLOUR_VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1).strip())
