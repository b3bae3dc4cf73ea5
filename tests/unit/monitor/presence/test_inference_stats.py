"""What a run looks like from outside: births, results, and whatever else anybody publishes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from brokers.dispatch.presence import RECORD_LIMIT_BYTES, SourceLoad, SourceRecord, WorkerLoad, WorkerRecord
from monitor.presence.inference_stats import InferenceStats, format_counts, summarize_result
from monitor.presence.presence_table import RECORDS_LIMIT

CAMERA = "sparse/local/street/source/up/cam"


def birth(worker: str, stage: str, state: Any = "up", **load: Any) -> bytes:
    return WorkerRecord(
        worker=worker, stage=stage, pipeline="street", site="local", node="here", pid=1, device="cpu", fingerprint="",
        capacity=3, state=state, load=WorkerLoad(**load),
    ).to_bytes()  # fmt: skip


def source(name: str = "cam", **load: Any) -> bytes:
    return SourceRecord(
        source=name, pipeline="street", site="local", node="here", pid=1, load=SourceLoad(**load)
    ).to_bytes()


def result(**fields: Any) -> bytes:
    return json.dumps({"source": "door", "index": 7, "latency_ms": 50.0, "dropped": 0, **fields}).encode()


def objects(*found: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"label": label, "score": score, "box": [0, 0, 1, 1]} for label, score in found]


def test_workers_come_report_and_go() -> None:
    board = InferenceStats()
    board.on_presence("a", birth("a", "head"), 0.0)
    board.on_presence("b", birth("b", "tail", state="draining"), 0.0)
    assert board.stages_up() == {"head"}
    board.on_presence("a", birth("a", "head", done=4), 0.0)
    assert board.workers["a"].load.done == 4
    board.on_presence("a", b"", 0.0)
    board.on_presence("unknown", b"", 0.0)
    assert set(board.workers) == {"b"}


def test_workers_of_one_name_in_two_pipelines_are_two() -> None:
    board = InferenceStats()
    board.on_presence("sparse/local/street/head/up/head-1", birth("head-1", "head"), 0.0)
    board.on_presence("sparse/local/yard/head/up/head-1", birth("head-1", "head"), 0.0)
    board.on_presence("sparse/local/yard/head/up/head-1", b"", 1.0)
    assert list(board.workers) == ["sparse/local/street/head/up/head-1"]


def test_a_worker_that_has_not_reported_for_long_is_lost() -> None:
    board = InferenceStats()
    board.on_presence("a", birth("a", "head"), 0.0)
    assert not board.is_lost("a", 10.0)
    assert board.is_lost("a", 10.1)
    board.on_presence("a", birth("a", "head"), 11.0)
    assert not board.is_lost("a", 12.0)


def test_a_record_that_the_broker_had_kept_is_no_sign_of_life() -> None:
    board = InferenceStats()
    board.on_presence("a", birth("a", "head"), 0.0, retained=True)
    board.on_presence("b", birth("b", "head"), 0.0, retained=True)
    assert board.unconfirmed_topics == {"a", "b"}
    board.on_presence("a", birth("a", "head"), 1.0)
    assert board.unconfirmed_topics == {"b"}
    board.on_presence("b", b"", 1.0)
    assert board.unconfirmed_topics == set()


def test_a_source_is_no_worker_and_its_stage_is_none() -> None:
    board = InferenceStats()
    board.on_presence(CAMERA, source(results=3), 0.0, retained=True)
    assert (board.workers, board.stages_up(), board.rejected) == ({}, set(), 0)
    assert board.sources[CAMERA].load.results == 3
    assert board.unconfirmed_topics == {CAMERA}
    board.on_presence(CAMERA, source(results=4), 1.0)
    assert board.unconfirmed_topics == set()
    assert [board.is_lost(CAMERA, now_s) for now_s in (11.0, 11.1)] == [False, True]
    board.on_presence(CAMERA, b"", 12.0)
    assert board.sources == {}


def test_neither_kind_of_record_passes_for_the_other() -> None:
    board = InferenceStats()
    board.on_presence(CAMERA, birth("cam", "source"), 0.0)
    board.on_presence("sparse/local/street/head/up/cam", source(), 0.0)
    assert (board.workers, board.sources, board.rejected) == ({}, {}, 2)


def test_what_was_retried_and_dropped_is_the_sum_of_all_sources_and_outlives_them() -> None:
    board = InferenceStats()
    board.on_presence(CAMERA, source(retries={"WorkerLost": 1}), 0.0)
    board.on_presence(CAMERA, source(retries={"WorkerLost": 2}, dropped={"superseded": 5}), 0.0)
    other = "sparse/local/street/source/up/door"
    board.on_presence(other, source("door", retries={"WorkerLost": 1, "Busy": 1}, failed={"Poison": 1}), 0.0)
    wanted = {"retried": {"WorkerLost": 3, "Busy": 1}, "dropped": {"superseded": 5}, "failed": {"Poison": 1}}
    assert board.problem_counts() == wanted
    board.on_presence(CAMERA, b"", 1.0)
    board.on_presence(CAMERA, b"", 1.0)
    assert board.problem_counts() == wanted
    assert format_counts(wanted["retried"]) == "WorkerLost 3, Busy 1"
    assert format_counts({f"E{number}": 1 for number in range(10, 100)}).endswith(", E20 1, E21 1, others 78")


def test_records_of_many_topics_or_of_many_bytes_are_not_kept() -> None:
    board = InferenceStats()
    for number in range(RECORDS_LIMIT + 10):
        board.on_presence(f"sparse/local/street/head/up/{number}", birth(str(number), "head"), 0.0)
    assert (len(board.workers), board.rejected) == (RECORDS_LIMIT, 10)
    large = birth("0", "head").replace(b"here", b"h" * RECORD_LIMIT_BYTES)
    board.on_presence("sparse/local/street/head/up/0", large, 0.0)
    assert (board.workers["sparse/local/street/head/up/0"].node, board.rejected) == ("here", 11)


def test_a_find_does_not_command_the_terminal() -> None:
    board = InferenceStats()
    board.on_result(result(error="Bad\x1b[2J", reason="\r\n" + "x" * 10_000), 0.0)
    assert board.recent_results[0].text.startswith("Bad?[2J: ??xxx")
    assert len(board.recent_results[0].text) < 1000


def test_only_results_of_the_pipeline_count_and_what_is_of_none() -> None:
    board = InferenceStats("street")
    board.on_result(result(pipeline="street"), 0.0)
    board.on_result(result(pipeline="yard", error="BadPayload", dropped=9), 0.0)
    board.on_result(result(error="BadPayload"), 0.0)  # a gateway's refusal
    assert (board.results, board.failures.total(), board.dropped, board.rejected) == (1, 1, 0, 0)


def test_results_and_failures_are_counted_apart() -> None:
    board = InferenceStats()
    board.on_result(result(objects=objects(("dog", 0.9)), dropped=3), 1.0)
    board.on_result(result(error="BadPayload", reason="no picture", dropped=2), 2.0)
    assert (board.results, dict(board.failures), board.results_received, board.dropped) == (1, {"BadPayload": 1}, 2, 3)
    assert [find.text for find in board.recent_results] == ["dog 0.90", "BadPayload: no picture"]


def test_the_rate_is_of_the_last_seconds() -> None:
    board = InferenceStats()
    assert board.rate(0.0) == 0.0
    for index in range(100):
        board.on_result(result(), index / 10)  # ten a second
    assert board.rate(10.0) == pytest.approx(10.0, rel=0.05)
    assert board.rate(100.0) == 0.0


def test_percentiles_are_of_recent_results() -> None:
    board = InferenceStats()
    assert board.latency_ms(50) == 0.0
    for latency_ms in [1000.0] * 10 + [float(number) for number in range(256)]:
        board.on_result(result(latency_ms=latency_ms), 0.0)
    assert board.latency_ms(0) == 0.0
    assert board.latency_ms(100) == 255.0


@pytest.mark.parametrize(
    "garbage",
    [
        *(
            b"",
            b"?",
            b"[1]",
            b"null",
            b"\xff",
            b'{"latency_ms": "soon"}',
            b'{"objects": [1]}',
            b'{"classes": {"a": 1}}',
        ),
        *(b'{"dropped": []}', b'{"values": 3}', b'{"index": "x", "error": 1}', b"[" * 100_000),
    ],
)
def test_what_anybody_else_publishes_is_counted_and_does_no_harm(garbage: bytes) -> None:
    board = InferenceStats()
    board.on_result(garbage, 1.0)
    assert (board.rejected, board.results, board.recent_results) == (1, 0, board.recent_results)
    if garbage:
        board.on_presence("a", garbage, 0.0)
        assert board.rejected == 2
    assert board.workers == {}
    board.on_result(result(), 2.0)
    assert board.results == 1


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"objects": objects(("person", 0.91), ("car", 0.75), ("person", 0.8))}, "2 person 0.91 0.80, car 0.75"),
        ({"objects": []}, ""),
        ({"classes": [{"label": "tabby", "score": 0.5}, {"label": "lynx", "score": 0.2}]}, "tabby 0.50"),
        ({"values": {"celsius": 21.53219, "alarm": True, "on": 1}}, "celsius 21.53, alarm True, on 1"),
        ({"values": {"x": [1, 2], "y": list(range(9))}}, "x [1, 2], y [9 values]"),
        ({"values": {"z": {"dtype": "float32", "shape": [3]}}}, "z float32 [3]"),
    ],
)
def test_a_find_is_one_short_line(fields: dict[str, Any], text: str) -> None:
    assert summarize_result(fields) == text
