"""The spool: batches on disk in order, bounded, counted, and recovered by the next process."""

from __future__ import annotations

import gzip
import logging
from pathlib import Path

import pytest

from monitor.errors import BadStore
from monitor.stores.influx.spool import Spool
from tests.support.environment.full_disk import full_disk


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def drain(spool: Spool) -> list[bytes]:
    batches = []
    while first := spool.first():
        batches.append(first[1])
        spool.ack()
    return batches


def test_batches_come_out_in_order_and_are_deleted(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "new" / "spool")
    for number in range(12):
        spool.put(b"%d" % number, 10)
    assert spool.point_count == 120
    assert drain(spool) == [b"%d" % number for number in range(12)]
    assert (spool.point_count, spool.dropped, file_names(spool.folder)) == (0, 0, [])


def test_first_batch_stays_until_it_is_acknowledged(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.put(b"a", 1)
    spool.put(b"b", 1)
    assert spool.first() is not None
    assert drain(spool) == [b"a", b"b"]


def test_next_process_recovers_batches_in_order(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    batches = [gzip.compress(b"%d" % number) for number in range(4)]
    for number in range(3):
        first.put(batches[number], number)
    first.close()
    (tmp_path / ".000000000009-5.lp.gz.123.part").write_bytes(b"an unfinished write")
    (tmp_path / "foreign").write_bytes(b"another program's file")
    second = Spool(tmp_path)
    assert second.point_count == 3
    second.put(batches[3], 1)
    assert drain(second) == batches
    assert file_names(tmp_path) == ["foreign"]


def test_full_spool_drops_and_counts_the_oldest_after_the_first(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit_bytes=3 * 4096)
    for number in range(5):
        spool.put(bytes([number]) * 4000, 10 + number)
    assert spool.dropped == 11 + 12
    assert spool.point_count == 10 + 13 + 14
    assert len(file_names(tmp_path)) == 3
    assert [data[0] for data in drain(spool)] == [0, 3, 4]  # the server may have the first


def test_small_file_counts_as_a_disk_block(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit_bytes=3 * 4096)
    for _ in range(5):
        spool.put(b"small", 1)
    assert (spool.point_count, spool.dropped) == (3, 2)


def test_batch_larger_than_the_spool_is_dropped(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit_bytes=2 * 4096)
    spool.put(b"small", 1)
    spool.put(b"x" * 9000, 5)
    assert (spool.point_count, spool.dropped) == (1, 5)


def test_smaller_limit_applies_to_recovered_batches(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for _ in range(5):
        spool.put(b"x", 2)
    spool.close()
    reopened = Spool(tmp_path, limit_bytes=2 * 4096)
    assert (reopened.point_count, reopened.dropped) == (4, 6)


def test_deleted_file_is_counted_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = Spool(tmp_path)
    spool.put(b"a", 3)
    spool.put(b"b", 1)
    (tmp_path / file_names(tmp_path)[0]).unlink()
    with caplog.at_level(logging.WARNING):
        assert drain(spool) == [b"b"]
    assert (spool.point_count, spool.dropped) == (0, 3)
    assert "lost 3 points" in caplog.text


def test_damaged_file_of_a_previous_process_is_counted(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    first.put(gzip.compress(b"a")[:-5], 3)
    first.close()
    second = Spool(tmp_path)
    assert drain(second) == []
    assert (second.point_count, second.dropped) == (0, 3)


def test_full_disk_raises_and_leaves_no_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    with full_disk(1000), pytest.raises(OSError, match="too large"):
        spool.put(b"x" * 2000, 1)
    assert (spool.point_count, file_names(tmp_path)) == (0, [])
    spool.put(b"small", 1)
    assert drain(spool) == [b"small"]


def test_folder_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    with pytest.raises(BadStore) as caught:
        Spool(tmp_path)
    assert str(caught.value) == f"telemetry in {tmp_path}: another monitor uses it"
    spool.close()
    spool.close()
    Spool(tmp_path).close()


def test_unusable_folder_raises_bad_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadStore) as caught:
        Spool(tmp_path / "file" / "spool")
    assert str(caught.value) == f"telemetry in {tmp_path}/file/spool: cannot write there: not a directory"
    with pytest.raises(BadStore, match="cannot write there"):
        Spool(Path("/proc/self/spool"))  # not writable even for root
