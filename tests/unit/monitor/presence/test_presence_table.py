"""The presence table of the live view and the daemon: what it keeps, forgets and sums up."""

from __future__ import annotations

from pathlib import Path

import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.dispatch.presence import SourceRecord, WorkerRecord
from brokers.dispatch.worker_registry import FORGET_AFTER_S, PRESENCE_TIMEOUT_S
from monitor.presence.presence_table import (
    STAGE_EXPIRY_S,
    STAGES_LIMIT,
    TEXT_LIMIT_CHARACTERS,
    PresenceTable,
    StageKey,
    create_presence_table,
)
from tests.support.brokers.presence_records import source_publication, worker_publication
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file

BODY = StageKey("local", "street", "body")


def apply_records(
    table: PresenceTable, *records: tuple[str, WorkerRecord | SourceRecord], now_s: float = 0.0
) -> PresenceTable:
    for topic, record in records:
        table.on_presence(topic, record.to_bytes(), now_s)
    return table


def worker_names(table: PresenceTable, now_s: float = 0.0) -> dict[str, list[str]]:
    return {key.stage: [each.worker for each in found] for key, found in table.live_workers_by_stage(now_s).items()}


# Records ----------------------------------------------------------------------------------------------------------


def test_table_lists_workers_and_sources_by_topic() -> None:
    table = apply_records(
        PresenceTable(), worker_publication("a"), worker_publication("b", state="draining"), source_publication()
    )
    assert [record.worker for record in table.workers.values()] == ["a", "b"]
    assert [record.source for record in table.sources.values()] == ["cam"]
    assert table.stages_up() == {"body"}
    apply_records(table, worker_publication("a", done=4))
    assert table.workers[worker_publication("a")[0]].load.done == 4
    table.on_presence(worker_publication("a")[0], b"", 0.0)
    assert table.stages_up() == set()


def test_same_worker_name_in_two_pipelines_makes_two_entries() -> None:
    table = apply_records(PresenceTable(), worker_publication("w1"), worker_publication("w1", pipeline="yard"))
    table.on_presence(worker_publication("w1", pipeline="yard")[0], b"", 1.0)
    assert list(table.workers) == [worker_publication("w1")[0]]


def test_silent_worker_is_lost_until_its_next_record() -> None:
    topic, record = worker_publication()
    table = apply_records(PresenceTable(), (topic, record))
    assert not table.is_lost(topic, PRESENCE_TIMEOUT_S)
    assert table.is_lost(topic, PRESENCE_TIMEOUT_S + 0.1)
    assert (table.live_workers(11.0), table.lost_workers(11.0)) == ([], [record])
    apply_records(table, (topic, record), now_s=11.0)
    assert (table.live_workers(12.0), table.lost_workers(12.0)) == ([record], [])


def test_rejected_records_are_counted() -> None:
    topic, record = worker_publication()
    table = apply_records(PresenceTable(), ("sparse/local/street/body/up/other", record))
    table.on_presence(topic, record.to_bytes().replace(b'"queue":0', b'"queue":-1'), 0.0)
    table.on_presence(topic, b"?", 0.0)
    assert (table.workers, table.rejected) == ({}, 3)


def test_texts_are_cut_and_unused_lists_dropped() -> None:
    topic, record = worker_publication(node="n" * 5000, device="d" * 5000, formats=("f" * 100,) * 32)
    table = apply_records(PresenceTable(), (topic, record), source_publication(node="n" * 5000))
    kept = table.workers[topic]
    assert (kept.node, kept.device, kept.formats) == ("n" * TEXT_LIMIT_CHARACTERS, "d" * TEXT_LIMIT_CHARACTERS, ())
    assert [len(source.node) for source in table.sources.values()] == [TEXT_LIMIT_CHARACTERS]


def test_updated_since_leaves_out_retained_and_older_records() -> None:
    table = PresenceTable()
    for name, now_s, retained in (("old", 1.0, False), ("retained", 2.0, True), ("new", 2.0, False)):
        topic, record = worker_publication(name)
        table.on_presence(topic, record.to_bytes(), now_s, retained=retained)
    assert table.updated_since(2.0) == [worker_publication("new")[1]]


def test_problem_counts_sum_all_sources_and_outlive_them() -> None:
    table = apply_records(
        PresenceTable(),
        source_publication("cam", retries={"WorkerLost": 1}),
        source_publication("cam", retries={"WorkerLost": 2}, dropped={"superseded": 5}),
        source_publication("door", retries={"WorkerLost": 1, "Busy": 1}, failed={"Poison": 1}),
    )
    expected = {"retried": {"WorkerLost": 3, "Busy": 1}, "dropped": {"superseded": 5}, "failed": {"Poison": 1}}
    assert table.problem_counts() == expected
    for _ in range(2):
        table.on_presence(source_publication("cam")[0], b"", 1.0)
    assert table.sources.keys() == {source_publication("door")[0]}
    assert table.problem_counts() == expected


# Stages -----------------------------------------------------------------------------------------------------------


def test_invented_stages_are_bounded_and_known_ones_stay() -> None:
    table = apply_records(PresenceTable(), worker_publication("w1", queue=1))
    apply_records(table, *(worker_publication("w", f"fake{number}") for number in range(3 * STAGES_LIMIT)))
    assert len(table.live_workers_by_stage(0.0)) == len(table.workers) == STAGES_LIMIT
    assert table.rejected == 2 * STAGES_LIMIT + 1
    apply_records(table, worker_publication("w1"), worker_publication("w2"))
    assert worker_names(table)["body"] == ["w1", "w2"]


def test_stages_of_the_pipeline_file_always_have_a_place(tmp_path: Path) -> None:
    stages = [stage_table("body", "add_one"), stage_table("tail", "double")]
    table = create_presence_table(load_pipeline(write_pipeline_file(tmp_path, stages, name="street")))
    assert worker_names(table) == {"body": [], "tail": []}
    apply_records(table, *(worker_publication("w", f"fake{number}") for number in range(2 * STAGES_LIMIT)))
    apply_records(table, worker_publication("w1", "body"))
    assert worker_names(table)["body"] == ["w1"]
    table.expire(STAGE_EXPIRY_S + 1)
    assert worker_names(table, STAGE_EXPIRY_S + 1) == {"body": [], "tail": []}


def test_silent_workers_make_room_for_others() -> None:
    table = apply_records(
        PresenceTable(), *(worker_publication(f"old{number}") for number in range(5000)), source_publication()
    )
    count = len(table.workers)
    assert count < 5000
    table.expire(FORGET_AFTER_S)
    assert len(table.workers) == count
    table.expire(FORGET_AFTER_S + 1)
    assert (table.workers, table.sources) == ({}, {})
    apply_records(table, worker_publication("new"), now_s=FORGET_AFTER_S + 1)
    assert len(table.workers) == 1


@pytest.mark.parametrize("cleared", [True, False], ids=["cleared", "silent"])
def test_stage_without_workers_is_listed_for_an_hour(cleared: bool) -> None:
    topic, record = worker_publication()
    table = apply_records(PresenceTable(), (topic, record))
    if cleared:
        table.on_presence(topic, b"", 1.0)
    table.expire(STAGE_EXPIRY_S)
    assert table.live_workers_by_stage(STAGE_EXPIRY_S) == {BODY: []}
    table.expire(STAGE_EXPIRY_S + 1)
    assert table.live_workers_by_stage(STAGE_EXPIRY_S + 1) == {}
