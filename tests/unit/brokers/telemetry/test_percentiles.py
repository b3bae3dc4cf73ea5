"""Nearest-rank percentiles, and the rate of the last seconds."""

from __future__ import annotations

import numpy as np
import pytest

from brokers.telemetry.percentiles import RecentResults, percentiles


@pytest.mark.parametrize(
    ("values", "p50", "p95", "p99"),
    [
        ([], 0.0, 0.0, 0.0),
        ([7.0], 7.0, 7.0, 7.0),
        ([2.0, 1.0], 1.0, 2.0, 2.0),
        ([float(number) for number in range(1, 101)], 50.0, 95.0, 99.0),
        ([float(number) for number in range(1, 102)], 51.0, 96.0, 100.0),
    ],
)
def test_percentile_is_the_nearest_rank(values: list[float], p50: float, p95: float, p99: float) -> None:
    assert percentiles(values) == {"p50": p50, "p95": p95, "p99": p99}


def test_percents_may_be_chosen() -> None:
    assert percentiles([1.0, 2.0, 3.0], (0, 99.9, 100)) == {"p0": 1.0, "p99.9": 3.0, "p100": 3.0}


def test_rate_is_that_of_the_last_seconds() -> None:
    results = RecentResults()
    assert (results.rate(0.0), results.latency_ms(99)) == (0.0, {"p99": 0.0})
    for index in range(1, 2001):
        results.add(float(index % 100), index / 10)  # ten a second
    assert results.rate(200.0) == pytest.approx(10.0, rel=0.05)
    assert results.rate(300.0) == 0.0
    newest = [float(index % 100) for index in range(2001 - 1024, 2001)]
    expected = np.percentile(newest, [50, 99], method="inverted_cdf").tolist()
    assert list(results.latency_ms(50, 99).values()) == expected


def test_rate_of_more_results_than_are_remembered_is_of_those() -> None:
    results = RecentResults()
    for index in range(5000):
        results.add(1.0, index / 1000)  # a thousand a second
    assert results.rate(5.0) == pytest.approx(1000, rel=0.05)
