"""Draws the tables of a report by matplotlib: lines with their spread, and stacked bars; as PNG, SVG and PDF."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from monitor.report.plot_style import (
    BACKGROUND,
    FIGURE_WIDTH_IN,
    FOREGROUND,
    GRIDLINE,
    LINE_STYLES,
    MUTED,
    PNG_DPI,
    RC_PARAMS,
    PartStyle,
    display_label,
    part_styles,
)
from monitor.report.table import TOTAL, DataTable, LinePlot, ReportFigure, StackedBars
from monitor.report.text import format_number

ImageFormat = Literal["png", "svg", "pdf"]
IMAGE_FORMATS: tuple[ImageFormat, ...] = ("svg", "pdf", "png")

# Panels of one figure; more would be too small to read, or too tall to look at.
MAX_PANELS = 6
# No moment in a file: the same figure gives the same bytes.
_TIMELESS: dict[ImageFormat, Any] = {"png": None, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
_LEGEND_CHARACTERS, _LEGEND_ROW_IN = 52, 0.19
_TICKED = 8  # values, each of which has its tick, where points are few
_ROOM = 0.08  # above the highest point, as a share of the axis
_MARKERS = 8  # on a line of many points, so that lines are told apart without colour
_WRITTEN: Any = {
    "ha": "center",
    "va": "bottom",
    "fontsize": 8,
    "color": MUTED,
    "bbox": {"facecolor": BACKGROUND, "linewidth": 0, "pad": 0.5},
}
# A stage's name is written above its part of a bar where there is room: a letter takes so much of the axis.
_LETTER_SHARE, _GAP_SHARE, _STAGE_CHARACTERS = 0.022, 0.04, 24


def draw_figure(figure: ReportFigure, names: Sequence[str]) -> Figure:
    """The figure; `names` are all the runs of the report, so that each has the same colour in every figure."""
    with _settings():
        if isinstance(figure.plot, StackedBars):
            return _draw_stacks(figure.table, figure.plot)
        return _draw_lines(figure.table, figure.plot, names)


def render_image(drawn: Figure, kind: ImageFormat) -> bytes:
    """As a file of this kind; the same figure gives the same bytes."""
    found = io.BytesIO()
    with _settings():
        drawn.savefig(found, format=kind, dpi=PNG_DPI, metadata=_TIMELESS[kind])
    return found.getvalue()


@contextmanager
def _settings() -> Iterator[None]:
    with mpl.rc_context(RC_PARAMS), warnings.catch_warnings():
        # A run's name may have letters that the font lacks: a box stands for them.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield


def _draw_lines(table: DataTable, shape: LinePlot, names: Sequence[str]) -> Figure:
    panels = table.distinct(shape.panel)[:MAX_PANELS] if shape.panel else [""]
    high = 3.0 if len(panels) == 1 else 0.7 + 1.6 * len(panels)
    drawn = Figure(figsize=(FIGURE_WIDTH_IN, high), layout="constrained")
    all_axes = drawn.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    own = table.distinct(shape.series)
    known = list(names) if set(own) <= set(names) else own
    keys: dict[str, Artist] = {}
    for axes, panel in zip(all_axes, panels, strict=True):
        axes.set_ylabel(shape.y_label)
        part = table.where(shape.panel, panel) if shape.panel else table
        for name in part.distinct(shape.series):
            keys[name] = _draw_line(axes, part.where(shape.series, name), shape, known.index(name))
        if shape.panel and shape.series == "run":
            axes.set_ylabel(display_label(panel))
        elif shape.panel:
            axes.set_title(display_label(panel), loc="left", fontsize=9.5, color=MUTED)
    # Only now: limits that were set do not grow with what is drawn later. Panels share their x axis.
    right = max(axes.dataLim.x1 for axes in all_axes)
    for axes in all_axes:
        _dress(axes, shape, right)
    if shape.markers and len(values := sorted(set(table.floats(shape.x)))) <= _TICKED:
        all_axes[-1].set_xticks(values, [f"{value:g}" for value in values])
    all_axes[-1].set_xlabel(shape.x_label)
    if len(keys) > 1 or len(names) > 1:
        _legend(drawn, list(keys.values()), list(keys))
    return drawn


def _draw_line(axes: Axes, part: DataTable, shape: LinePlot, place: int) -> Artist:
    style = LINE_STYLES[place % len(LINE_STYLES)]
    x, y = part.floats(shape.x), part.floats(shape.y)
    every = 1 if shape.markers else max(1, len(x) // _MARKERS)
    (line,) = axes.plot(
        x,
        y,
        color=style.colour,
        linestyle=style.linestyle,
        marker=style.marker,
        markevery=(0 if shape.markers else place * every // 4 % every, every),
        drawstyle="steps-post" if shape.stepped and shape.band_axis != "x" else "default",
    )
    if not shape.band_axis or all(cell is None for cell in part.column("low")):
        return line
    low, high = part.floats("low"), part.floats("high")
    if shape.markers:
        below, above = ([abs(a - b) if b == b else 0.0 for a, b in zip(y, bound, strict=True)] for bound in (low, high))
        axes.errorbar(x, y, yerr=[below, above], fmt="none", ecolor=style.colour, capsize=3, elinewidth=1)
    elif shape.band_axis == "x":
        axes.fill_betweenx(y, low, high, color=style.colour, alpha=0.18, linewidth=0)
    else:
        axes.fill_between(x, low, high, color=style.colour, alpha=0.18, linewidth=0)
    return line


def _dress(axes: Axes, shape: LinePlot, right: float) -> None:
    seen = axes.dataLim
    if shape.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_xlim(0, right * (1 + _ROOM / 2) or 1.0)
    if shape.y_is_fraction:
        axes.set_ylim(0, 1 + _ROOM / 2)
    else:
        axes.set_ylim(min(0.0, seen.y0 * (1 + _ROOM)), max(seen.y1 * (1 + _ROOM), 0.0) or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", color=GRIDLINE, linewidth=0.7)


def _draw_stacks(table: DataTable, shape: StackedBars) -> Figure:
    bars = table.distinct(shape.bar)
    drawn = Figure(
        figsize=(FIGURE_WIDTH_IN, 1.35 + (0.58 if shape.group_by else 0.42) * len(bars)), layout="constrained"
    )
    axes = drawn.subplots()
    parts, wholes = table.where_not(shape.part, TOTAL), table.where(shape.part, TOTAL)
    colours = part_styles(parts.distinct(shape.part))
    ends = [_reaches(table.where(shape.bar, bar), shape) for bar in bars]
    widest = max(ends) or 1.0
    for place, (bar, edge) in enumerate(zip(bars, ends, strict=True)):
        part, whole = parts.where(shape.bar, bar), wholes.where(shape.bar, bar)
        _draw_bar(axes, place, part, shape, colours)
        (total,) = whole.floats(shape.value)
        _draw_bounds(axes, place, whole, total)
        axes.annotate(
            format_number(total),
            (edge, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=FOREGROUND,
        )
        if shape.group_by:
            _write_stages(axes, place, part, shape, widest)
    axes.set_yticks(range(len(bars)), [display_label(bar) for bar in bars])
    axes.set_ylim(len(bars) - 0.5, -0.62)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel(shape.label)
    axes.grid(axis="x", color=GRIDLINE, linewidth=0.7)
    handles = [
        Patch(facecolor=look.colour, hatch=look.hatch, edgecolor=BACKGROUND, linewidth=0) for look in colours.values()
    ]
    _legend(drawn, list(handles), list(colours))
    return drawn


def _reaches(part: DataTable, shape: StackedBars) -> float:
    """Where a bar ends, and what says how far its repeats spread."""
    drawn = sum(part.where_not(shape.part, TOTAL).floats(shape.value))
    return max([drawn, *(value for value in part.floats("high") if value == value)])


def _draw_bar(axes: Axes, place: int, part: DataTable, shape: StackedBars, colours: Mapping[str, PartStyle]) -> None:
    """One bar, part by part."""
    end = 0.0
    for name, value in zip(part.column(shape.part), part.floats(shape.value), strict=True):
        look = colours[str(name)]
        axes.barh(
            place, value, left=end, height=0.5, color=look.colour, hatch=look.hatch, edgecolor=BACKGROUND, linewidth=0.6
        )
        end += value


def _draw_bounds(axes: Axes, place: int, whole: DataTable, total: float) -> None:
    low, high = whole.floats("low")[0], whole.floats("high")[0]
    if low == low and high == high:  # not NaN: there are repeats
        bounds = [[max(0.0, total - low)], [max(0.0, high - total)]]
        axes.errorbar([total], [place], xerr=bounds, fmt="none", ecolor=FOREGROUND, capsize=3, elinewidth=1)


def _write_stages(axes: Axes, place: int, part: DataTable, shape: StackedBars, widest: float) -> None:
    """The name of each stage above what it took, with a rule as wide as that."""
    begin = 0.0
    for stage in part.distinct(shape.group_by):
        width = sum(part.where(shape.group_by, stage).floats(shape.value))
        text = display_label(stage, _STAGE_CHARACTERS)
        if stage and width > (_LETTER_SHARE * len(text) + _GAP_SHARE) * widest:
            axes.plot([begin, begin + width], [place - 0.31] * 2, color=MUTED, linewidth=0.8, solid_capstyle="butt")
            axes.text(begin + width / 2, place - 0.34, text, **_WRITTEN)
        begin += width


def _legend(drawn: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    labels = [display_label(name) for name in names]
    columns = max(1, min(len(labels), _LEGEND_CHARACTERS // (max(len(label) for label in labels) + 6)))
    drawn.set_figheight(drawn.get_figheight() + _LEGEND_ROW_IN * (-(-len(labels) // columns) - 1))
    # matplotlib fills column after column; a reader goes line by line.
    order = [place for column in range(columns) for place in range(column, len(labels), columns)]
    handles, labels = [handles[place] for place in order], [labels[place] for place in order]
    drawn.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, fontsize=9, handlelength=2.6)
