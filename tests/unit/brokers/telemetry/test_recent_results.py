"""Rate and latency of the newest results."""

from __future__ import annotations

import numpy as np
import pytest

from brokers.telemetry.recent_results import RecentResults


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
