"""Atomic file writes, file locks and run folders."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from brokers.process.files import atomic_path, check_writable, file_lock, new_run_folder, write_atomic
from tests.support.environment.full_disk import full_disk


@pytest.mark.parametrize("durable", [False, True])
def test_write_replaces_the_file(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    write_atomic(path, b"new", durable=durable)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_the_old_file_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with atomic_path(path) as partial:
        partial.write_bytes(b"new")
        assert partial.parent == tmp_path
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_exception_keeps_the_old_file_and_removes_the_partial_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with contextlib.suppress(ZeroDivisionError), atomic_path(path) as partial:
        partial.write_bytes(b"ne")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_raises_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "no folder" / "a.json", b"")


def test_lock_is_exclusive_and_released_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with file_lock(path) as file:
        assert file.name == str(path)
        with pytest.raises(BlockingIOError), file_lock(path, wait=False):
            pass
    with file_lock(path, wait=False):
        pass


def test_run_folders_of_the_same_second_differ(tmp_path: Path) -> None:
    first = new_run_folder(tmp_path, "street")
    first.mkdir()
    assert new_run_folder(tmp_path, "street") != first
    assert re.fullmatch(r"street-\d{8}-\d{6}", first.name)


def test_writable_folder_is_created_and_stays_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_folder_on_a_full_disk_is_not_writable(tmp_path: Path) -> None:
    with full_disk(0), pytest.raises(OSError, match="File too large"):
        check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_read_only_folder_is_not_writable() -> None:
    with pytest.raises(OSError):
        check_writable(Path("/proc/self/new"))  # not writable even for root
