"""Who is up, as a daemon keeps it for months, whatever is published to it; and what a scaler is told of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.dispatch.presence import SourceRecord, WorkerRecord
from monitor.daemon.autoscaling import stage_metrics
from monitor.presence.census import (
    EXPIRY_S,
    STAGE_EXPIRY_S,
    STAGES_LIMIT,
    TEXT_LIMIT_CHARACTERS,
    ExpiringPresenceTable,
    StageKey,
    create_presence_table,
)
from monitor.presence.presence_table import LOST_AFTER_S
from tests.support.brokers.presence_records import source_record, worker_record
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file


def apply_records(
    board: ExpiringPresenceTable, *records: tuple[str, WorkerRecord | SourceRecord], now_s: float = 0.0
) -> ExpiringPresenceTable:
    for topic, birth in records:
        board.on_presence(topic, birth.to_bytes(), now_s)
    return board


# What is believed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "topic",
    [
        "sparse/local/street/body/up/w2",
        "sparse/local/street/head/up/w1",
        "sparse/local/yard/body/up/w1",
        "sparse/cloud/street/body/up/w1",
        "sparse/local/street/source/up/w1",
        "sparse/local/street/body/in/w1",
    ],
)
def test_a_record_on_the_topic_of_another_is_not_believed(topic: str) -> None:
    board = apply_records(ExpiringPresenceTable(), (topic, worker_record()[1]))
    assert (board.workers, board.sources, board.rejected) == ({}, {}, 1)


def test_nor_is_a_source_of_another_name() -> None:
    board = apply_records(ExpiringPresenceTable(), ("sparse/local/street/source/up/cam2", source_record("cam")[1]))
    assert (board.sources, board.rejected) == ({}, 1)


def test_texts_are_cut_and_what_nobody_asks_for_is_not_kept() -> None:
    topic, birth = worker_record(node="n" * 5000, device="d" * 5000, formats=("f" * 100,) * 32)
    board = apply_records(ExpiringPresenceTable(), (topic, birth), source_record(node="n" * 5000))
    kept = board.workers[topic]
    assert (kept.node, kept.device, kept.formats) == ("n" * TEXT_LIMIT_CHARACTERS, "d" * TEXT_LIMIT_CHARACTERS, ())
    assert [len(source.node) for source in board.sources.values()] == [TEXT_LIMIT_CHARACTERS]


def test_a_flood_of_made_up_stages_ends_at_a_limit_and_known_stages_go_on() -> None:
    board = apply_records(ExpiringPresenceTable(), worker_record("w1", "body", queue=1))
    apply_records(board, *(worker_record("w", f"fake{number}") for number in range(3 * STAGES_LIMIT)))
    assert len(board.live_workers_by_stage(0.0)) == STAGES_LIMIT
    assert board.rejected == 2 * STAGES_LIMIT + 1
    apply_records(board, worker_record("w1", "body", queue=2), worker_record("w2", "body", queue=3))
    assert stage_metrics(board, 0.0)["street"]["body"]["queue"] == 5


def test_a_flood_of_made_up_stages_takes_no_place_from_a_stage_that_is_asked_for(tmp_path: Path) -> None:
    path = write_pipeline_file(tmp_path, [stage_table("body", "add_one")], name="street")
    board = create_presence_table(load_pipeline(path))
    apply_records(board, *(worker_record("w", f"fake{number}") for number in range(2 * STAGES_LIMIT)))
    apply_records(board, worker_record("w1", "body", queue=2))
    assert stage_metrics(board, 0.0)["street"]["body"]["workers"] == 1


# What is forgotten ----------------------------------------------------------------------------------------------------


def test_workers_that_come_and_go_under_new_names_leave_room_for_others() -> None:
    board = apply_records(
        ExpiringPresenceTable(), *(worker_record(f"old{number}") for number in range(5000)), source_record()
    )
    full = len(board.workers)
    board.expire(EXPIRY_S)
    assert len(board.workers) == full
    board.expire(EXPIRY_S + 1)
    assert (board.workers, board.sources) == ({}, {})
    apply_records(board, worker_record("new"), now_s=EXPIRY_S + 1)
    assert len(board.workers) == 1


def test_a_stage_without_workers_is_told_with_zeros_for_a_while() -> None:
    topic, birth = worker_record(queue=4, queue_ms=250, busy=0.5, rate=2)
    board = apply_records(ExpiringPresenceTable(), (topic, birth))
    board.on_presence(topic, b"", 1.0)
    nothing = {"workers": 0, "queue": 0, "queue_ms": 0.0, "busy": 0.0, "rate": 0.0, "site": "local"}
    assert stage_metrics(board, 1.0) == {"street": {"body": nothing}}
    board.expire(STAGE_EXPIRY_S)
    assert stage_metrics(board, STAGE_EXPIRY_S) == {"street": {"body": nothing}}
    board.expire(STAGE_EXPIRY_S + 1)
    assert stage_metrics(board, STAGE_EXPIRY_S + 1) == {}


def test_the_stages_of_a_file_are_told_from_the_beginning_to_the_end(tmp_path: Path) -> None:
    pipeline = load_pipeline(
        write_pipeline_file(tmp_path, [stage_table("head", "double"), stage_table("tail", "double")], name="street")
    )
    board = apply_records(create_presence_table(pipeline), worker_record("w1", "head"))
    assert board.expected_stages == {StageKey("local", "street", "head"), StageKey("local", "street", "tail")}
    assert {name: found["workers"] for name, found in stage_metrics(board, 0.0)["street"].items()} == {
        "head": 1,
        "tail": 0,
    }
    board.expire(STAGE_EXPIRY_S + 1)
    assert list(stage_metrics(board, STAGE_EXPIRY_S + 1)["street"]) == ["head", "tail"]


# What a scaler is told ------------------------------------------------------------------------------------------------


def test_the_wait_is_the_mean_over_tasks_so_that_an_idle_worker_hides_no_queue() -> None:
    board = apply_records(
        ExpiringPresenceTable(),
        worker_record("busy", queue=6, rate=2.0, queue_ms=900.0, busy=1.0),
        worker_record("half", queue=1, rate=1.0, queue_ms=100.0, busy=0.5),
        worker_record("idle"),
    )
    figures = stage_metrics(board, 0.0)["street"]["body"]
    assert figures == {"workers": 3, "queue": 7, "queue_ms": 740.0, "busy": 0.5, "rate": 3.0, "site": "local"}


def test_workers_that_do_not_take_tasks_do_not_count() -> None:
    board = apply_records(
        ExpiringPresenceTable(),
        worker_record("up", queue=1, queue_ms=10.0),
        worker_record("draining", state="draining", queue=9, queue_ms=5000.0),
        worker_record("standby", state="standby", queue=9, queue_ms=5000.0),
    )
    assert (figures := stage_metrics(board, LOST_AFTER_S)["street"]["body"])["workers"] == 1
    assert (figures["queue"], figures["queue_ms"]) == (1, 10.0)
    assert stage_metrics(board, LOST_AFTER_S + 0.1)["street"]["body"]["workers"] == 0


def test_a_stage_that_is_served_at_two_sites_is_one_stage() -> None:
    board = apply_records(
        ExpiringPresenceTable(), worker_record("a", site="cloud", queue=1), worker_record("b", site="cloudlet", queue=2)
    )
    assert stage_metrics(board, 0.0)["street"]["body"]["site"] == "cloud,cloudlet"
    assert stage_metrics(board, 0.0)["street"]["body"]["queue"] == 3


def test_figures_of_any_size_give_numbers_that_json_has() -> None:
    huge: dict[str, Any] = {"queue": (1 << 53) - 1, "queue_ms": 1e308, "rate": 1e308, "task_ms": 1e308}
    board = apply_records(ExpiringPresenceTable(), *(worker_record(f"w{number}", **huge) for number in range(20)))
    found = json.loads(json.dumps(stage_metrics(board, 0.0), allow_nan=False))
    assert found["street"]["body"]["workers"] == 20


@pytest.mark.parametrize("queue", [1 << 53, 10**400, -1])
def test_a_count_that_is_none_is_refused(queue: int) -> None:
    topic, birth = worker_record()
    board = ExpiringPresenceTable()
    board.on_presence(topic, birth.to_bytes().replace(b'"queue":0', f'"queue":{queue}'.encode()), 0.0)
    assert (board.workers, board.rejected) == ({}, 1)
