"""Wherever the parts of a network are, and whichever way its labels go: it learns the same, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest

from tests.soak.harness.training_run import Lesson, assert_equal, expected, lesson_file
from tests.support.pipelines.processes import Machine

SUITES: dict[str, dict[str, Any]] = {
    "on-device": {"sites": ("device", "cloudlet", "cloud"), "schedule": "gpipe"},
    "U-shaped": {"sites": ("device", "cloud", "device"), "labels": "stay"},
}


@pytest.mark.parametrize("suite", SUITES)
def test_the_suites_learn_what_the_uncut_network_learns(box: Machine, suite: str) -> None:
    lesson = Lesson(box, lesson_file(box.folder, epochs=4, **SUITES[suite]))
    summary = lesson.end()
    assert (summary["steps"], summary["rolled_back"]) == (12, 0)
    assert_equal(lesson.weights(), expected(12))
    box.nothing_is_left()
