"""Plots of a report's tables by matplotlib, as SVG, PDF and PNG.

Colours are told apart by colour-blind readers; dashes, markers and hatches by those of grey prints.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from brokers.process.plotting import default_style
from monitor.report.table import TOTAL, DataTable, LinePlot, ReportFigure, StackedBars, format_number

# The width of a phone, or of half a desktop page; scaled to three quarters, that of a column of a paper.
_FIGURE_WIDTH_IN, _PNG_DPI = 4.7, 200
# Not quite black, white and grey: the page replaces these in the SVG by its own colours, which a dark screen inverts.
FOREGROUND, MUTED, GRIDLINE, BACKGROUND = "#1f2328", "#57606b", "#e3e6ea", "#fffffe"
IDLE_FILL = "#d0d5db"
_LABEL_CHARACTERS = 34
ImageFormat = Literal["png", "svg", "pdf"]
IMAGE_FORMATS: tuple[ImageFormat, ...] = ("svg", "pdf", "png")

# Panels per figure; more would be too small to read.
MAX_PANELS = 6
# Without a date in its metadata the same figure gives the same file.
_METADATA: dict[ImageFormat, Any] = {"png": None, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
_LEGEND_CHARACTERS, _LEGEND_ROW_IN = 52, 0.19
_MAX_TICKS = 8  # up to this many marked points, each has its own tick
_MARGIN = 0.08  # above the highest point, as a share of the axis
_MARKERS_PER_LINE = 8  # so that lines can be told apart without colour
# The name of a stage is written above its part of a bar where it fits; shares of the width of the axis.
_LETTER_SHARE, _GAP_SHARE, _STAGE_CHARACTERS = 0.022, 0.04, 24


class _LineStyle(NamedTuple):
    """The style of one run in all figures."""

    colour: str
    linestyle: Any
    marker: str


class _PartStyle(NamedTuple):
    """The style of one part of a stacked bar."""

    colour: str
    hatch: str


# The palette of Okabe and Ito, https://jfly.uni-koeln.de/color/, without its yellow, which is too faint for a line.
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
ORANGE, SKY, GREY = "#e69f00", "#56b4e9", "#7f7f7f"

LINE_STYLES = (
    _LineStyle(BLUE, "-", "o"),
    _LineStyle(VERMILION, (0, (5, 1.6)), "s"),
    _LineStyle(GREEN, (0, (1.4, 1.2)), "^"),
    _LineStyle(PURPLE, (0, (6, 1.5, 1.2, 1.5)), "D"),
    _LineStyle(ORANGE, (0, (3, 1, 1, 1, 1, 1)), "v"),
    _LineStyle(SKY, (0, (8, 2)), "P"),
    _LineStyle(GREY, (0, (2, 1)), "X"),
)
_PART_STYLES = {
    "queue": _PartStyle(SKY, ""),
    "decode": _PartStyle(ORANGE, "//"),
    "compute": _PartStyle(BLUE, ""),
    "encode": _PartStyle(PURPLE, "\\\\"),
    "network": _PartStyle(VERMILION, "...."),
    "forward": _PartStyle(BLUE, ""),
    "backward": _PartStyle(SKY, "//"),
    "update": _PartStyle(GREEN, "...."),
    "idle": _PartStyle(IDLE_FILL, ""),
}
_OTHER_PART_STYLES = (
    _PartStyle(BLUE, ""),
    _PartStyle(ORANGE, "//"),
    _PartStyle(GREEN, "\\\\"),
    _PartStyle(VERMILION, "...."),
    _PartStyle(SKY, ""),
    _PartStyle(PURPLE, "xx"),
    _PartStyle(GREY, "--"),
)

# matplotlib's settings: those that do not depend on the colours above are in the style sheet.
_STYLE_SHEET = Path(__file__).with_name("plots.mplstyle")
_COLOUR_SETTINGS: Any = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": FOREGROUND,
    "figure.facecolor": BACKGROUND,
    "hatch.color": BACKGROUND,
    "legend.labelcolor": FOREGROUND,
    "text.color": FOREGROUND,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def draw_figure(figure: ReportFigure, run_labels: Sequence[str]) -> Figure:
    """Plot a figure; `run_labels` are all runs of the report, which gives each the same colour in every figure."""
    with _settings():
        if isinstance(figure.plot, StackedBars):
            return _draw_bars(figure.table, figure.plot)
        return _draw_lines(figure.table, figure.plot, run_labels)


def render_image(drawing: Figure, kind: ImageFormat) -> bytes:
    """The content of an image file; the same figure gives the same bytes."""
    file = io.BytesIO()
    with _settings():
        drawing.savefig(file, format=kind, dpi=_PNG_DPI, metadata=_METADATA[kind])
    return file.getvalue()


@contextmanager
def _settings() -> Iterator[None]:
    with default_style(_STYLE_SHEET, _COLOUR_SETTINGS), warnings.catch_warnings():
        # Letters that the font lacks, in the name of a run, are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        yield


def _draw_lines(table: DataTable, plot: LinePlot, run_labels: Sequence[str]) -> Figure:
    panels = table.distinct(plot.panel)[:MAX_PANELS] if plot.panel else [""]
    height = 3.0 if len(panels) == 1 else 0.7 + 1.6 * len(panels)
    drawing = Figure(figsize=(_FIGURE_WIDTH_IN, height), layout="constrained")
    all_axes = drawing.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    names = table.distinct(plot.series)
    styled = list(run_labels) if set(names) <= set(run_labels) else names
    lines: dict[str, Artist] = {}
    for axes, panel in zip(all_axes, panels, strict=True):
        axes.set_ylabel(plot.y_label)
        rows = table.where(plot.panel, panel) if plot.panel else table
        for name in rows.distinct(plot.series):
            lines[name] = _draw_line(axes, rows.where(plot.series, name), plot, styled.index(name))
        if plot.panel and plot.series == "run":
            axes.set_ylabel(_display_label(panel))
        elif plot.panel:
            axes.set_title(_display_label(panel), loc="left", fontsize=9.5, color=MUTED)
    # After all lines of all panels, which share the x axis: fixed limits do not follow the data.
    right = max(axes.dataLim.x1 for axes in all_axes)
    for axes in all_axes:
        _set_limits(axes, plot, right)
        axes.grid(axis="y", color=GRIDLINE, linewidth=0.7)
    if plot.markers and len(values := sorted(set(table.floats(plot.x)))) <= _MAX_TICKS:
        all_axes[-1].set_xticks(values, [f"{value:g}" for value in values])
    all_axes[-1].set_xlabel(plot.x_label)
    if len(lines) > 1 or len(run_labels) > 1:
        _draw_legend(drawing, list(lines.values()), list(lines))
    return drawing


def _draw_line(axes: Axes, rows: DataTable, plot: LinePlot, index: int) -> Artist:
    style = LINE_STYLES[index % len(LINE_STYLES)]
    x, y = rows.floats(plot.x), rows.floats(plot.y)
    every = 1 if plot.markers else max(1, len(x) // _MARKERS_PER_LINE)
    (line,) = axes.plot(
        x,
        y,
        color=style.colour,
        linestyle=style.linestyle,
        marker=style.marker,
        markevery=(0 if plot.markers else index * every // 4 % every, every),  # markers of lines do not coincide
        drawstyle="steps-post" if plot.stepped and plot.band_axis != "x" else "default",
    )
    if not plot.band_axis or all(cell is None for cell in rows.column("low")):
        return line
    low, high = rows.floats("low"), rows.floats("high")
    if plot.markers:
        axes.errorbar(x, y, yerr=_error_bars(y, low, high), fmt="none", ecolor=style.colour, elinewidth=1)
    elif plot.band_axis == "x":
        axes.fill_betweenx(y, low, high, color=style.colour, alpha=0.18, linewidth=0)
    else:
        axes.fill_between(x, low, high, color=style.colour, alpha=0.18, linewidth=0)
    return line


def _error_bars(values: Sequence[float], low: Sequence[float], high: Sequence[float]) -> np.ndarray:
    """The lengths below and above each value; matplotlib draws none where they are NaN."""
    return np.maximum(0.0, [np.subtract(values, low), np.subtract(high, values)])


def _set_limits(axes: Axes, plot: LinePlot, right: float) -> None:
    if plot.log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_xlim(0, right * (1 + _MARGIN / 2) or 1.0)
    if plot.y_is_fraction:
        axes.set_ylim(0, 1 + _MARGIN / 2)
    else:
        low, high = axes.dataLim.y0, axes.dataLim.y1
        axes.set_ylim(min(0.0, low * (1 + _MARGIN)), max(high * (1 + _MARGIN), 0.0) or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(5))


def _draw_bars(table: DataTable, plot: StackedBars) -> Figure:
    bars = table.distinct(plot.bar)
    height = 1.35 + (0.58 if plot.group_by else 0.42) * len(bars)
    drawing = Figure(figsize=(_FIGURE_WIDTH_IN, height), layout="constrained")
    axes = drawing.subplots()
    parts, totals = table.where(plot.part, TOTAL, differs=True), table.where(plot.part, TOTAL)
    styles = _part_styles(parts.distinct(plot.part))
    values, low, high = totals.floats(plot.value), totals.floats("low"), totals.floats("high")
    # Where each bar or its error bar ends; a bound that is not known is NaN, which fmax ignores.
    ends = np.fmax([sum(parts.where(plot.bar, bar).floats(plot.value)) for bar in bars], high)
    for index, bar in enumerate(bars):
        rows = parts.where(plot.bar, bar)
        left = 0.0
        for name, value in zip(rows.column(plot.part), rows.floats(plot.value), strict=True):
            colour, hatch = styles[str(name)]
            axes.barh(index, value, 0.5, left, color=colour, hatch=hatch, edgecolor=BACKGROUND, linewidth=0.6)
            left += value
        text, end = format_number(values[index]), (ends[index], index)
        axes.annotate(text, end, xytext=(5, 0), textcoords="offset points", va="center", color=FOREGROUND)
        if plot.group_by:
            _write_stages(axes, index, rows, plot, max(ends) or 1.0)
    bounds = _error_bars(values, low, high)
    axes.errorbar(values, range(len(bars)), xerr=bounds, fmt="none", ecolor=FOREGROUND, elinewidth=1)
    axes.set_yticks(range(len(bars)), [_display_label(bar) for bar in bars])
    axes.set_ylim(len(bars) - 0.5, -0.62)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.1)
    axes.set_xlim(left=0)
    axes.set_xlabel(plot.label)
    axes.grid(axis="x", color=GRIDLINE, linewidth=0.7)
    patches = [
        Patch(facecolor=style.colour, hatch=style.hatch, edgecolor=BACKGROUND, linewidth=0) for style in styles.values()
    ]
    _draw_legend(drawing, patches, list(styles))
    return drawing


def _write_stages(axes: Axes, index: int, rows: DataTable, plot: StackedBars, width: float) -> None:
    """The name of each stage above its parts of a bar, underlined over their length; `width` is that of the axis."""
    box = {"facecolor": BACKGROUND, "linewidth": 0, "pad": 0.5}
    left = 0.0
    for stage in rows.distinct(plot.group_by):
        length = sum(rows.where(plot.group_by, stage).floats(plot.value))
        text = _display_label(stage, _STAGE_CHARACTERS)
        if stage and length > (_LETTER_SHARE * len(text) + _GAP_SHARE) * width:
            axes.plot([left, left + length], [index - 0.31] * 2, color=MUTED, linewidth=0.8, solid_capstyle="butt")
            axes.text(
                left + length / 2, index - 0.34, text, ha="center", va="bottom", fontsize=8, color=MUTED, bbox=box
            )
        left += length


def _draw_legend(drawing: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    labels = [_display_label(name) for name in names]
    columns = max(1, min(len(labels), _LEGEND_CHARACTERS // (max(len(label) for label in labels) + 6)))
    drawing.set_figheight(drawing.get_figheight() + _LEGEND_ROW_IN * (-(-len(labels) // columns) - 1))
    # matplotlib fills a legend column by column; readers expect it row by row.
    order = [index for column in range(columns) for index in range(column, len(labels), columns)]
    handles, labels = [handles[index] for index in order], [labels[index] for index in order]
    drawing.legend(handles, labels, loc="outside upper left", ncols=columns)


def _part_styles(names: Sequence[str]) -> dict[str, _PartStyle]:
    """A style per part of a bar."""
    unused = iter(range(len(names)))
    return {
        name: _PART_STYLES.get(name) or _OTHER_PART_STYLES[next(unused) % len(_OTHER_PART_STYLES)] for name in names
    }


def _display_label(name: str, characters: int = _LABEL_CHARACTERS) -> str:
    """A name as printable text on one line of at most `characters`."""
    text = " ".join("".join(letter if letter.isprintable() else "?" for letter in name).split()) or "(no name)"
    text = text if len(text) <= characters else f"{text[: characters - 1]}…"
    # matplotlib omits labels with a leading underscore from a legend.
    return f" {text}" if text.startswith("_") else text
