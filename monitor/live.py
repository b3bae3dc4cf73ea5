"""The live view of a run on a terminal; one line now and then where there is none."""

from __future__ import annotations

import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from brokers.pipeline import Pipeline
from brokers.presence import Birth
from monitor.scoreboard import Scoreboard, by_count, plain
from monitor.standings import age

REFRESH_PER_S = 5
_LINE_EVERY_S = 2.0
# Below this width, which is what a terminal has that nobody has made larger, columns stand close together.
_ROOMY = 100
_BAR_WIDTHS = {True: 6, False: 12}
# Workers that are shown; how many there are beyond is said. Anybody who may publish records may invent thousands.
_SHOWN = 32
# From this width on there is room for where each worker runs, and of which model it is; else `sparse status` tells.
_WIDE = 140
# Where there is no terminal, nothing is said before the first result or this time: a mistake is then one line, its own.
_QUIET_S = 10.0


class LiveView:
    """Draws a scoreboard to standard error until closed; call `update` as often as you like."""

    def __init__(self, pipeline: Pipeline, broker: str, board: Scoreboard) -> None:
        self.status = "starting"
        self.broker_restarts = 0
        self._pipeline, self._broker, self._board = pipeline, broker, board
        self._begun_s = time.monotonic()
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=REFRESH_PER_S, transient=False, auto_refresh=False)
        self._next_s = 0.0

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self.update(force=True)
            self._live.stop()

    def say(self, text: str) -> None:
        """One line above the view."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, *, force: bool = False) -> None:
        """Draw what has changed, no more often than a person can read."""
        now_s = time.monotonic()
        if now_s < self._next_s and not force:
            return
        if self._console.is_terminal:
            self._next_s = now_s + 1 / REFRESH_PER_S
            self._live.update(self._render(now_s), refresh=True)
        elif self._board.heard or now_s - self._begun_s >= _QUIET_S:
            self._next_s = now_s + _LINE_EVERY_S
            self.say(self._line(now_s))

    @property
    def _status(self) -> str:
        return self.status + (f" (broker restarts: {self.broker_restarts})" if self.broker_restarts else "")

    def _line(self, now_s: float) -> str:
        board = self._board
        stages = " ".join(f"{birth.stage} {state or f'{birth.load.busy:.0%}'}" for birth, state in self._ordered(now_s))
        stages += f" and {more} more" if (more := self._more) else ""
        found = f"  last: {board.finds[-1].text}" if board.finds else ""
        troubles = "".join(f"  {what} {by_count(counts)}" for what, counts in board.troubles().items() if counts)
        return (
            f"{now_s - self._begun_s:6.1f} s  {self._status}  {board.results} results  {board.rate(now_s):.1f}/s  "
            f"{board.latency_ms(50):.0f} ms  {stages}{troubles}{found}"
        )

    def _render(self, now_s: float) -> RenderableType:
        board = self._board
        head = Table.grid(padding=(0, 3))
        head.add_row(
            Text(f"{board.rate(now_s):5.1f} frames/s", style="bold green"),
            Text(f"latency {board.latency_ms(50):.0f} ms, p95 {board.latency_ms(95):.0f} ms"),
            Text(f"{board.results} results"),
            *([] if board.sources else self._counts()),  # what a source says of itself comes sooner, and says why
        )
        finds = Table.grid(padding=(0, 2))
        for find in list(board.finds):
            finds.add_row(
                Text(f"{find.source} {find.index}", style="dim"), Text(find.text, overflow="ellipsis", no_wrap=True)
            )
        title = f"[bold]{self._pipeline.name}[/]  {self._broker}  {now_s - self._begun_s:.0f} s  {self._status}"
        return Panel(
            Group(head, *self._troubles(), Text(), self._stages(now_s), Text(), finds),
            title=title,
            title_align="left",
            border_style="dim",
        )

    def _counts(self) -> list[Text]:
        dropped, failed = self._board.dropped, self._board.failures.total()
        return [
            Text(f"{dropped} dropped", style="yellow" if dropped else "dim"),
            Text(f"{failed} failed", style="red" if failed else "dim"),
        ]

    def _troubles(self) -> list[Text]:
        """What was sent again, dropped or given up, and why, as its source says; no line while all goes well."""
        found = self._board.troubles()
        said = [(what, by_count(counts)) for what, counts in found.items() if counts]
        styled = [Text(f"{what} {reasons}", style="red" if what == "failed" else "yellow") for what, reasons in said]
        line = Text("   ").join(styled)
        line.no_wrap, line.overflow = True, "ellipsis"
        return [line] if said else []

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
        up = {birth.stage for birth in self._board.workers.values()}
        for birth, state in self._ordered(now_s):
            load = birth.load
            bar = ProgressBar(total=1.0, completed=load.busy, width=bar_width)
            name = f"{birth.worker} ({state})" if state else birth.worker
            about = {"site": birth.site, "node": birth.node, "model": birth.fingerprint}
            table.add_row(
                _name(birth.stage), _name(name, style="red" if state == "lost" else ""),
                *(_name(about[place]) for place in places), _name(birth.device), bar,
                f"{load.busy:.0%}", str(load.queue), f"{load.rate:.1f}", f"{load.task_ms:.1f}", str(load.done),
                age(birth.up_s),
            )  # fmt: skip
        if more := self._more:
            table.add_row("", Text(f"and {more} more", style="dim"))
        for stage in self._pipeline.stage:
            if stage.name not in up:
                table.add_row(stage.name, Text("starting ...", style="dim"))
        return table

    @property
    def _more(self) -> int:
        """How many workers of the pipeline are not shown."""
        order = {stage.name for stage in self._pipeline.stage}
        return max(0, sum(birth.stage in order for birth in self._board.workers.values()) - _SHOWN)

    def _ordered(self, now_s: float) -> list[tuple[Birth, str]]:
        """As many workers as fit, in the pipeline's order, each with what is to be said of it: nothing if it is up."""
        order = [stage.name for stage in self._pipeline.stage]
        found = []
        for topic, birth in self._board.workers.items():
            if birth.stage in order:
                state = "" if birth.state == "up" else birth.state
                found.append((birth, "lost" if self._board.is_lost(topic, now_s) else state))

        def place(item: tuple[Birth, str]) -> tuple[int, str, str]:
            return order.index(item[0].stage), item[0].worker, item[0].site

        found.sort(key=lambda item: (item[1] != "", place(item)))  # those that are up are not crowded out
        return sorted(found[:_SHOWN], key=place)


def _name(text: str, style: str = "") -> Text:
    """What others call themselves may be of any length."""
    return Text(plain(text), style=style, no_wrap=True, overflow="ellipsis")
