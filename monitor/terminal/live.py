"""The live view of a run on a terminal; one line now and then where there is none.

What all views share is here: the frame, the workers by stage, what went wrong. What the work itself looks like is in
the view of each kind of work: monitor/terminal/inference_view.py, monitor/terminal/training_view.py.
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
_LINE_EVERY_S = 2.0
# Below this width, which is what a terminal has that nobody has made larger, columns stand close together.
_ROOMY = 100
_BAR_WIDTHS = {True: 8, False: 12}
# Workers that are shown; how many there are beyond is said. Anybody who may publish records may invent thousands.
_SHOWN = 32
# From this width on there is room for where each worker runs, and of which model it is; else `sparse status` tells.
_WIDE = 140
# Where there is no terminal, nothing is said before the first result or this time: a mistake is then one line, its own.
_QUIET_S = 10.0


class LiveView(ABC):
    """Draws what a board knows to standard error until closed; call `update` as often as you like."""

    def __init__(self, pipeline: Pipeline, broker: str, board: PresenceTable, console: Console | None = None) -> None:
        self.status = "starting"
        self.broker_restarts = 0
        self._pipeline, self._broker, self._roll = pipeline, broker, board
        self._begun_s = time.monotonic()
        self._console = console or Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=REFRESH_PER_S, transient=False, auto_refresh=False)
        self._next_s = 0.0

    @abstractmethod
    def _progress_text(self, now_s: float) -> str:
        """How the work goes, for a line among others."""

    @abstractmethod
    def _latest_text(self) -> str:
        """What came last, for the end of that line."""

    @abstractmethod
    def _header(self, now_s: float) -> Sequence[RenderableType]:
        """How the work goes, above the workers."""

    @abstractmethod
    def _footer(self) -> Sequence[RenderableType]:
        """What came out lately, below the workers."""

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self.update(force=True)
            self._live.stop()

    def print_line(self, text: str) -> None:
        """One line above the view."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, *, force: bool = False) -> None:
        """Draw what has changed, no more often than a person can read; say what is new at once."""
        for text in self._roll.pop_notices():
            self.print_line(text)
        now_s = time.monotonic()
        if now_s < self._next_s and not force:
            return
        if self._console.is_terminal:
            self._next_s = now_s + 1 / REFRESH_PER_S
            self._live.update(self._render(now_s), refresh=True)
        elif self._roll.results_received or now_s - self._begun_s >= _QUIET_S:
            self._next_s = now_s + _LINE_EVERY_S
            self.print_line(self._line(now_s))

    @property
    def _status(self) -> str:
        return self.status + (f" (broker restarts: {self.broker_restarts})" if self.broker_restarts else "")

    def _line(self, now_s: float) -> str:
        stages = " ".join(f"{birth.stage} {state or f'{birth.load.busy:.0%}'}" for birth, state in self._ordered(now_s))
        stages += f" and {more} more" if (more := self._more) else ""
        troubles = "".join(
            f"  {what} {format_counts(counts)}" for what, counts in self._roll.problem_counts().items() if counts
        )
        return f"{now_s - self._begun_s:6.1f} s  {self._status}  {self._progress_text(now_s)}  {stages}{troubles}{self._latest_text()}"

    def _render(self, now_s: float) -> RenderableType:
        title = f"[bold]{self._pipeline.name}[/]  {self._broker}  {now_s - self._begun_s:.0f} s  {self._status}"
        return Panel(
            Group(*self._header(now_s), *self._troubles(), Text(), self._stages(now_s), Text(), *self._footer()),
            title=title,
            title_align="left",
            border_style="dim",
        )

    def _troubles(self) -> list[Text]:
        """What was sent again, dropped or given up, and why, as its source says; no line while all goes well."""
        found = self._roll.problem_counts()
        said = [(what, format_counts(counts)) for what, counts in found.items() if counts]
        styled = [Text(f"{what} {reasons}", style="red" if what == "failed" else "yellow") for what, reasons in said]
        return [join_texts(styled)] if said else []

    def _stages(self, now_s: float) -> Table:
        narrow = self._console.width < _ROOMY
        table = Table(box=None, padding=(0, 1 if narrow else 2, 0, 0), header_style="dim", pad_edge=False)
        places = ("site", "node", "model") if self._console.width >= _WIDE else ()
        for column in ("stage", "worker", *places, "device"):
            table.add_column(column)
        bar_width = _BAR_WIDTHS[narrow]
        table.add_column("load", width=bar_width)
        for column in ("busy", "queue", "tasks/s", "ms/task", "done", "age"):
            table.add_column(column, justify="right", no_wrap=True)  # figures are shown whole; names give way
        up = {birth.stage for birth in self._roll.workers.values()}
        for birth, state in self._ordered(now_s):
            load, style = birth.load, STATE_STYLES.get(state, "")
            # Of one that is not at work the state is what there is to see.
            bar = Text(state, style) if state else ProgressBar(total=1.0, completed=load.busy, width=bar_width)
            about = {"site": birth.site, "node": birth.node, "model": birth.fingerprint}
            named = (birth.stage, birth.worker, *(about[place] for place in places), birth.device)
            cells = (f"{load.busy:.0%}", f"{load.queue}", f"{load.rate:.1f}", f"{load.task_ms:.1f}", f"{load.done}")
            table.add_row(
                *(untrusted_text(name, style) for name in named),
                bar,
                *(Text(cell, style) for cell in (*cells, format_age(birth.up_s))),
            )
        if more := self._more:
            table.add_row("", Text(f"and {more} more", style="dim"))
        for stage in self._pipeline.stage:
            if stage.name not in up:
                table.add_row(untrusted_text(stage.name), untrusted_text("starting ...", "dim"))
        return table

    @property
    def _more(self) -> int:
        """How many workers of the pipeline are not shown."""
        order = {stage.name for stage in self._pipeline.stage}
        return max(0, sum(birth.stage in order for birth in self._roll.workers.values()) - _SHOWN)

    def _ordered(self, now_s: float) -> list[tuple[WorkerRecord, str]]:
        """As many workers as fit, in the pipeline's order, each with what is to be said of it: nothing if it is up."""
        order = [stage.name for stage in self._pipeline.stage]
        found = []
        for topic, birth in self._roll.workers.items():
            if birth.stage in order:
                state = "" if birth.state == "up" else birth.state
                found.append((birth, "lost" if self._roll.is_lost(topic, now_s) else state))

        def place(item: tuple[WorkerRecord, str]) -> tuple[int, str, str]:
            return order.index(item[0].stage), item[0].worker, item[0].site

        found.sort(key=lambda item: (item[1] != "", place(item)))  # those that are up are not crowded out
        return sorted(found[:_SHOWN], key=place)


def join_texts(parts: Sequence[Text]) -> Text:
    """The parts beside each other; what has no room is cut off."""
    line = Text("   ").join(parts)
    line.no_wrap, line.overflow = True, "ellipsis"
    return line
