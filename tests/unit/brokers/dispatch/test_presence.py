"""Records of who is up: what may stand in one, and what a record of another hand can do."""

from __future__ import annotations

import json
from typing import Any

import pytest

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
from tests.support.errors import raises_error

SOURCE = SourceRecord(source="cam", pipeline="street", site="local", node="here", pid=1)
WORKER = WorkerRecord(
    worker="w", stage="head", pipeline="street", site="local", node="here", pid=1, device="cpu", fingerprint="",
    capacity=1,
)  # fmt: skip


def test_a_record_of_a_source_reads_as_it_was_written() -> None:
    load = SourceLoad(requests=9, results=7, dropped={"superseded": 2}, retries={"WorkerLost": 1}, duplicates=1)
    record = SOURCE.model_copy(update={"load": load, "up_s": 1.5})
    assert SourceRecord.from_bytes(record.to_bytes()) == record


def test_a_worker_of_before_says_neither_its_age_nor_what_it_turned_away() -> None:
    fields = json.loads(WORKER.to_bytes())
    del fields["up_s"], fields["load"]["rejected"], fields["load"]["expired"]
    found = WorkerRecord.from_bytes(json.dumps(fields).encode())
    assert (found.up_s, found.load.rejected, found.load.expired) == (None, 0, 0)


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
)
def test_a_record_of_a_source_that_breaks_a_rule_is_refused(change: dict[str, Any]) -> None:
    fields = {**json.loads(SOURCE.to_bytes()), **change}
    with pytest.raises(BadPayload, match="not a presence record"):
        SourceRecord.from_bytes(json.dumps(fields).encode())


def test_a_source_of_another_version_is_told_apart() -> None:
    with raises_error(WireError, "VersionMismatch"):
        SourceRecord.from_bytes(SOURCE.model_copy(update={"version": "2"}).to_bytes())


def test_counts_by_reason_fit_a_record_whatever_the_reasons() -> None:
    wild = {"": 1, "a b": 2, "a_b": 3, "ü" * 100: 4, **{f"made-up-{number}": 1 for number in range(1000)}}
    found = normalize_reason_counts(wild)
    assert REASON_LIMIT - 1 <= len(found) <= REASON_LIMIT
    assert sum(found.values()) == sum(wild.values())
    assert found["a_b"] == 5
    assert found[OTHER_REASON] > 900
    record = SOURCE.model_copy(update={"load": SourceLoad(failed=found)})
    assert SourceRecord.from_bytes(record.to_bytes()) == record
    assert SourceLoad(failed=wild).failed == found
    assert normalize_reason_counts({"WorkerLost": 2, "Busy": 0}) == {"WorkerLost": 2}
