"""Plots a training run: loss and accuracy by step, rollbacks, and where the time of a step goes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from brokers.process.files import write_atomic
from brokers.process.plotting import default_style, import_matplotlib
from sources.training.run_stats import CurvePoint, TrainingRunStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette for colour-blind readers: https://jfly.uni-koeln.de/color/
_BLUE = "#0072B2"
_ORANGE = "#D55E00"
_SKY = "#56B4E9"
_GREEN = "#009E73"
_YELLOW = "#F0E442"
_GREY = "#555555"
_LIGHT_GREY = "#BBBBBB"
_SIZE_INCHES = (12.0, 9.0)
_DPI = 100
_STYLE: dict[Any, Any] = {  # matplotlib's settings
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#EEEEEE",
}
_SMOOTHING_SHARE = 1 / 40  # width of the moving mean, as a share of the run
# Rollbacks up to these numbers are labelled with their reason, or with the number of steps; more only have a line.
_MAX_REASONS = 4
_MAX_LABELS = 24
_MAX_LARGE_MARKERS = 40  # evaluations
_TICK_STEPS = [1, 2, 5, 10]

# Kinds of time: colour, and the keys of the stage totals that they consist of.
_TIME_KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "forward": (_BLUE, ("forward_ms",)),
    "backward": (_SKY, ("backward_ms",)),
    "update": (_GREEN, ("compute_ms",)),
    "encode, decode": (_YELLOW, ("encode_ms", "decode_ms")),
    "in the queue": (_LIGHT_GREY, ("queue_ms",)),
    "idle": (_ORANGE, ()),
}

_Values = NDArray[numpy.float64]  # (N,), one for each point of a curve


def plot_learning_curves(stats: TrainingRunStats, path: Path, title: str) -> None:
    """Write a PNG of 1200 x 900 pixels. Raises `ImportError` without matplotlib, `OSError`."""
    import_matplotlib()
    from matplotlib.figure import Figure  # not pyplot, which has global state and looks for a display

    times = _step_times(stats)
    names = ["loss", "accuracy"] if _has_accuracy(stats) else ["loss"]
    with default_style(_STYLE):
        figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI)
        figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.1)
        heights = [8 / len(names)] * len(names)
        *curves, bars = figure.subplots(len(names) + 1, height_ratios=[*heights, 1 + len(times) / 2])
        _plot_curve(curves[0], "loss", stats.train_curve.plot_points, stats.test_curve.plot_points, "{:.3f}")
        if len(curves) > 1:
            _plot_accuracy(curves[1], stats)
        for axes in curves:
            _plot_rollbacks(axes, stats, with_labels=axes is curves[0])
            _set_step_axis(axes, stats, with_labels=axes is curves[-1])
        _add_epoch_axis(curves[0], stats)
        _plot_times(bars, times)
        figure.suptitle(title, x=0.02, ha="left", size=15, weight="bold", parse_math=False)
        file = io.BytesIO()
        figure.savefig(file, format="png")
    write_atomic(path, file.getvalue())


def _plot_curve(axes: Axes, name: str, points: Sequence[CurvePoint], tests: Sequence[CurvePoint], form: str) -> None:
    """Plot the value of each step, their moving mean, and the evaluations; the legend has the last values."""
    axes.set_ylabel(name)
    if points:
        steps, values = _to_arrays(points, name)
        smooth = _moving_mean(values)
        axes.plot(steps, values, color=_SKY, linewidth=0.8, alpha=0.5)
        axes.plot(steps, smooth, color=_BLUE, linewidth=2, label=f"training {form.format(smooth[-1])}")
    if tests:
        steps, values = _to_arrays(tests, name)
        label = f"test {form.format(values[-1])}"
        size = 4.5 if len(tests) <= _MAX_LARGE_MARKERS else 2.0
        axes.plot(steps, values, "o-", color=_ORANGE, markersize=size, linewidth=1.2, label=label, clip_on=False)
    if points or tests:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), frameon=False)


def _has_accuracy(stats: TrainingRunStats) -> bool:
    """Whether the loss function has an accuracy; assumed before the first step."""
    points = [*stats.train_curve.points, *stats.test_curve.points]
    return not points or any(point.accuracy is not None for point in points)


def _plot_accuracy(axes: Axes, stats: TrainingRunStats) -> None:
    points = [point for point in stats.train_curve.plot_points if point.accuracy is not None]
    tests = [point for point in stats.test_curve.plot_points if point.accuracy is not None]
    _plot_curve(axes, "accuracy", points, tests, "{:.1%}")
    # No label above 100 %; the tick at 100 % may be 1.0000000000000002.
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value < 1.01 else "")
    best, last = stats.best_test, tests[-1].accuracy if tests else None
    if best is not None and best.accuracy is not None and last is not None and best.accuracy > last:
        text = f"best {best.accuracy:.1%}\nat step {best.step}"
        axes.text(1.055, 0.8, text, transform=axes.transAxes, color=_ORANGE, linespacing=1.5, va="top")


def _plot_rollbacks(axes: Axes, stats: TrainingRunStats, *, with_labels: bool) -> None:
    """A dashed line at each rollback, and a grey band over the steps that were repeated."""
    count = len(stats.rollbacks)
    for number, rollback in enumerate(stats.rollbacks):
        axes.axvspan(rollback.step, rollback.from_step, color=_LIGHT_GREY, alpha=0.3, linewidth=0)
        axes.axvline(rollback.from_step, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        if not with_labels or count > _MAX_LABELS:
            continue
        text = f"back {rollback.from_step - rollback.step}"
        if count <= _MAX_REASONS and rollback.reason:
            text = f"{text} steps: {rollback.reason[:40]}"
        to_the_left = rollback.from_step > 0.75 * stats.max_step  # else the text would run into the margin
        axes.annotate(
            text,
            (rollback.from_step, 0.98 - 0.08 * (number % 3)),  # neighbours must not overlap
            xycoords=("data", "axes fraction"),
            xytext=(-4 if to_the_left else 4, 0),
            textcoords="offset points",
            ha="right" if to_the_left else "left",
            va="top",
            size=9,
            color=_GREY,
            parse_math=False,
        )


def _set_step_axis(axes: Axes, stats: TrainingRunStats, *, with_labels: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, max(stats.max_step, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=_TICK_STEPS))
    axes.tick_params(labelbottom=with_labels)
    if with_labels:
        axes.set_xlabel("step")


def _add_epoch_axis(axes: Axes, stats: TrainingRunStats) -> None:
    """A second scale at the top, once the first epoch has ended."""
    from matplotlib.ticker import MaxNLocator

    last = stats.train_curve.last
    if not stats.total_epochs or last is None or last.step * stats.total_epochs < stats.total_steps:
        return
    steps_per_epoch = stats.total_steps / stats.total_epochs
    to_epoch_and_back = (lambda step: step / steps_per_epoch, lambda epoch: epoch * steps_per_epoch)
    epochs = axes.secondary_xaxis("top", functions=to_epoch_and_back)
    epochs.xaxis.set_major_locator(MaxNLocator(integer=True, steps=_TICK_STEPS))
    epochs.set_xlabel("epoch", color=_GREY)
    epochs.tick_params(colors=_GREY)
    epochs.spines["top"].set_color(_LIGHT_GREY)


def _step_times(stats: TrainingRunStats) -> dict[str, dict[str, float]]:
    """The mean times of a step in ms, by stage and kind; idle time, mostly the network's, has its own row."""
    totals, steps = stats.stage_totals, max(1, stats.executed_steps)
    times: dict[str, dict[str, float]] = {}
    for stage in totals.stage_names():
        kinds = {kind: sum(totals.total(stage, key) for key in keys) / steps for kind, (_, keys) in _TIME_KINDS.items()}
        kinds["update"] = max(0.0, kinds["update"] - kinds["forward"] - kinds["backward"])  # the rest of compute_ms
        times[stage] = kinds
    if stats.idle_ms:
        times["idle"] = {"idle": stats.idle_ms / steps}
    return times


