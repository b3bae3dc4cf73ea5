"""Statistics of an inference pipeline from its published results, beside the presence of its workers and sources."""

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from brokers.telemetry.recent_results import RecentResults
from monitor.presence.presence_table import PresenceTable

TEXT_LIMIT = 400
REASONS_SHOWN = 12  # about ten are in use; other clients may invent any number
_RECENT_RESULTS = 256
_RECENT_LINES = 8


@dataclass(frozen=True, slots=True)
class ResultLine:
    """One line of the live view: the result of one sample, or its failure."""

    source: str
    index: int
    text: str


@dataclass(slots=True)
class InferenceStats(PresenceTable):
    """Counts, rate and latencies of recent results.

    Results of `pipeline` count, and those that name no pipeline: rejections of samples that never became a request.
    """

    results: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    recent_results: deque[ResultLine] = field(default_factory=lambda: deque(maxlen=_RECENT_LINES))
    _recent: RecentResults = field(default_factory=lambda: RecentResults(_RECENT_RESULTS))

    def add_result(self, result: dict[str, Any], now_s: float) -> None:
        text = summarize_result(result)
        latency_ms = float(result.get("latency_ms", 0.0))
        self.dropped = max(self.dropped, int(result.get("dropped", 0)))
        if "error" in result:
            self.failures[str(result["error"])] += 1
            self._add_line(result, f"{result['error']}: {result.get('reason', '')}")
            return
        self.results += 1
        self._recent.add(latency_ms, now_s)
        if text:
            self._add_line(result, text)

    def rate(self, now_s: float) -> float:
        """Results per second of the last seconds."""
        return self._recent.rate(now_s)

    def latency_ms(self, percent: float) -> float:
        """A percentile of the recent latencies; 0 before the first result."""
        return self._recent.latency_ms(percent)[f"p{percent:g}"]

    def _add_line(self, result: dict[str, Any], text: str) -> None:
        source = sanitize_text(str(result.get("source", "")))
        self.recent_results.append(ResultLine(source, int(result.get("index", 0)), sanitize_text(text)))


def sanitize_text(text: str) -> str:
    """Text from the network made safe for a terminal: one short line without control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:TEXT_LIMIT])


def format_counts(counts: Mapping[str, int]) -> str:
    """`superseded 12, expired 3`: the most frequent first, at most REASONS_SHOWN; empty if all are 0."""
    ordered = sorted(((name, count) for name, count in counts.items() if count), key=lambda item: (-item[1], item[0]))
    if rest := sum(count for _, count in ordered[REASONS_SHOWN:]):
        ordered[REASONS_SHOWN:] = [("others", rest)]
    return ", ".join(f"{name} {count}" for name, count in ordered)


def summarize_result(result: dict[str, Any]) -> str:
    """`2 person 0.91 0.80, car 0.75`: the objects by label, the likeliest class, or the values; may be empty."""
    if classes := result.get("classes"):
        return f"{classes[0]['label']} {classes[0]['score']:.2f}"
    scores_by_label: dict[str, list[float]] = {}
    for item in result.get("objects", ()):
        scores_by_label.setdefault(item["label"], []).append(item["score"])
    parts = []
    for label, scores in scores_by_label.items():
        count = f"{len(scores)} " if len(scores) > 1 else ""
        parts.append(f"{count}{label} {' '.join(f'{score:.2f}' for score in scores)}")
    if not parts and "values" in result:
        parts = [f"{name} {_format_value(value)}" for name, value in result["values"].items()]
    return ", ".join(parts)


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['dtype']} {value['shape']}"
    if isinstance(value, list):
        if len(value) > 4:
            return f"[{len(value)} values]"
        return f"[{', '.join(_format_value(item) for item in value)}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
