"""The in-flight limit of a live source, estimated from the times of results."""

from __future__ import annotations

import pytest

from brokers.protocol.stage_timing import Hop
from sources.client.adaptive_concurrency import AdaptiveConcurrency


def after_results(
    *stages_ms: float, workers: int = 1, way_back_ms: float = 2.0, queue_ms: float = 0.0
) -> AdaptiveConcurrency:
    concurrency = AdaptiveConcurrency(lambda stage: workers)
    hops = [Hop(str(index), "w", queue_ms=queue_ms, compute_ms=ms) for index, ms in enumerate(stages_ms)]
    for _ in range(50):
        concurrency.observe(hops, sum(stages_ms) + way_back_ms + queue_ms * len(stages_ms))
    return concurrency


@pytest.mark.parametrize(
    ("stages_ms", "limit"),
    [((100.0,), 2), ((100.0, 100.0, 100.0), 4), ((10.0, 100.0, 10.0), 2), ((50.0, 100.0, 50.0), 3)],
)
def test_limit_is_latency_over_slowest_stage_plus_one(stages_ms: tuple[float, ...], limit: int) -> None:
    assert after_results(*stages_ms).limit(10) == limit


def test_more_workers_raise_the_limit() -> None:
    assert after_results(100.0, workers=4).limit(10) == 5


def test_queueing_time_does_not_raise_the_limit() -> None:
    assert after_results(100.0, queue_ms=500.0).limit(10) == 2


def test_network_time_raises_the_limit_to_its_bound() -> None:
    assert after_results(100.0, way_back_ms=300.0).limit(10) == 5
    assert after_results(100.0, way_back_ms=3000.0).limit(10) == 10


def test_limit_before_first_result_is_the_bound() -> None:
    assert AdaptiveConcurrency(lambda stage: 1).limit(7) == 7
