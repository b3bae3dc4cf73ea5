"""The page of a report: one self-contained HTML file, rendered from page.html.jinja."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from monitor.bench.summary import SummaryColumn, SummaryRow
from monitor.report.inputs import ReportInputs
from monitor.report.plot_style import BACKGROUND, FOREGROUND, GRIDLINE, IDLE_FILL, LINE_STYLES, MUTED
from monitor.report.table import ReportFigure, format_number

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
