"""The live view of an inference pipeline: rate, latency, and the latest results."""

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from monitor.presence.inference_stats import InferenceStats
from monitor.terminal.live import LiveView


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
