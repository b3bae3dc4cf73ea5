"""Short intervals for all training tests of this folder."""

from __future__ import annotations

import pytest

from tests.support.training.in_process_pipeline import shorten_intervals


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_intervals(monkeypatch)
