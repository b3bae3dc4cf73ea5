"""The page of a report: one self-contained HTML file, rendered from page.html.jinja."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from monitor.report.inputs import ReportInputs
from monitor.report.plot_style import BACKGROUND, FOREGROUND, GRIDLINE, IDLE_FILL, LINE_STYLES, MUTED
from monitor.report.summary import SummaryColumn, SummaryRow
from monitor.report.table import Cell, ReportFigure, format_number

# In the head of each page, by which an existing report is recognised.
GENERATOR = "sparse report"
# Rows of a figure's data on the page; its CSV file has all.
_MAX_ROWS = 200
# A metric within this of the baseline is neither better nor worse.
_EQUAL_WITHIN = 0.02
_MAX_TITLE_LABELS = 4
_GIB = 1 << 30
_SVG_PREAMBLE = re.compile(r"^.*?(?=<svg)|<metadata>.*?</metadata>", re.DOTALL)
_SVG_SIZE = re.compile(r'(?<=\s)(?:width|height)="[^"]*"\s*')
_SVG_ID = re.compile(r'(\bid="|href="#|url\(#)')


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


def render_page(content: PageContent) -> str:
    """The HTML of the page. All texts are escaped: the names of runs and pipelines come from other machines."""
    runs = content.inputs.runs
    labels = [row.label for row in content.rows]
    if len(labels) > _MAX_TITLE_LABELS:
        hidden = len(labels) - _MAX_TITLE_LABELS + 1
        labels = [*labels[: _MAX_TITLE_LABELS - 1], f"{hidden} more"]
    return _template().render(
        content=content,
        runs=runs,
        title=f"{', '.join(labels[:-1])} and {labels[-1]}" if len(labels) > 1 else labels[0],
        pipelines=sorted({pipeline for run in runs for pipeline in run.tag_values("pipeline")}),
        manifests=list({id(run.manifest): run.manifest for run in runs if run.manifest is not None}.values()),
        single_runs={
            run.name: "; ".join(f"{tag} {', '.join(run.tag_values(tag)) or 'unknown'}" for tag in ("pipeline", "node"))
            for run in runs
            if run.manifest is None
        },
        generator=GENERATOR,
        max_rows=_MAX_ROWS,
    )


@cache
def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(number=format_number, cell=_format_cell, text=_describe, inline=inline_svg)
    environment.globals.update(verdict=_verdict)
    return environment.get_template("page.html.jinja")


def _format_cell(cell: Cell) -> str:
    return cell if isinstance(cell, str) else "" if cell is None else f"{cell:.5g}"


def _verdict(ratio: float, column: SummaryColumn) -> str:
    """The CSS class of a metric that differs from the baseline."""
    gain = (ratio - 1) * column.better_direction
    return "good" if gain > _EQUAL_WITHIN else "bad" if gain < -_EQUAL_WITHIN else ""


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
    svg = _SVG_PREAMBLE.sub("", svg)
    opening, _, content = svg.partition(">")
    svg = f"{_SVG_SIZE.sub('', opening)}>{content}"
    svg = _SVG_ID.sub(lambda match: f"{match[1]}{name}-", svg)
    variables = {FOREGROUND: "ink", MUTED: "muted", GRIDLINE: "faint", BACKGROUND: "card", IDLE_FILL: "idle"}
    variables |= {style.colour: f"c{index}" for index, style in enumerate(LINE_STYLES)}
    for colour, variable in variables.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1).strip())
