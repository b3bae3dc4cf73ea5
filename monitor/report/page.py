"""The page of a report: one HTML file that asks nobody for anything. Pure; every name in it is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from monitor.report.about import provenance_html
from monitor.report.folder import GENERATOR_TAG
from monitor.report.plot_style import BACKGROUND, FOREGROUND, GRIDLINE, IDLE_FILL, LINE_STYLES, MUTED
from monitor.report.run import ReportRun
from monitor.report.summary import SummaryColumn, SummaryRow, ratio_to_baseline
from monitor.report.table import Cell, OmittedFigure, ReportFigure, downsample
from monitor.report.text import format_number

# Rows of a figure's numbers that stand on the page; the CSV file has all.
_ROWS = 200
# Within this of the baseline a ratio is called neither better nor worse.
_SAME = 0.02
_NAMED = 4  # runs in the title
_ID = re.compile(r'(\bid="|href="#|url\(#)')
_PREAMBLE = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"<metadata>.*?</metadata>", re.DOTALL)
_SIZE = re.compile(r'(<svg\b[^>]*?) width="[^"]*"')
_HEIGHT = re.compile(r'(<svg\b[^>]*?) height="[^"]*"')


@dataclass(frozen=True)
class PageContent:
    """All that stands on the page. `drawn`: each figure's SVG, by its name."""

    runs: Sequence[ReportRun]
    columns: Sequence[SummaryColumn]
    rows: Sequence[SummaryRow]
    figures: Sequence[ReportFigure]
    svgs: Mapping[str, str]
    omitted: Sequence[OmittedFigure]
    skipped: Sequence[str]
    created_at: str


def render_page(content: PageContent, style: str) -> str:
    """The whole file; `style` is its CSS."""
    title = "Report: " + _listed([row.label for row in content.rows])
    figures = "\n".join(_figure(figure, content.svgs[figure.name]) for figure in content.figures)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{GENERATOR_TAG}
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{_lead(content)}
</header>
<main>
<section class="summary">
<h2>In short</h2>
{_summary(content)}
</section>
<section>
<h2>Figures</h2>
<div class="figures">
{figures}
</div>
{_absent(content)}
</section>
<section>
<h2>What was run, on what</h2>
{provenance_html(content.runs)}
</section>
</main>
</body>
</html>
"""


def _listed(labels: Sequence[str]) -> str:
    """`a, b and c`; of many, how many more there are."""
    shown = list(labels) if len(labels) <= _NAMED else [*labels[: _NAMED - 1], f"{len(labels) - _NAMED + 1} more"]
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 else shown[0]


def _lead(content: PageContent) -> str:
    kind = content.runs[0].kind
    count = len(content.runs)
    pipelines = dict.fromkeys(name for run in content.runs for name in run.pipelines)
    said = [f"{count} {'run' if count == 1 else 'runs'} of {kind}; made on {content.created_at}."]
    if len(content.rows) > 1:
        said.append(f"The first, {content.rows[0].label}, is what the others are held against.")
    if len(pipelines) > 1:
        said.append(f"They are of different pipelines: {', '.join(pipelines)}.")
    found = f'<p class="lead">{escape(" ".join(said))}</p>'
    if content.skipped:
        found += f'\n<p class="note">Left out: {escape("; ".join(content.skipped))}.</p>'
    return found


def _summary(content: PageContent) -> str:
    head = "".join(f"<th>{escape(each.name)}{_unit(each.unit)}</th>" for each in content.columns)
    body = []
    for place, row in enumerate(content.rows):
        repeats = f'<span class="spread">{row.repeats} repeats</span>' if row.repeats > 1 else ""
        cells = "".join(_headline(row, content.rows[0] if place else None, each) for each in content.columns)
        body.append(f"<tr><th>{escape(row.label)}{repeats}</th>{cells}</tr>")
    note = ""
    if len(content.rows) > 1:
        note = '<p class="note">&times; is how many times that of the first row'
        note += "; repeats: the median, with the least and the most.</p>" if _repeated(content.rows) else ".</p>"
    elif _repeated(content.rows):
        note = '<p class="note">The median of the repeats, with the least and the most.</p>'
    rows = "\n".join(body)
    return f"""<div class="box" tabindex="0" role="region" aria-label="The headline numbers">
