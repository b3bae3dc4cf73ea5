"""Nearest-rank percentiles."""

from __future__ import annotations

import pytest

from brokers.telemetry.percentiles import percentiles


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
