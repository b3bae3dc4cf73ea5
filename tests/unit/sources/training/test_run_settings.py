"""Learning rate schedules: warm-up, course and end."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.config.schema import TrainingTable
from sources.training.run_settings import learning_rate


def rates(steps: int, steps_per_epoch: int = 10, **settings: Any) -> list[float]:
    table = TrainingTable.model_validate({"lr": 0.5, **settings})
    return [learning_rate(table, step, steps_per_epoch) for step in range(steps)]


def test_constant_rate_is_that_of_the_file() -> None:
    assert set(rates(50)) == {0.5}


def test_warm_up_is_linear() -> None:
    assert rates(6, lr_warmup=4) == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_cosine_decays_from_the_rate_to_zero() -> None:
    course = rates(100, epochs=10, lr_schedule="cosine")
    assert course[0] == 0.5
    assert course[50] == pytest.approx(0.25)
    assert course[99] == pytest.approx(0.5 * 0.5 * (1 - math.cos(math.pi / 100)))
    assert course == sorted(course, reverse=True)


def test_cosine_begins_after_the_warm_up() -> None:
    course = rates(100, epochs=10, lr_schedule="cosine", lr_warmup=20)
    assert course[:20] == [0.5 * (step + 1) / 20 for step in range(20)]
    assert course[20] == 0.5
    assert course[60] == pytest.approx(0.25)
    assert course[20:] == sorted(course[20:], reverse=True)


def test_step_schedule_multiplies_at_the_first_step_of_its_epochs() -> None:
    course = rates(60, lr_schedule="step", lr_every=2, lr_factor=0.1)
    assert course == pytest.approx([0.5] * 20 + [0.05] * 20 + [0.005] * 20)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
@given(data=st.data())
def test_rate_is_positive_and_at_most_that_of_the_file(schedule: str, data: st.DataObject) -> None:
    epochs, per_epoch = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 200))
    warm_up = data.draw(st.integers(0, 2 * epochs * per_epoch))
    step = data.draw(st.integers(0, epochs * per_epoch - 1))
    table = TrainingTable.model_validate({"lr": 0.3, "epochs": epochs, "lr_schedule": schedule, "lr_warmup": warm_up})
    assert 0 < learning_rate(table, step, per_epoch) <= 0.3