<table>
<thead><tr><th>run</th>{head}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
{note}
<p class="links"><a href="data/summary.csv">summary.csv</a></p>"""


def _repeated(rows: Iterable[SummaryRow]) -> bool:
    return any(row.repeats > 1 for row in rows)


def _unit(unit: str) -> str:
    return f' <span class="unit">{escape(unit)}</span>' if unit else ""


def _headline(row: SummaryRow, baseline: SummaryRow | None, column: SummaryColumn) -> str:
    value = row.values[column.name]
    if value is None:
        return '<td title="not measured">&ndash;</td>'
    found = format_number(value.median)
    if value.low is not None and value.high is not None and value.low != value.high:
        found += f'<span class="spread">{format_number(value.low)} to {format_number(value.high)}</span>'
    times = ratio_to_baseline(row, baseline, column.name) if baseline and column.better_direction else None
    if times is not None:
        gain = (times - 1) * column.better_direction
        verdict = " good" if gain > _SAME else " bad" if gain < -_SAME else ""
        found += f'<span class="ratio{verdict}">&times; {times:.2f}</span>'
    return f"<td>{found}</td>"


def _figure(figure: ReportFigure, svg: str) -> str:
    alt = f"{figure.title}. {figure.caption}"
    links = "".join(
        f'<a href="{folder}/{figure.name}.{end}">{end.upper()}</a>'
        for folder, end in (("figures", "svg"), ("figures", "pdf"), ("figures", "png"), ("data", "csv"))
    )
    return f"""<figure id="{figure.name}">
<figcaption><h3>{escape(figure.title)}</h3><p>{escape(figure.caption)}</p></figcaption>
{inline_svg(svg, figure.name, alt)}{_beside(figure)}
<details><summary>The numbers</summary>
{_numbers(figure)}
</details>
<p class="links">{links}</p>
</figure>"""


def _beside(figure: ReportFigure) -> str:
    if figure.percentiles is None:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in figure.percentiles.columns)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in figure.percentiles.rows)
    return f"""
<div class="box" tabindex="0" role="region" aria-label="{escape(figure.title)}: percentiles">
<table><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>"""


def inline_svg(svg: str, name: str, alt: str) -> str:
    """A drawn SVG as part of the page: as wide as there is room, in the page's own colours, its ids its own."""
    svg = _METADATA.sub("", _PREAMBLE.sub("", svg, count=1), count=1)
    svg = _HEIGHT.sub(r"\1", _SIZE.sub(r"\1", svg, count=1), count=1)
    svg = _ID.sub(lambda found: f"{found[1]}{name}-", svg)
    colours = {FOREGROUND: "ink", MUTED: "muted", GRIDLINE: "faint", BACKGROUND: "card", IDLE_FILL: "rest"}
    colours |= {style.colour: f"c{place}" for place, style in enumerate(LINE_STYLES)}
    for colour, variable in colours.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1).strip()


def _numbers(figure: ReportFigure) -> str:
    rows = downsample(figure.table.rows, _ROWS)
    columns = [place for place in range(len(figure.table.columns)) if any(row[place] is not None for row in rows)]
    head = "".join(f"<th>{escape(figure.table.columns[place])}</th>" for place in columns)
    body = "\n".join(f"<tr>{''.join(_cell(row[place]) for place in columns)}</tr>" for row in rows)
    more = len(figure.table.rows) - len(rows)
    note = f'<p class="note">{len(rows)} of {len(figure.table.rows)} rows; the CSV file has all.</p>' if more else ""
    return f"""<div class="box" tabindex="0" role="region" aria-label="{escape(figure.title)}: the numbers">
<table><thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody></table></div>{note}"""


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        return f'<td class="text">{escape(cell)}</td>'
    return f"<td>{'' if cell is None else f'{cell:.5g}'}</td>"


def _absent(content: PageContent) -> str:
    if not content.omitted:
        return ""
    by_reason: dict[str, list[str]] = {}
    for each in content.omitted:
        by_reason.setdefault(each.reason, []).append(each.title)
    said = "; ".join(f"{', '.join(titles)}, because {reason}" for reason, titles in by_reason.items())
    return f'<p class="note">Not shown: {escape(said)}.</p>'
