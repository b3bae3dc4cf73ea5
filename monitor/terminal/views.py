"""The live views of inference (rate, latency, latest results) and training (progress, time left, loss, accuracy)."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from monitor.presence.inference_stats import InferenceStats, sanitize_text
from monitor.presence.training_stats import TrainingFailureEvent, TrainingProgress, TrainingStats
from monitor.terminal.live import LiveView, join_texts

_LEVELS, _ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_MINUTE_S, _HOUR_S = 60, 3600
_NUMBERS_WIDTH = 66  # of the line with the sparkline, without it
_LONGEST_SPARKLINE = 40
_EVALUATION_WIDTH = 10


class InferenceView(LiveView):
    """Draws `InferenceStats`."""

    _stats: InferenceStats

    def _progress_text(self, now_s: float) -> str:
        stats = self._stats
        return f"{stats.results} results  {stats.rate(now_s):.1f}/s  {stats.latency_ms(50):.0f} ms"

    def _latest_text(self) -> str:
        return f"  last: {self._stats.recent_results[-1].text}" if self._stats.recent_results else ""

    def _header(self, now_s: float) -> Sequence[RenderableType]:
        stats = self._stats
        header = Table.grid(padding=(0, 2))
        header.add_row(
            Text(f"{stats.rate(now_s):5.1f} frames/s", style="bold green"),
            Text(f"latency {stats.latency_ms(50):.0f} ms, p95 {stats.latency_ms(95):.0f} ms"),
            Text(f"{stats.results} results"),
            *([] if stats.sources else self._counts()),  # a source's own record has them earlier, and with reasons
        )
        return [header]

    def _footer(self) -> Sequence[RenderableType]:
        results = Table.grid(padding=(0, 2))
        for result in list(self._stats.recent_results):
            sample = Text(f"{result.source} {result.index}", style="dim")
            results.add_row(sample, Text(result.text, overflow="ellipsis", no_wrap=True))
        return [results]

    def _counts(self) -> list[Text]:
        dropped, failed = self._stats.dropped, self._stats.failures.total()
        return [
            Text(f"{dropped} dropped", style="yellow" if dropped else "dim"),
            Text(f"{failed} failed", style="red" if failed else "dim"),
        ]


class TrainingView(LiveView):
    """Draws `TrainingStats`."""

    _stats: TrainingStats

    @property
    def _progress(self) -> TrainingProgress | None:
        return self._stats.progress_of(self._pipeline.source.name)

    def _progress_text(self, now_s: float) -> str:
        progress = self._progress
        if progress is None or progress.latest_step is None:
            return "no step yet"
        step, accuracy = progress.latest_step, progress.accuracy
        remaining = format_remaining(progress.remaining_s(now_s))
        parts = [
            f"step {progress.completed_steps}/{step.steps}",
            f"epoch {min(step.epoch + 1, step.epochs)}/{step.epochs}",
            f"loss {_format_loss(progress.loss)}",
            *([f"accuracy {accuracy:.1%}"] if accuracy is not None else []),
            *([f"test {_format_evaluation(progress)}"] if progress.evaluations else []),
            f"{progress.rows_per_s(now_s):.0f} rows/s",
            *([remaining] if remaining else []),
        ]
        return "  ".join(parts)

    def _latest_text(self) -> str:
        progress = self._progress
        return f"  {_format_failure(progress.failure)}" if progress is not None and progress.failure else ""

    def _header(self, now_s: float) -> Sequence[RenderableType]:
        progress = self._progress
        if progress is None or progress.latest_step is None:
            return [Text("no step yet", style="dim"), *self._warnings(progress, now_s)]
        bars = Table.grid(padding=(0, 3), expand=True)
        bars.add_column(ratio=1, min_width=10)
        sources = self._stats.progress_by_source
        for source, each in sources.items():
            if each.latest_step is not None:
                name = [Text(sanitize_text(source), style="dim")] if len(sources) > 1 else []
                bars.add_row(*_bar(each, now_s), *name)
        return [bars, self._numbers(progress, now_s), *self._warnings(progress, now_s)]

    def _numbers(self, progress: TrainingProgress, now_s: float) -> Text:
        width = max(8, min(_LONGEST_SPARKLINE, self._console.width - _NUMBERS_WIDTH))
        levels = _ASCII_LEVELS if self._console.options.ascii_only else _LEVELS
        trend = sparkline(progress.loss_history.values(width), levels)
        accuracy = progress.accuracy
        return join_texts(
            [
                Text.assemble(("loss ", "dim"), (_format_loss(progress.loss), "bold"), " ", (trend, "cyan")),
                *([] if accuracy is None else [Text.assemble(("accuracy ", "dim"), (f"{accuracy:.1%}", "bold"))]),
                Text(f"{progress.rows_per_s(now_s):.0f} rows/s", style="bold green"),
                Text(f"{progress.step_ms:.0f} ms/step"),
            ]
        )

    def _warnings(self, progress: TrainingProgress | None, now_s: float) -> list[Text]:
        """A line for a failure, or for a stall and the cost of rollbacks; no line while all is well."""
        if progress is None:
            return []
        if progress.failure is not None:
            return [Text(_format_failure(progress.failure), style="red")]
        warnings = []
        if self.status == "running" and (stalled_s := progress.stalled_s(now_s)):
            warnings.append(Text(f"no step for {stalled_s:.0f} s", style="yellow"))
        if progress.rollbacks:
            text = f"rollbacks {progress.rollbacks}, steps repeated {progress.repeated_steps}"
            warnings.append(Text(text, style="yellow"))
        return [join_texts(warnings)] if warnings else []

    def _footer(self) -> Sequence[RenderableType]:
        """The latest evaluations side by side, with the best one marked."""
        progress = self._progress
        if progress is None or not progress.evaluations:
            return [Text("no evaluation yet", style="dim")]
        shown = list(progress.evaluations)[-max(1, self._console.width // _EVALUATION_WIDTH - 2) :]
        table = Table.grid(padding=(0, 2))
        table.add_row(Text("test", style="dim"), *(Text(f"epoch {each.epoch + 1}", style="dim") for each in shown))
        table.add_row(Text("loss", style="dim"), *(_format_loss(each.loss) for each in shown))
        if any(each.accuracy is not None for each in shown):
            best = progress.best_evaluation
            cells = [
                Text("-" if each.accuracy is None else f"{each.accuracy:.1%}", "bold green" if each is best else "")
                for each in shown
            ]
            table.add_row(Text("accuracy", style="dim"), *cells)
        return [table]


def _bar(progress: TrainingProgress, now_s: float) -> list[RenderableType]:
    assert progress.latest_step is not None
    step = progress.latest_step
    share = min(1.0, progress.completed_steps / step.steps) if step.steps else 1.0
    return [
        ProgressBar(total=1.0, completed=share),
        Text(f"{int(100 * share)}%", style="bold"),  # rounded down: 100% only at the end
        Text(f"step {progress.completed_steps}/{step.steps}"),
        Text(f"epoch {min(step.epoch + 1, step.epochs)}/{step.epochs}"),
        Text(format_remaining(progress.remaining_s(now_s)), style="dim"),
    ]


def _format_evaluation(progress: TrainingProgress) -> str:
    latest = progress.evaluations[-1]
    return f"loss {_format_loss(latest.loss)}" if latest.accuracy is None else f"{latest.accuracy:.1%}"


def _format_loss(loss: float | None) -> str:
    if loss is None:
        return "-"
    return f"{loss:.4f}" if abs(loss) < 1000 else f"{loss:.3g}"


def _format_failure(failure: TrainingFailureEvent) -> str:
    places = (("stage", failure.stage), ("worker", failure.worker))
    where = "".join(f", {kind} {name}" for kind, name in places if name)
    return sanitize_text(f"{failure.error}: {failure.reason}{where}")


def format_remaining(seconds: float | None) -> str:
    """`42 s left`, `3 min 20 s left` or `2 h 5 min left`; empty if it is unknown or 0."""
    if not seconds:
        return ""
    whole = round(seconds)
    if whole >= _HOUR_S:
        return f"{whole // _HOUR_S} h {whole % _HOUR_S // _MINUTE_S} min left"
    return f"{whole // _MINUTE_S} min {whole % _MINUTE_S} s left" if whole >= _MINUTE_S else f"{whole} s left"


def sparkline(values: Sequence[float], levels: str = _LEVELS) -> str:
    """One character for each value, scaled from the lowest value to the highest."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((value - low) * scale)] for value in values)
