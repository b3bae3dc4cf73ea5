"""The live view of a pipeline that infers: how fast results come, and what was found."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from brokers.config.pipeline_file import Pipeline
from monitor.presence.inference_stats import InferenceStats
from monitor.terminal.live import LiveView


class InferenceView(LiveView):
    """Draws a scoreboard."""

    def __init__(self, pipeline: Pipeline, broker: str, board: InferenceStats, console: Console | None = None) -> None:
        super().__init__(pipeline, broker, board, console)
        self._board = board

    def _progress_text(self, now_s: float) -> str:
        board = self._board
        return f"{board.results} results  {board.rate(now_s):.1f}/s  {board.latency_ms(50):.0f} ms"

    def _latest_text(self) -> str:
        return f"  last: {self._board.recent_results[-1].text}" if self._board.recent_results else ""

    def _header(self, now_s: float) -> Sequence[RenderableType]:
        board = self._board
        head = Table.grid(padding=(0, 3))
        head.add_row(
            Text(f"{board.rate(now_s):5.1f} frames/s", style="bold green"),
            Text(f"latency {board.latency_ms(50):.0f} ms, p95 {board.latency_ms(95):.0f} ms"),
            Text(f"{board.results} results"),
            *([] if board.sources else self._counts()),  # what a source says of itself comes sooner, and says why
        )
        return [head]

    def _footer(self) -> Sequence[RenderableType]:
        finds = Table.grid(padding=(0, 2))
        for find in list(self._board.recent_results):
            finds.add_row(
                Text(f"{find.source} {find.index}", style="dim"), Text(find.text, overflow="ellipsis", no_wrap=True)
            )
        return [finds]

    def _counts(self) -> list[Text]:
        dropped, failed = self._board.dropped, self._board.failures.total()
        return [
            Text(f"{dropped} dropped", style="yellow" if dropped else "dim"),
            Text(f"{failed} failed", style="red" if failed else "dim"),
        ]
