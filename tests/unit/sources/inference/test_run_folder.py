"""Files of JSON lines: torn lines and full disks."""

from __future__ import annotations

from pathlib import Path

import pytest

from brokers.errors import BadFile
from sources.inference.run_folder import JsonlWriter, read_jsonl
from tests.support.environment.full_disk import full_disk


def write(path: Path, *items: int) -> None:
    writer = JsonlWriter(path)
    for item in items:
        writer.append({"item": item})
    writer.close()


def read(path: Path) -> list[int]:
    return [line["item"] for line in read_jsonl(path)]


def test_lines_are_appended(tmp_path: Path) -> None:
    write(tmp_path / "new" / "a.jsonl", 1, 2)
    write(tmp_path / "new" / "a.jsonl", 3)
    assert read(tmp_path / "new" / "a.jsonl") == [1, 2, 3]


def test_torn_line_is_skipped_and_damages_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    write(path, 1, 2)
    path.write_bytes(path.read_bytes()[:-3])
    write(path, 3, 4)
    assert read(path) == [1, 3, 4]
    assert "skipped line 2" in caplog.text


def test_full_disk_costs_lines_and_two_warnings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    writer = JsonlWriter(path)
    writer.append({"item": 1})
    with Path("/dev/full").open("ab", buffering=0) as full, monkeypatch.context() as patch:
        patch.setattr(writer, "_file", full)
        writer.append({"item": 2})
        writer.append({"item": 3})
    writer.append({"item": 4})
    writer.close()
    writer.close()
    assert read(path) == [1, 4]
    assert len(caplog.messages) == 2
    assert "2 lines are missing" in caplog.text


def test_folder_that_cannot_be_made_raises_bad_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFile, match="the results cannot be written"):
        JsonlWriter(tmp_path / "file" / "a.jsonl")


def test_full_disk_is_found_at_the_start(tmp_path: Path) -> None:
    with full_disk(0), pytest.raises(BadFile, match="the results cannot be written: File too large"):
        JsonlWriter(tmp_path / "run" / "a.jsonl")
    assert list((tmp_path / "run").iterdir()) == []
