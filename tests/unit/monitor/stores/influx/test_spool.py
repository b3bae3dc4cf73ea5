"""Batches that wait on disk: in order, bounded, counted, and there for the next process."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from monitor.errors import BadStore
from monitor.stores.influx.spool import Spool
from tests.support.environment.full_disk import full_disk


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def drain(spool: Spool) -> list[bytes]:
    found = []
    while held := spool.take():
        found.append(held[1])
        spool.ack()
    return found


def test_what_is_put_in_comes_out_in_order_and_is_gone(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "new" / "spool")
    for number in range(12):
        spool.put(b"%d" % number, 10)
    assert spool.point_count == 120
    assert drain(spool) == [b"%d" % number for number in range(12)]
    assert (spool.point_count, spool.dropped, files(spool.folder)) == (0, 0, [])


def test_what_is_given_back_comes_again(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.put(b"a", 1)
    spool.put(b"b", 1)
    assert spool.take() is not None
    spool.release()
    assert drain(spool) == [b"a", b"b"]


def test_the_next_process_finds_what_was_left_in_order_and_goes_on_after_it(tmp_path: Path) -> None:
    first = Spool(tmp_path)
    for number in range(3):
        first.put(b"%d" % number, number)
    first.close()
    (tmp_path / "000000000009-5.lp.gz.half").write_bytes(b"killed in the middle")
    (tmp_path / "somebody's").write_bytes(b"not ours")
    second = Spool(tmp_path)
    assert second.point_count == 3
    second.put(b"3", 1)
    held = second.take()
    assert held is not None
    assert held[0].recovered
    assert drain(second) == [b"0", b"1", b"2", b"3"]
    assert files(tmp_path) == ["somebody's"]


def test_the_oldest_give_way_when_it_is_full_and_are_counted(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit_bytes=3 * 4096)
    for number in range(5):
        spool.put(bytes([number]) * 4000, 10 + number)
    assert spool.dropped == 10 + 11
    assert spool.point_count == 12 + 13 + 14
    assert len(files(tmp_path)) == 3
    assert [data[0] for data in drain(spool)] == [2, 3, 4]


def test_a_small_file_counts_as_what_it_takes_of_a_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit_bytes=3 * 4096)
    for _ in range(5):
        spool.put(b"small", 1)
    assert (spool.point_count, spool.dropped) == (3, 2)


def test_what_is_in_hand_does_not_give_way(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit_bytes=2 * 4096)
    spool.put(b"in hand", 1)
    assert spool.take() is not None
    for number in range(4):
        spool.put(b"%d" % number, 10)
    assert (spool.point_count, spool.dropped) == (1 + 10, 30)
    spool.ack()
    assert (spool.point_count, spool.dropped) == (10, 30)
    assert drain(spool) == [b"3"]


def test_a_batch_larger_than_all_is_dropped_and_nothing_gives_way(tmp_path: Path) -> None:
    spool = Spool(tmp_path, limit_bytes=2 * 4096)
    spool.put(b"small", 1)
    spool.put(b"x" * 9000, 5)
    assert (spool.point_count, spool.dropped) == (1, 5)


def test_a_smaller_limit_holds_for_what_was_left(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    for _ in range(5):
        spool.put(b"x", 2)
    spool.close()
    again = Spool(tmp_path, limit_bytes=2 * 4096)
    assert (again.point_count, again.dropped) == (4, 6)


def test_a_file_that_somebody_took_away_is_counted_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = Spool(tmp_path)
    spool.put(b"a", 3)
    spool.put(b"b", 1)
    (tmp_path / files(tmp_path)[0]).unlink()
    with caplog.at_level(logging.WARNING):
        assert drain(spool) == [b"b"]
    assert (spool.point_count, spool.dropped) == (0, 3)
    assert "lost 3 points" in caplog.text


def test_a_full_disk_takes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    with full_disk(1000), pytest.raises(OSError, match="too large"):
        spool.put(b"x" * 2000, 1)
    assert (spool.point_count, files(tmp_path)) == (0, [])
    spool.put(b"small", 1)
    assert drain(spool) == [b"small"]


def test_a_folder_is_of_one_process_at_a_time(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    with pytest.raises(BadStore) as caught:
        Spool(tmp_path)
    assert str(caught.value) == f"telemetry in {tmp_path}: another monitor uses it"
    spool.close()
    spool.close()
    Spool(tmp_path).close()


def test_a_folder_that_is_none_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadStore) as caught:
        Spool(tmp_path / "file" / "spool")
    assert str(caught.value) == f"telemetry in {tmp_path}/file/spool: points cannot wait there: not a directory"


def test_a_folder_that_cannot_be_written_is_one_line() -> None:
    folder = Path("/proc/self/spool")  # where not even root can
    with pytest.raises(BadStore, match=r"^telemetry in /proc/self/spool: points cannot wait there: "):
        Spool(folder)
    assert not os.path.exists(folder)
