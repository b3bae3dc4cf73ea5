"""The live view of a run on a terminal, or a line every few seconds where the output is no terminal.

`LiveView` has the frame, the workers by stage, and the problems; its subclasses in views.py, one for each kind of
pipeline, have the progress and the latest results.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.presence import WorkerRecord
from monitor.presence.inference_stats import format_counts
from monitor.presence.presence_table import PresenceTable
from monitor.terminal.status_tables import STATE_STYLES, format_age, untrusted_text

REFRESH_PER_S = 5
_LINE_INTERVAL_S = 2.0  # without a terminal
_QUIET_S = 10.0  # without a terminal: the first line comes after this time, or with the first result
_NARROW_WIDTH = 100  # below it, such as on a terminal of the usual 80 columns, columns are close together
_WIDE_WIDTH = 140  # from it on, the view also has the site, node and model of each worker
_BAR_WIDTHS = {True: 8, False: 12}  # of the load, by whether the terminal is narrow
_WORKERS_SHOWN = 32  # others are counted: any client that may publish can invent thousands


class LiveView(ABC):
    """Draws the statistics of a run to standard error inside its context; `update` may be called at any rate."""

    def __init__(self, pipeline: Pipeline, broker: str, stats: PresenceTable, console: Console | None = None) -> None:
        self.status = "starting"
        self.broker_restarts = 0
        self._pipeline = pipeline
        self._broker = broker
        self._stats = stats
        self._begin_s = time.monotonic()
        self._console = console or Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=REFRESH_PER_S, transient=False, auto_refresh=False)
        self._next_update_s = 0.0

    @abstractmethod
    def _progress_text(self, now_s: float) -> str:
        """The progress of the work, for a line."""

    @abstractmethod
    def _latest_text(self) -> str:
        """The latest result, for the end of a line."""

    @abstractmethod
    def _header(self, now_s: float) -> Sequence[RenderableType]:
        """The progress of the work, above the workers."""

    @abstractmethod
    def _footer(self) -> Sequence[RenderableType]:
        """The latest results, below the workers."""

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self.update(force=True)
            self._live.stop()

    def print_line(self, text: str) -> None:
        """Print one line above the view."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, *, force: bool = False) -> None:
        """Print new notices, and draw the view if its last update is long enough ago."""
        while self._stats.notices:
            self.print_line(self._stats.notices.popleft())
        now_s = time.monotonic()
        if now_s < self._next_update_s and not force:
            return
        if self._console.is_terminal:
            self._next_update_s = now_s + 1 / REFRESH_PER_S
            self._live.update(self._render(now_s), refresh=True)
        elif self._stats.results_received or now_s - self._begin_s >= _QUIET_S:
            self._next_update_s = now_s + _LINE_INTERVAL_S
            self.print_line(self._line(now_s))

    @property
    def _status(self) -> str:
        return self.status + (f" (broker restarts: {self.broker_restarts})" if self.broker_restarts else "")

    def _line(self, now_s: float) -> str:
        shown, hidden = self._workers(now_s)
        stages = " ".join(f"{record.stage} {state or f'{record.load.busy:.0%}'}" for record, state in shown)
        if hidden:
            stages += f" and {hidden} more"
        parts = [f"{now_s - self._begin_s:6.1f} s", self._status, self._progress_text(now_s), stages]
        parts += [f"{problem} {reasons}" for problem, reasons in self._problems()]
        return "  ".join(parts) + self._latest_text()

    def _render(self, now_s: float) -> RenderableType:
        title = f"[bold]{self._pipeline.name}[/]  {self._broker}  {now_s - self._begin_s:.0f} s  {self._status}"
        problems = [
            Text(f"{problem} {reasons}", style="red" if problem == "failed" else "yellow")
            for problem, reasons in self._problems()
        ]
        lines = [join_texts(problems)] if problems else []
        return Panel(
            Group(*self._header(now_s), *lines, Text(), self._stages(now_s), Text(), *self._footer()),
            title=title,
            title_align="left",
            border_style="dim",
        )

    def _problems(self) -> list[tuple[str, str]]:
        """Retries, drops and failures of the sources, with reasons; empty ones left out."""
        counts_by_problem = self._stats.problem_counts()
        return [(problem, format_counts(counts)) for problem, counts in counts_by_problem.items() if counts]

    def _stages(self, now_s: float) -> Table:
        narrow = self._console.width < _NARROW_WIDTH
        table = Table(box=None, padding=(0, 1 if narrow else 2, 0, 0), header_style="dim", pad_edge=False)
        extra = ("site", "node", "model") if self._console.width >= _WIDE_WIDTH else ()
        for column in ("stage", "worker", *extra, "device"):
            table.add_column(column)
        bar_width = _BAR_WIDTHS[narrow]
        table.add_column("load", width=bar_width)
        for column in ("busy", "queue", "tasks/s", "ms/task", "done", "age"):
            table.add_column(column, justify="right", no_wrap=True)  # numbers are never cut
        shown, hidden = self._workers(now_s)
        for record, state in shown:
            load, style = record.load, STATE_STYLES.get(state, "")
            bar = Text(state, style) if state else ProgressBar(total=1.0, completed=load.busy, width=bar_width)
            extra_texts = {"site": record.site, "node": record.node, "model": record.fingerprint}
            texts = (record.stage, record.worker, *(extra_texts[column] for column in extra), record.device)
            numbers = (f"{load.busy:.0%}", f"{load.queue}", f"{load.rate:.1f}", f"{load.task_ms:.1f}", f"{load.done}")
            table.add_row(
                *(untrusted_text(text, style) for text in texts),
                bar,
                *(Text(number, style) for number in (*numbers, format_age(record.up_s))),
            )
        if hidden:
            table.add_row("", Text(f"and {hidden} more", style="dim"))
        served = {record.stage for record in self._stats.workers.values()}
        for stage in self._pipeline.stage:
            if stage.name not in served:
                table.add_row(untrusted_text(stage.name), untrusted_text("starting ...", "dim"))
        return table

    def _workers(self, now_s: float) -> tuple[list[tuple[WorkerRecord, str]], int]:
        """The workers to show in the pipeline's order, each with its state ("" for up), and how many are hidden."""
        order = [stage.name for stage in self._pipeline.stage]
        workers = []
        for topic, record in self._stats.workers.items():
            if record.stage in order:
                state = "" if record.state == "up" else record.state
                workers.append((record, "lost" if self._stats.is_lost(topic, now_s) else state))

        def position(worker: tuple[WorkerRecord, str]) -> tuple[int, str, str]:
            return order.index(worker[0].stage), worker[0].worker, worker[0].site

        workers.sort(key=lambda worker: (worker[1] != "", position(worker)))  # those that are up are shown first
        return sorted(workers[:_WORKERS_SHOWN], key=position), max(0, len(workers) - _WORKERS_SHOWN)


def join_texts(parts: Sequence[Text]) -> Text:
    """The parts in one line, which is cut where there is no room for it."""
    line = Text("   ").join(parts)
    line.no_wrap = True
    line.overflow = "ellipsis"
    return line
