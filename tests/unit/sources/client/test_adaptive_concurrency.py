"""How many requests keep a pipeline full, and no more: worked out from the times of results alone."""

from __future__ import annotations

import pytest

from brokers.protocol.stage_timing import Hop
from sources.client.adaptive_concurrency import AdaptiveConcurrency


def learned(
    *stages_ms: float, workers: int = 1, way_back_ms: float = 2.0, queue_ms: float = 0.0
) -> AdaptiveConcurrency:
    found = AdaptiveConcurrency(lambda stage: workers)
    hops = [Hop(str(index), "w", queue_ms=queue_ms, compute_ms=ms) for index, ms in enumerate(stages_ms)]
    for _ in range(50):
        found.observe(hops, sum(stages_ms) + way_back_ms + queue_ms * len(stages_ms))
    return found


@pytest.mark.parametrize(
    ("stages_ms", "window"),
    [((100.0,), 2), ((100.0, 100.0, 100.0), 4), ((10.0, 100.0, 10.0), 2), ((50.0, 100.0, 50.0), 3)],
)
def test_a_window_is_what_passes_the_slowest_stage_while_one_goes_all_the_way_and_one(
    stages_ms: tuple[float, ...], window: int
) -> None:
    assert learned(*stages_ms).limit(10) == window


def test_more_workers_want_more_in_flight() -> None:
    assert learned(100.0, workers=4).limit(10) == 5


def test_what_waits_in_queues_does_not_count_or_waiting_would_ask_for_more_waiting() -> None:
    assert learned(100.0, queue_ms=500.0).limit(10) == 2


def test_a_long_way_back_wants_more_in_flight_up_to_the_most() -> None:
    assert learned(100.0, way_back_ms=300.0).limit(10) == 5
    assert learned(100.0, way_back_ms=3000.0).limit(10) == 10


def test_before_anything_is_known_it_is_the_most() -> None:
    assert AdaptiveConcurrency(lambda stage: 1).limit(7) == 7
