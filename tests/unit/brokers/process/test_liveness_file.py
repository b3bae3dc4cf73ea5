"""The pulse: a file that is touched at each beat, where one is named."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from brokers.process.liveness_file import LivenessFile


def test_a_beat_makes_the_file_and_makes_it_new_again(tmp_path: Path) -> None:
    file = tmp_path / "pulse"
    pulse = LivenessFile({"SPARSE_LIVENESS_FILE": str(file)})
    assert not file.exists()
    pulse.touch()
    os.utime(file, (0, 0))
    pulse.touch()
    assert file.stat().st_mtime > 0


@pytest.mark.parametrize("environment", [{}, {"SPARSE_LIVENESS_FILE": ""}])
def test_without_a_name_there_is_no_file(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    LivenessFile(environment).touch()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_told_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pulse = LivenessFile({"SPARSE_LIVENESS_FILE": str(tmp_path / "no folder" / "pulse")})
    with caplog.at_level(logging.WARNING):
        pulse.touch()
        pulse.touch()
    assert len(caplog.records) == 1
