"""Energy from counters and from power, and which rails add up."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor.sensors.counters import EnergyIntegrator, MonotonicCounter, is_additive

LIMIT = 1000


def test_a_counter_has_no_difference_at_first() -> None:
    assert MonotonicCounter(LIMIT).delta(5) is None


@given(st.lists(st.integers(0, LIMIT - 1), min_size=1))
def test_a_counter_with_a_limit_counts_all_however_often_it_wraps(steps: list[int]) -> None:
    counter = MonotonicCounter(LIMIT)
    counter.delta(7)
    total, found = 7, []
    for step in steps:
        total += step
        found.append(counter.delta(total % LIMIT))
    assert found == steps


def test_a_counter_without_a_limit_that_goes_back_has_no_difference_once() -> None:
    counter = MonotonicCounter()
    assert [counter.delta(value) for value in (100, 140, 3, 10)] == [None, 40, None, 7]


@pytest.mark.parametrize("counter", [MonotonicCounter(), MonotonicCounter(LIMIT)])
def test_a_gap_in_a_counter_is_no_difference(counter: MonotonicCounter) -> None:
    assert [counter.delta(value) for value in (1, None, 5, 6)] == [None, None, None, 1]


def test_energy_of_a_power_that_rises_is_the_area_under_the_line() -> None:
    integral = EnergyIntegrator()
    powers = [(0.0, 10.0), (0.5, 20.0), (2.5, 20.0)]
    assert [integral.delta_j(power_w, now_s) for now_s, power_w in powers] == [None, 7.5, 40.0]


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=20), st.floats(0.01, 10))
def test_energies_add_up_to_that_of_the_whole_time(powers: list[float], step_s: float) -> None:
    integral = EnergyIntegrator()
    found = [integral.delta_j(power_w, place * step_s) for place, power_w in enumerate(powers)]
    whole = sum((before + after) / 2 * step_s for before, after in pairwise(powers))
    assert sum(energy_j for energy_j in found if energy_j is not None) == pytest.approx(whole)


def test_power_that_was_not_known_for_a_while_makes_no_energy_up() -> None:
    integral = EnergyIntegrator()
    powers = [5.0, None, 5.0, 5.0]
    assert [integral.delta_j(power_w, float(now_s)) for now_s, power_w in enumerate(powers)] == [None, None, None, 5.0]


def test_two_looks_at_one_moment_have_no_energy() -> None:
    integral = EnergyIntegrator()
    assert [integral.delta_j(5.0, 1.0), integral.delta_j(5.0, 1.0)] == [None, None]


@pytest.mark.parametrize(
    ("rail", "counts"),
    [("package-0", True), ("dram-0", True), ("package-0/core", False), ("board/psys", False), ("VDD_IN", True)],
)
def test_a_rail_with_a_slash_is_not_added_up(rail: str, counts: bool) -> None:
    assert is_additive(rail) is counts