def _plot_times(axes: Axes, times: dict[str, dict[str, float]]) -> None:
    axes.set_title("time of a step, mean in ms", loc="left", size=10)
    rows = list(times)
    left = numpy.zeros(len(rows))
    for kind, (color, _) in _TIME_KINDS.items():
        widths = numpy.array([times[row].get(kind, 0.0) for row in rows])
        if widths.max(initial=0.0) > 0:
            axes.barh(rows, widths, left=left, color=color, height=0.66, label="" if kind == "idle" else kind)
            left += widths
    for row, width in enumerate(left):
        axes.text(width, row, f" {width:.0f}" if width >= 10 else f" {width:.1f}", va="center", size=9, color=_GREY)
    axes.invert_yaxis()
    if set(rows) - {"idle"}:
        axes.legend(loc="lower right", bbox_to_anchor=(1.01, 0.97), ncols=5, frameon=False, fontsize=9)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")


def _to_arrays(points: Sequence[CurvePoint], name: str) -> tuple[_Values, _Values]:
    steps, values = [point.step for point in points], [getattr(point, name) for point in points]
    return numpy.array(steps, dtype=float), numpy.array(values, dtype=float)


def _moving_mean(values: _Values) -> _Values:
    """The mean of each value and its neighbours, fewer at the ends."""
    reach = round(len(values) * _SMOOTHING_SHARE / 2) or min(1, len(values) // 8)
    sums = numpy.concatenate([numpy.zeros(1), numpy.cumsum(values)])
    index = numpy.arange(len(values))
    begin, end = numpy.maximum(index - reach, 0), numpy.minimum(index + reach + 1, len(values))
    means: _Values = (sums[end] - sums[begin]) / (end - begin)
    return means
