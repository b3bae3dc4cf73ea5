"""The liveness file is touched where the environment names one."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from brokers.process.liveness_file import LivenessFile


def test_touch_creates_and_updates_the_file(tmp_path: Path) -> None:
    path = tmp_path / "liveness"
    liveness = LivenessFile({"SPARSE_LIVENESS_FILE": str(path)})
    assert not path.exists()
    liveness.touch()
    os.utime(path, (0, 0))
    liveness.touch()
    assert path.stat().st_mtime > 0


@pytest.mark.parametrize("environment", [{}, {"SPARSE_LIVENESS_FILE": ""}])
def test_without_the_variable_no_file_is_created(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    LivenessFile(environment).touch()
    assert list(tmp_path.iterdir()) == []


def test_unwritable_file_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    liveness = LivenessFile({"SPARSE_LIVENESS_FILE": str(tmp_path / "no folder" / "liveness")})
    with caplog.at_level(logging.WARNING):
        liveness.touch()
        liveness.touch()
    assert len(caplog.records) == 1
