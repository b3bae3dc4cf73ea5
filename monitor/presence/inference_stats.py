"""What is known of a pipeline that infers, from what anybody may hear: presence records and published results. Pure."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from monitor.presence.presence_table import PresenceTable

# Rates and percentiles are of the last so many seconds and results: what a person calls "now".
RATE_WINDOW_S = 5.0
TEXT_LIMIT = 400
REASONS_SHOWN = 12  # ours know about ten; others may invent any number
_RECENT_RESULTS = 256
_RECENT_FINDS = 8


@dataclass(frozen=True, slots=True)
class ResultLine:
    """One line of the live view: what was found in one sample."""

    source: str
    index: int
    text: str


@dataclass(slots=True)
class InferenceStats(PresenceTable):
    """Who is here, and the recent results. Times are monotonic seconds of the listener.

    Of results, those of `pipeline` count, and those that name none: what never became a request of any.
    """

    results: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    recent_results: deque[ResultLine] = field(default_factory=lambda: deque(maxlen=_RECENT_FINDS))
    first_result_s: float | None = None
    _times_s: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    _latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_RESULTS))

    def on_result(self, payload: bytes, now_s: float) -> None:
        """A result was published; anybody may publish there, so what cannot be read is counted."""
        try:
            self._note_result(json.loads(payload), now_s)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            self.rejected += 1

    @property
    def results_received(self) -> int:
        """How many requests have ended, one way or the other."""
        return self.results + self.failures.total()

    def _note_result(self, result: dict[str, Any], now_s: float) -> None:
        if self.pipeline and result.get("pipeline", self.pipeline) != self.pipeline:
            return
        text = summarize_result(result)
        latency_ms = float(result.get("latency_ms", 0.0))
        self.dropped = max(self.dropped, int(result.get("dropped", 0)))
        if "error" in result:
            self.failures[str(result["error"])] += 1
            self._note(result, f"{result['error']}: {result.get('reason', '')}")
            return
        self.results += 1
        self.first_result_s = now_s if self.first_result_s is None else self.first_result_s
        self._times_s.append(now_s)
        self._latencies_ms.append(latency_ms)
        if text:
            self._note(result, text)

    def rate(self, now_s: float) -> float:
        """Results a second, lately."""
        recent = [time_s for time_s in self._times_s if now_s - time_s <= RATE_WINDOW_S]
        since_s = (
            now_s - RATE_WINDOW_S if self.first_result_s is None else max(now_s - RATE_WINDOW_S, self.first_result_s)
        )
        return len(recent) / max(now_s - since_s, 0.2) if recent else 0.0

    def latency_ms(self, percent: float) -> float:
        """A percentile of the recent latencies; 0 before there are any."""
        ordered = sorted(self._latencies_ms)
        return ordered[round((len(ordered) - 1) * percent / 100)] if ordered else 0.0

    def _note(self, result: dict[str, Any], text: str) -> None:
        source, index = str(result.get("source", "")), int(result.get("index", 0))
        self.recent_results.append(ResultLine(sanitize_text(source), index, sanitize_text(text)))


def sanitize_text(text: str) -> str:
    """Text of others as a terminal may have it: one short line, nothing that moves the cursor or changes colours."""
    return "".join(letter if letter.isprintable() else "?" for letter in text[:TEXT_LIMIT])


def format_counts(counts: Mapping[str, int]) -> str:
    """`newer_came 12, expired 3`: the most frequent first, and so many; empty when there is nothing to say."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if rest := sum(count for _, count in ordered[REASONS_SHOWN:]):
        ordered[REASONS_SHOWN:] = [("others", rest)]
    return ", ".join(f"{name} {count}" for name, count in ordered)


def summarize_result(result: dict[str, Any]) -> str:
    """`2 person 0.91 0.80, car 0.75`: the objects by label, or the likeliest class; empty when nothing was found."""
    if classes := result.get("classes"):
        return f"{classes[0]['label']} {classes[0]['score']:.2f}"
    by_label: dict[str, list[float]] = {}
    for item in result.get("objects", ()):
        by_label.setdefault(item["label"], []).append(item["score"])
    parts = []
    for label, scores in by_label.items():
        count = f"{len(scores)} " if len(scores) > 1 else ""
        parts.append(f"{count}{label} {' '.join(f'{score:.2f}' for score in scores)}")
    if not parts and "values" in result:
        return ", ".join(f"{name} {_short(value)}" for name, value in result["values"].items())
    return ", ".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value['dtype']} {value['shape']}"
    if isinstance(value, list):
        return f"[{len(value)} values]" if len(value) > 4 else str([_short(item) for item in value]).replace("'", "")
    return f"{value:.4g}" if isinstance(value, float) else str(value)
