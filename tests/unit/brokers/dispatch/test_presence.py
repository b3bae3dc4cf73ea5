"""Presence records: which fields and values are valid, and what a malformed one raises."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.dispatch.presence import (
    OTHER_REASON,
    REASON_LIMIT,
    RECORD_LIMIT_BYTES,
    SourceLoad,
    SourceRecord,
    WorkerRecord,
    normalize_reason_counts,
)
from brokers.errors import BadPayload, WireError
from tests.support.brokers.presence_records import make_worker_record
from tests.support.errors import raises_error

SOURCE = SourceRecord(source="cam", pipeline="street", site="local", node="here", pid=1)
WORKER = make_worker_record("w.1_-Z")


def parse_changed(record: WorkerRecord | SourceRecord, change: dict[str, Any]) -> WorkerRecord | SourceRecord:
    fields = {**json.loads(record.to_bytes()), **change}
    return type(record).from_bytes(json.dumps(fields).encode())


def test_records_survive_encoding_and_decoding() -> None:
    load = SourceLoad(requests=9, results=7, dropped={"superseded": 2}, retries={"WorkerLost": 1}, duplicates=1)
    source = SOURCE.model_copy(update={"load": load, "up_s": 1.5})
    assert SourceRecord.from_bytes(source.to_bytes()) == source
    assert WorkerRecord.from_bytes(WORKER.to_bytes()) == WORKER


def test_records_know_their_topics() -> None:
    assert WORKER.topic == "sparse/local/street/head/up/w.1_-Z"
    assert SOURCE.topic == "sparse/local/street/source/up/cam"


def test_unknown_fields_are_ignored() -> None:
    load = {**json.loads(WORKER.to_bytes())["load"], "watts": None}
    assert parse_changed(WORKER, {"gpu_memory": 5, "load": load}) == WORKER


def test_optional_fields_have_defaults() -> None:
    fields = json.loads(WORKER.to_bytes())
    del fields["up_s"], fields["load"]["rejected"], fields["load"]["expired"]
    record = WorkerRecord.from_bytes(json.dumps(fields).encode())
    assert (record.up_s, record.load.rejected, record.load.expired) == (None, 0, 0)


BAD_NAMES = [{"worker": "a/b"}, {"worker": "#"}, {"worker": ""}, {"worker": "a\n"}, {"stage": "+"}, {"pipeline": "ü"}]
BAD_TYPES = [{"worker": 5}, {"capacity": 0}, {"capacity": "many"}, {"state": "asleep"}, {"load": 5}]
BAD_NUMBERS = [{"pid": None}, {"pid": -1}, {"pid": 1 << 53}, {"max_message_bytes": 0}, {"max_message_bytes": -5}]
BAD_LOADS = [{"task_ms": -1}, {"busy": 2}, {"task_ms": float("nan")}, {"rate": float("inf")}, {"queue": 0.5}]


@pytest.mark.parametrize(
    "change", BAD_NAMES + BAD_TYPES + BAD_NUMBERS + [{"load": load} for load in BAD_LOADS], ids=str
)
def test_malformed_worker_record_raises_bad_payload_naming_the_field(change: dict[str, Any]) -> None:
    with pytest.raises(BadPayload, match=f"not a presence record: {next(iter(change))}"):
        parse_changed(WORKER, change)


@pytest.mark.parametrize("field", ["worker", "stage", "pipeline", "site", "node", "pid", "device", "capacity"])
def test_missing_field_raises_bad_payload_naming_the_field(field: str) -> None:
    fields = json.loads(WORKER.to_bytes())
    del fields[field]
    with pytest.raises(BadPayload, match=f"{field}: Field required"):
        WorkerRecord.from_bytes(json.dumps(fields).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"source": "a/b"},
        {"up_s": -1},
        {"up_s": float("nan")},
        {"state": "asleep"},
        {"load": {"dropped": {"a b": 1}}},
        {"load": {"dropped": {"a": -1}}},
        {"load": {"retries": {"a": 1 << 60}}},
        {"load": {"failed": {f"e{number}": 1 for number in range(REASON_LIMIT + 1)}}},
        {"load": {"rate": float("inf")}},
        {"node": "n" * RECORD_LIMIT_BYTES},
    ],
    ids=lambda change: str(change)[:40],
)
def test_malformed_source_record_raises_bad_payload(change: dict[str, Any]) -> None:
    with pytest.raises(BadPayload, match="not a presence record"):
        parse_changed(SOURCE, change)


@pytest.mark.parametrize("record", [WORKER, SOURCE], ids=["worker", "source"])
def test_other_protocol_version_raises_version_mismatch(record: WorkerRecord | SourceRecord) -> None:
    with raises_error(WireError, "VersionMismatch"):
        parse_changed(record, {"version": "2"})


@pytest.mark.parametrize("version", ["2", 2, None])
def test_version_is_checked_before_the_other_fields(version: object) -> None:
    with raises_error(WireError, "VersionMismatch"):
        WorkerRecord.from_bytes(json.dumps({"capacity": "many", "version": version}).encode())


@given(st.binary(max_size=60))
def test_arbitrary_bytes_raise_only_wire_errors(payload: bytes) -> None:
    for candidate in (payload, b"{" + payload, b"[" * 100_000):
        with pytest.raises(WireError):
            WorkerRecord.from_bytes(candidate)


def test_reason_counts_are_normalized_to_fit_a_record() -> None:
    counts = {"": 1, "a b": 2, "a_b": 3, "ü" * 100: 4, **{f"made-up-{number}": 1 for number in range(1000)}}
    result = normalize_reason_counts(counts)
    assert REASON_LIMIT - 1 <= len(result) <= REASON_LIMIT
    assert sum(result.values()) == sum(counts.values())
    assert result["a_b"] == 5
    assert result[OTHER_REASON] > 900
    record = SOURCE.model_copy(update={"load": SourceLoad(failed=counts)})
    assert record.load.failed == result
    assert SourceRecord.from_bytes(record.to_bytes()) == record
    assert normalize_reason_counts({"WorkerLost": 2, "Busy": 0}) == {"WorkerLost": 2}
