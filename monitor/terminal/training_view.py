"""The live view of a pipeline that trains: how far it is, how long it will take, how loss and accuracy go."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from brokers.config.pipeline_file import Pipeline
from monitor.presence.inference_stats import sanitize_text
from monitor.presence.training_events import TrainingFailureEvent
from monitor.presence.training_stats import TrainingProgress, TrainingStats
from monitor.terminal.live import LiveView, join_texts

_LEVELS, _ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_MINUTE_S, _HOUR_S = 60, 3600
# What stands beside the loss's course, and beside the evaluations.
_NUMBERS_WIDTH, _CELL_WIDTH = 66, 10
_LONGEST_TREND = 40


class TrainingView(LiveView):
    """Draws a training board."""

    def __init__(self, pipeline: Pipeline, broker: str, board: TrainingStats, console: Console | None = None) -> None:
        super().__init__(pipeline, broker, board, console)
        self._board = board

    @property
    def _main(self) -> TrainingProgress | None:
        return self._board.progress_of(self._pipeline.source.name)

    def _progress_text(self, now_s: float) -> str:
        course = self._main
        if course is None or course.latest_step is None:
            return "no step yet"
        latest, accuracy = course.latest_step, course.accuracy
        said = [
            f"step {course.completed_steps}/{latest.steps}",
            f"epoch {min(latest.epoch + 1, latest.epochs)}/{latest.epochs}",
            f"loss {_short(course.loss)}",
            *([f"accuracy {accuracy:.1%}"] if accuracy is not None else []),
            *([f"test {_score(course)}"] if course.evaluations else []),
            f"{course.rows_per_s(now_s):.0f} rows/s",
            *([left] if (left := format_remaining(course.remaining_s(now_s))) else []),
        ]
        return "  ".join(said)

    def _latest_text(self) -> str:
        course = self._main
        return f"  {_reason(course.failure)}" if course is not None and course.failure else ""

    def _header(self, now_s: float) -> Sequence[RenderableType]:
        course = self._main
        if course is None or course.latest_step is None:
            return [Text("no step yet", style="dim"), *self._woes(course, now_s)]
        progress = Table.grid(padding=(0, 3), expand=True)
        progress.add_column(ratio=1, min_width=10)
        several = len(self._board.progress_by_source) > 1
        for name, each in self._board.progress_by_source.items():
            if each.latest_step is not None:
                progress.add_row(
                    *_progress(each, now_s), *([Text(sanitize_text(name), style="dim")] if several else [])
                )
        return [progress, self._numbers(course, now_s), *self._woes(course, now_s)]

    def _numbers(self, course: TrainingProgress, now_s: float) -> Text:
        width = max(8, min(_LONGEST_TREND, self._console.width - _NUMBERS_WIDTH))
        accuracy = course.accuracy
        return join_texts(
            [
                Text.assemble(("loss ", "dim"), (_short(course.loss), "bold"), " ", self._trend(course, width)),
                *([] if accuracy is None else [Text.assemble(("accuracy ", "dim"), (f"{accuracy:.1%}", "bold"))]),
                Text(f"{course.rows_per_s(now_s):.0f} rows/s", style="bold green"),
                Text(f"{course.step_ms:.0f} ms/step"),
            ]
        )

    def _trend(self, course: TrainingProgress, width: int) -> tuple[str, str]:
        levels = _ASCII_LEVELS if self._console.options.ascii_only else _LEVELS
        return sparkline(course.loss_history.values(width), levels), "cyan"

    def _woes(self, course: TrainingProgress | None, now_s: float) -> list[Text]:
        """What keeps training from going on, and what recoveries cost; no line while all goes well."""
        if course is None:
            return []
        if course.failure is not None:
            return [Text(_reason(course.failure), style="red")]
        found = []
        if self.status == "running" and (stalled_s := course.stalled_s(now_s)):
            found.append(Text(f"no step for {stalled_s:.0f} s", style="yellow"))
        if course.rollbacks:
            found.append(Text(f"recoveries {course.rollbacks}, steps again {course.repeated_steps}", style="yellow"))
        return [join_texts(found)] if found else []

    def _footer(self) -> Sequence[RenderableType]:
        """The last evaluations side by side, the best one marked."""
        course = self._main
        shown = list(course.evaluations)[-max(1, self._console.width // _CELL_WIDTH - 2) :] if course else []
        if course is None or not shown:
            return [Text("no evaluation yet", style="dim")]
        table = Table.grid(padding=(0, 2))
        table.add_row(Text("test", style="dim"), *(Text(f"epoch {each.epoch + 1}", style="dim") for each in shown))
        table.add_row(Text("loss", style="dim"), *(_short(each.loss) for each in shown))
        if any(each.accuracy is not None for each in shown):
            cells = [
                Text(
                    "-" if each.accuracy is None else f"{each.accuracy:.1%}",
                    "bold green" if each is course.best_evaluation else "",
                )
                for each in shown
            ]
            table.add_row(Text("accuracy", style="dim"), *cells)
        return [table]


def _progress(course: TrainingProgress, now_s: float) -> list[RenderableType]:
    assert course.latest_step is not None
    latest = course.latest_step
    share = min(1.0, course.completed_steps / latest.steps) if latest.steps else 1.0
    return [
        ProgressBar(total=1.0, completed=share),
        Text(f"{int(100 * share)}%", style="bold"),  # not 100 before the end
        Text(f"step {course.completed_steps}/{latest.steps}"),
        Text(f"epoch {min(latest.epoch + 1, latest.epochs)}/{latest.epochs}"),
        Text(format_remaining(course.remaining_s(now_s)), style="dim"),
    ]


def _score(course: TrainingProgress) -> str:
    last = course.evaluations[-1]
    return f"loss {_short(last.loss)}" if last.accuracy is None else f"{last.accuracy:.1%}"


def _short(loss: float | None) -> str:
    if loss is None:
        return "-"
    return f"{loss:.4f}" if abs(loss) < 1000 else f"{loss:.3g}"


def _reason(failed: TrainingFailureEvent) -> str:
    where = "".join(f", {what} {name}" for what, name in (("stage", failed.stage), ("worker", failed.worker)) if name)
    return sanitize_text(f"{failed.error}: {failed.reason}{where}")


def format_remaining(seconds: float | None) -> str:
    """`42 s left`, `3 min 20 s left`, `2 h 5 min left`; nothing where nobody knows, or nothing is left."""
    if not seconds:
        return ""
    whole = round(seconds)
    if whole >= _HOUR_S:
        return f"{whole // _HOUR_S} h {whole % _HOUR_S // _MINUTE_S} min left"
    return f"{whole // _MINUTE_S} min {whole % _MINUTE_S} s left" if whole >= _MINUTE_S else f"{whole} s left"


def sparkline(values: Sequence[float], levels: str = _LEVELS) -> str:
    """A letter a value, the lowest to the highest; one that stays what it is lies low."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((value - low) * scale)] for value in values)
