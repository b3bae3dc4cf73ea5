"""The picture of a training run: how loss and accuracy went, where it had to go back, and where a step's time goes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy
from numpy.typing import NDArray

from sources.jsonl import write_atomic
from sources.training.history import CurvePoint, TrainingHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette, which the colour-blind can tell apart: https://jfly.uni-koeln.de/color/
_BLUE, _ORANGE, _SKY, _GREEN, _YELLOW = "#0072B2", "#D55E00", "#56B4E9", "#009E73", "#F0E442"
_GREY, _FAINT = "#555555", "#BBBBBB"
_SIZE_INCHES, _DPI = (12.0, 9.0), 100
# A smoothed line has the mean of so much of the whole run at each of its points.
_SMOOTHED_SHARE = 1 / 40
# Ways back that have room for their reason; more of them get their number only, and very many just their line.
_REASONED, _NUMBERED = 4, 24
# Evaluations that are drawn as large points.
_LARGE_POINTS = 40
_TICKS = [1, 2, 5, 10]

_Values = NDArray[numpy.float64]  # (N,), one for each point of a curve


def plot_learning_curves(history: TrainingHistory, path: Path, title: str) -> None:
    """Write a PNG picture of 1200 x 900 pixels; raise `ImportError` without matplotlib, `OSError` without room."""
    from matplotlib.figure import Figure  # not pyplot: that has one state for all threads, and looks for a screen

    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI)
    bars = _bars(history)
    below = 0.035 + 0.032 * min(max(len(bars), 1), 6)  # heights and places are shares of the figure's
    first, high, gap = below + 0.165, 0.895, 0.035
    tall = high - first
    if accurate := _has_accuracy(history):
        tall = (tall - gap) / 2
        accuracy = figure.add_axes((0.08, first, 0.77, tall))
        _draw_accuracy(accuracy, history)
    loss = figure.add_axes((0.08, high - tall, 0.77, tall))
    _draw_curve(loss, "loss", history.train_curve.plot_points, history.test_curve.plot_points, "{:.3f}")
    curves = [loss, accuracy] if accurate else [loss]
    for axes in curves:
        _draw_returns(axes, history, said=axes is loss)
        _draw_steps(axes, history, said=axes is curves[-1])
        _clean(axes, "y")
    _draw_epochs(loss, history)
    _draw_time(figure.add_axes((0.08, 0.05, 0.77, below)), history, bars)
    figure.text(0.08, 0.965, title, size=15, weight="bold", parse_math=False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomic(path, picture.getvalue())


def _draw_curve(axes: Axes, what: str, points: Sequence[CurvePoint], tests: Sequence[CurvePoint], form: str) -> None:
    """What each step had, thin; its course, thick; what the evaluations found; and the last of each in the legend."""
    axes.set_ylabel(what)
    if points:
        steps, values = _numbers(points, what)
        smooth = _smooth(values)
        axes.plot(steps, values, color=_SKY, linewidth=0.8, alpha=0.5)
        axes.plot(steps, smooth, color=_BLUE, linewidth=2, label=f"training {form.format(smooth[-1])}")
    if tests:
        steps, values = _numbers(tests, what)
        label = f"test {form.format(values[-1])}"
        size = 4.5 if len(tests) <= _LARGE_POINTS else 2.0
        axes.plot(steps, values, "o-", color=_ORANGE, markersize=size, linewidth=1.2, label=label, clip_on=False)
    if points or tests:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), frameon=False)


def _has_accuracy(history: TrainingHistory) -> bool:
    """Whether the loss is one that has an accuracy; a run of which there is nothing yet has room for it."""
    points = [*history.train_curve.points, *history.test_curve.points]
    return not points or any(point.accuracy is not None for point in points)


def _draw_accuracy(axes: Axes, history: TrainingHistory) -> None:
    points = [point for point in history.train_curve.plot_points if point.accuracy is not None]
    tests = [point for point in history.test_curve.plot_points if point.accuracy is not None]
    _draw_curve(axes, "accuracy", points, tests, "{:.1%}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value <= 1 else "")
    best, last = history.best_test, tests[-1].accuracy if tests else None
    if best is not None and best.accuracy is not None and last is not None and best.accuracy > last:
        said = f"best {best.accuracy:.1%}\nat step {best.step}"
        axes.text(1.055, 0.8, said, transform=axes.transAxes, color=_ORANGE, linespacing=1.5, va="top")


def _draw_returns(axes: Axes, history: TrainingHistory, *, said: bool) -> None:
    """A dashed line where training had to go back, and a grey band over the steps that were done again."""
    count = len(history.rollbacks)
    for number, found in enumerate(history.rollbacks):
        axes.axvspan(found.step, found.from_step, color=_FAINT, alpha=0.3, linewidth=0)
        axes.axvline(found.from_step, color=_GREY, linewidth=0.8, linestyle=(0, (4, 3)))
        if not said or count > _NUMBERED:
            continue
        text = f"back {found.from_step - found.step}"
        if count <= _REASONED and found.reason:
            text = f"{text} steps: {found.reason[:40]}"
        leftwards = found.from_step > 0.75 * history.max_step  # else it would run into the margin
        axes.annotate(
            text,
            (found.from_step, 0.98 - 0.08 * (number % 3)),  # neighbours do not write over each other
            xycoords=("data", "axes fraction"),
            xytext=(-4 if leftwards else 4, 0),
            textcoords="offset points",
            ha="right" if leftwards else "left",
            va="top",
            size=9,
            color=_GREY,
            parse_math=False,
        )


def _draw_steps(axes: Axes, history: TrainingHistory, *, said: bool) -> None:
    """One scale of steps for all curves, written at the last of them."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, max(history.max_step, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=_TICKS))
    axes.tick_params(labelbottom=said)
    if said:
        axes.set_xlabel("step")


