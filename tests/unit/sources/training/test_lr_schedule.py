"""The learning rate of a step: of each schedule, its beginning, its end, and what lies between."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.config.schema import TrainingTable
from sources.training.lr_schedule import learning_rate


def rates(steps: int, steps_per_epoch: int = 10, **table: Any) -> list[float]:
    made = TrainingTable.model_validate({"lr": 0.5, **table})
    return [learning_rate(made, step, steps_per_epoch) for step in range(steps)]


def test_a_constant_rate_is_what_the_file_says() -> None:
    assert set(rates(50)) == {0.5}


def test_in_the_warmup_it_rises_in_equal_steps_to_the_rate_of_the_file() -> None:
    assert rates(6, lr_warmup=4) == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_a_cosine_begins_at_the_rate_and_is_half_of_it_half_way_and_near_nothing_at_the_end() -> None:
    found = rates(100, epochs=10, lr_schedule="cosine")
    assert found[0] == 0.5
    assert found[50] == pytest.approx(0.25)
    assert found[99] == pytest.approx(0.5 * 0.5 * (1 - math.cos(math.pi / 100)))
    assert found == sorted(found, reverse=True)


def test_a_cosine_begins_after_the_warmup_and_ends_with_the_run() -> None:
    found = rates(100, epochs=10, lr_schedule="cosine", lr_warmup=20)
    assert found[:20] == [0.5 * (step + 1) / 20 for step in range(20)]
    assert found[20] == 0.5
    assert found[60] == pytest.approx(0.25)
    assert found[20:] == sorted(found[20:], reverse=True)
    assert min(found[20:]) > 0


def test_a_rate_in_steps_falls_by_its_factor_at_the_first_step_of_its_epochs() -> None:
    found = rates(60, lr_schedule="step", lr_every=2, lr_factor=0.1)
    assert found == pytest.approx([0.5] * 20 + [0.05] * 20 + [0.005] * 20)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
@given(data=st.data())
def test_a_rate_is_above_zero_and_never_above_that_of_the_file(schedule: str, data: st.DataObject) -> None:
    epochs, per_epoch = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 200))
    warmup = data.draw(st.integers(0, 2 * epochs * per_epoch))
    step = data.draw(st.integers(0, epochs * per_epoch - 1))
    table = TrainingTable.model_validate({"lr": 0.3, "epochs": epochs, "lr_schedule": schedule, "lr_warmup": warmup})
    assert 0 < learning_rate(table, step, per_epoch) <= 0.3
