"""Counters that wrap or restart, energy from power, and additive rails."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor.sensors.counters import EnergyIntegrator, MonotonicCounter, is_additive

RANGE = 1000


def increases(counter: MonotonicCounter, *values: int | None) -> list[int | None]:
    return [counter.increase(value) for value in values]


def test_increase_of_first_reading_is_unknown() -> None:
    assert increases(MonotonicCounter(RANGE), 5) == [None]


@given(st.lists(st.integers(0, RANGE - 1), min_size=1))
def test_counter_that_wraps_is_exact(steps: list[int]) -> None:
    counter = MonotonicCounter(RANGE)
    total = 7
    counter.increase(total)
    for step in steps:
        total += step
        assert counter.increase(total % RANGE) == step


@given(st.integers(0, RANGE - 1), st.integers(0, RANGE // 2))
def test_counter_that_also_restarts_is_exact_up_to_half_its_range(last: int, step: int) -> None:
    counter = MonotonicCounter(RANGE, restarts=True)
    assert increases(counter, last, (last + step) % RANGE)[1] == step


@given(st.integers(0, 1 << 63), st.integers(0, 1 << 63))
def test_increase_is_never_negative(last: int, value: int) -> None:
    increase = increases(MonotonicCounter(1 << 32, restarts=True), last, value)[1]
    assert increase is not None
    assert 0 <= increase <= max(value, 1 << 31)


@pytest.mark.parametrize(("last", "value"), [(900, 700), (RANGE + 5, 10)])  # more than half the range; beyond it
def test_implausible_wrap_is_a_restart(last: int, value: int) -> None:
    assert increases(MonotonicCounter(RANGE, restarts=True), last, value, value + 7) == [None, value, 7]


def test_drop_of_plain_counter_is_unknown_once() -> None:
    assert increases(MonotonicCounter(), 100, 140, 3, 10) == [None, 40, None, 7]


@pytest.mark.parametrize("counter", [MonotonicCounter(), MonotonicCounter(RANGE)])
def test_failed_reading_makes_two_increases_unknown(counter: MonotonicCounter) -> None:
    assert increases(counter, 1, None, 5, 6) == [None, None, None, 1]


def test_energy_of_rising_power_is_area_under_line() -> None:
    integrator = EnergyIntegrator()
    powers = [(0.0, 10.0), (0.5, 20.0), (2.5, 20.0)]
    assert [integrator.increase_j(power_w, now_s) for now_s, power_w in powers] == [None, 7.5, 40.0]


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=20), st.floats(0.01, 10))
def test_energies_add_up_to_total(powers: list[float], step_s: float) -> None:
    integrator = EnergyIntegrator()
    energies = [integrator.increase_j(power_w, place * step_s) for place, power_w in enumerate(powers)]
    total = sum((before + after) / 2 * step_s for before, after in pairwise(powers))
    assert sum(energy_j for energy_j in energies if energy_j is not None) == pytest.approx(total)


def test_unknown_power_has_no_energy() -> None:
    integrator = EnergyIntegrator()
    energies = [integrator.increase_j(power_w, now_s) for now_s, power_w in enumerate([5.0, None, 5.0, 5.0])]
    assert energies == [None, None, None, 5.0]


def test_two_samples_at_one_time_have_no_energy() -> None:
    integrator = EnergyIntegrator()
    assert [integrator.increase_j(5.0, 1.0), integrator.increase_j(5.0, 1.0)] == [None, None]


@pytest.mark.parametrize(
    ("rail", "additive"),
    [("package-0", True), ("dram-0", True), ("package-0/core", False), ("board/psys", False), ("VDD_IN", True)],
)
def test_rail_with_slash_is_not_additive(rail: str, additive: bool) -> None:
    assert is_additive(rail) is additive
