"""A counter that was read at some moments has a value at every moment."""

from __future__ import annotations

import pytest

from monitor.analysis.counter_series import CounterSeries

COUNTER = CounterSeries(((10, 100.0), (20, 200.0), (40, 210.0)))


@pytest.mark.parametrize(
    ("time", "value"), [(9, 100.0), (10, 100.0), (15, 150.0), (20, 200.0), (30, 205.0), (99, 210.0)]
)
def test_value_is_interpolated_and_constant_outside(time: float, value: float) -> None:
    assert COUNTER.value_at(time) == value


@pytest.mark.parametrize(("time", "value"), [(0, 100.0), (10, 100.0), (11, 200.0), (41, 210.0)])
def test_value_after_is_the_next_reading(time: float, value: float) -> None:
    assert COUNTER.value_after(time) == value


def test_increase_is_the_difference_of_two_values() -> None:
    assert COUNTER.increase(15, 30) == 55.0
    assert COUNTER.increase(50, 60) == 0.0
