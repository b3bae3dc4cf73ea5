"""Statistics of published results, including results that any other client may publish."""

from __future__ import annotations

import json
from typing import Any

import pytest

from monitor.presence.inference_stats import InferenceStats, format_counts, summarize_result


def result(**fields: Any) -> bytes:
    return json.dumps({"source": "door", "index": 7, "latency_ms": 50.0, "dropped": 0, **fields}).encode()


def objects(*scores: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"label": label, "score": score, "box": [0, 0, 1, 1]} for label, score in scores]


def test_results_and_failures_are_counted_apart() -> None:
    stats = InferenceStats()
    stats.on_result(result(objects=objects(("dog", 0.9)), dropped=3), 1.0)
    stats.on_result(result(error="BadPayload", reason="no picture", dropped=2), 2.0)
    assert (stats.results, dict(stats.failures), stats.results_received, stats.dropped) == (1, {"BadPayload": 1}, 2, 3)
    assert [line.text for line in stats.recent_results] == ["dog 0.90", "BadPayload: no picture"]


def test_only_results_of_the_pipeline_or_of_none_count() -> None:
    stats = InferenceStats("street")
    stats.on_result(result(pipeline="street"), 0.0)
    stats.on_result(result(pipeline="yard", error="BadPayload", dropped=9), 0.0)
    stats.on_result(result(error="BadPayload"), 0.0)  # rejected at the ingress
    assert (stats.results, stats.failures.total(), stats.dropped, stats.rejected) == (1, 1, 0, 0)


def test_rate_counts_the_last_seconds() -> None:
    stats = InferenceStats()
    assert stats.rate(0.0) == 0.0
    for index in range(100):
        stats.on_result(result(), index / 10)  # ten a second
    assert stats.rate(10.0) == pytest.approx(10.0, rel=0.05)
    assert stats.rate(100.0) == 0.0


def test_rate_counts_from_the_first_result() -> None:
    stats = InferenceStats()
    for now_s in (100.0, 101.0):
        stats.on_result(result(latency_ms=0.0), now_s)
    assert stats.rate(101.0) == 2.0


def test_percentiles_are_nearest_rank_of_recent_results() -> None:
    stats = InferenceStats()
    assert stats.latency_ms(50) == 0.0
    for latency_ms in [1000.0] * 10 + [float(number) for number in range(1, 257)]:
        stats.on_result(result(latency_ms=latency_ms), 0.0)
    assert [stats.latency_ms(percent) for percent in (50, 95, 100)] == [128.0, 244.0, 256.0]


def test_control_characters_do_not_reach_the_terminal() -> None:
    stats = InferenceStats()
    stats.on_result(result(error="Bad\x1b[2J", reason="\r\n" + "x" * 10_000), 0.0)
    assert stats.recent_results[0].text.startswith("Bad?[2J: ??xxx")
    assert len(stats.recent_results[0].text) < 1000


MALFORMED = [b"", b"?", b"[1]", b"null", b"\xff", b"[" * 100_000]
WRONG_TYPES = [
    b'{"latency_ms": "soon"}',
    b'{"objects": [1]}',
    b'{"classes": {"a": 1}}',
    b'{"dropped": []}',
    b'{"values": 3}',
    b'{"index": "x", "error": 1}',
]


@pytest.mark.parametrize("payload", MALFORMED + WRONG_TYPES, ids=lambda payload: repr(payload[:20]))
def test_malformed_results_are_counted_and_ignored(payload: bytes) -> None:
    stats = InferenceStats()
    stats.on_result(payload, 1.0)
    assert (stats.rejected, stats.results, list(stats.recent_results)) == (1, 0, [])
    stats.on_result(result(), 2.0)
    assert stats.results == 1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"objects": objects(("person", 0.91), ("car", 0.75), ("person", 0.8))}, "2 person 0.91 0.80, car 0.75"),
        ({"objects": []}, ""),
        ({"classes": [{"label": "tabby", "score": 0.5}, {"label": "lynx", "score": 0.2}]}, "tabby 0.50"),
        ({"values": {"celsius": 21.53219, "alarm": True, "on": 1}}, "celsius 21.53, alarm True, on 1"),
        ({"values": {"x": [1, 2.0], "y": list(range(9))}}, "x [1, 2], y [9 values]"),
        ({"values": {"z": {"dtype": "float32", "shape": [3]}}}, "z float32 [3]"),
    ],
)
def test_result_is_summarized_in_one_line(fields: dict[str, Any], text: str) -> None:
    assert summarize_result(fields) == text


def test_counts_are_listed_by_frequency_and_bounded() -> None:
    assert format_counts({"Busy": 1, "WorkerLost": 3}) == "WorkerLost 3, Busy 1"
    assert format_counts({f"E{number}": 1 for number in range(10, 100)}).endswith(", E20 1, E21 1, others 78")