def _draw_epochs(axes: Axes, history: TrainingHistory) -> None:
    """Where epochs end, above; nothing before the first has ended."""
    from matplotlib.ticker import MaxNLocator

    last = history.train_curve.last
    if not history.total_epochs or last is None or last.step * history.total_epochs < history.total_steps:
        return
    of_epoch = history.total_steps / history.total_epochs

    def to_epoch(step: Any) -> Any:
        return step / of_epoch

    def to_step(epoch: Any) -> Any:
        return epoch * of_epoch

    above = axes.secondary_xaxis("top", functions=(to_epoch, to_step))
    above.xaxis.set_major_locator(MaxNLocator(integer=True, steps=_TICKS))
    above.set_xlabel("epoch", color=_GREY)
    above.tick_params(colors=_GREY)
    above.spines["top"].set_color(_FAINT)


def _bars(history: TrainingHistory) -> dict[str, dict[str, float]]:
    """What the mean step had of each kind of time, in ms, for each stage and for the network."""
    stages, done = history.stage_totals, max(1, history.executed_steps)
    found = {}
    for name in stages.stage_names():
        kinds = {kind: sum(stages.total(name, key) for key in keys) / done for kind, (_, keys) in _KINDS.items()}
        # Compute that is neither forward nor backward is the optimizer's.
        kinds["update"] = max(0.0, kinds["update"] - kinds["forward"] - kinds["backward"])
        found[name] = kinds
    if history.idle_ms:
        found["idle"] = {"idle": history.idle_ms / done}
    return found


_KINDS = {
    "forward": (_BLUE, ("forward_ms",)),
    "backward": (_SKY, ("backward_ms",)),
    "update": (_GREEN, ("compute_ms",)),
    "encode, decode": (_YELLOW, ("encode_ms", "decode_ms")),
    "in the queue": (_FAINT, ("queue_ms",)),
    "idle": (_ORANGE, ()),
}


def _draw_time(axes: Axes, history: TrainingHistory, bars: dict[str, dict[str, float]]) -> None:
    axes.set_title("time of a step, mean in ms", loc="left", size=10)
    names = list(bars)
    left = numpy.zeros(len(bars))
    for kind, (color, _) in _KINDS.items():
        widths = numpy.array([bars[name].get(kind, 0.0) for name in names])
        if widths.max(initial=0.0) > 0:
            axes.barh(names, widths, left=left, color=color, height=0.66, label="" if kind == "idle" else kind)
            left += widths
    for row, width in enumerate(left):
        axes.text(width, row, f" {width:.0f}" if width >= 10 else f" {width:.1f}", va="center", size=9, color=_GREY)
    axes.invert_yaxis()
    if history.stage_totals.stage_names():
        axes.legend(loc="lower right", bbox_to_anchor=(1.01, 0.97), ncols=5, frameon=False, fontsize=9)
    _clean(axes, "x")


def _numbers(points: Sequence[CurvePoint], what: str) -> tuple[_Values, _Values]:
    steps, values = [point.step for point in points], [getattr(point, what) for point in points]
    return numpy.array(steps, dtype=float), numpy.array(values, dtype=float)


def _smooth(values: _Values) -> _Values:
    """The mean of each value and its neighbours, as many of them as there are."""
    reach = round(len(values) * _SMOOTHED_SHARE / 2) or min(1, len(values) // 8)
    sums = numpy.concatenate([numpy.zeros(1), numpy.cumsum(values)])
    places = numpy.arange(len(values))
    begin, end = numpy.maximum(places - reach, 0), numpy.minimum(places + reach + 1, len(values))
    smooth: _Values = (sums[end] - sums[begin]) / (end - begin)
    return smooth


def _clean(axes: Axes, grid: Literal["x", "y"]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#EEEEEE", linewidth=0.8)
    axes.set_axisbelow(True)
