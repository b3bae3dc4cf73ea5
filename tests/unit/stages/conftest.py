"""A cache of verdicts for each test: the verdict on a network of one test is not read by another."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.verification import verdict_cache


@pytest.fixture(autouse=True)
def verdict_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder for verdicts; weights remain in the usual one."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(verdict_cache, "cache_folder", lambda: folder)
    return folder
