"""Folders of runs."""

from __future__ import annotations

import re
from pathlib import Path

from brokers.process.files import new_run_folder


def test_run_folders_of_the_same_second_differ(tmp_path: Path) -> None:
    first = new_run_folder(tmp_path, "street")
    first.mkdir()
    assert new_run_folder(tmp_path, "street") != first
    assert re.fullmatch(r"street-\d{8}-\d{6}", first.name)
