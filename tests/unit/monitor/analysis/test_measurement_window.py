"""The measured part of a run."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from monitor.analysis.measurement_window import select_window
from monitor.errors import NoSamples
from monitor.points.points import TelemetryPoint
from tests.unit.monitor.analysis.run_points import REQUESTS, S, make_point


def test_window_without_warm_up_begins_with_first_request() -> None:
    window = select_window({"request": REQUESTS})
    assert (window.kind, window.begin_ns, window.end_ns) == ("inference", 10 * S, 13 * S)
    assert window.span_s == 3.0


def test_window_begins_with_last_result_of_warm_up() -> None:
    window = select_window({"request": list(reversed(REQUESTS))}, warm_up=1)
    assert [point.fields["request"] for point in window.points] == ["01", "02", "03", "04"]
    assert [point.fields["request"] for point in window.succeeded] == ["01", "02", "04"]
    assert (window.begin_ns, window.end_ns) == (round(10.5 * S), 13 * S)


def test_run_with_steps_is_training() -> None:
    steps = [make_point("step", 2.0, step=1, step_ms=500.0), make_point("step", 3.0, step=2, step_ms=900.0)]
    window = select_window({"step": steps, "request": REQUESTS})
    assert (window.kind, window.begin_ns, len(window.succeeded)) == ("training", round(1.5 * S), 2)


@pytest.mark.parametrize(
    ("points", "warm_up", "problem"),
    [
        ([], 0, "its telemetry has no requests"),
        (REQUESTS, 5, "the warm-up of 5 covers all 5 requests"),
        (REQUESTS, 9, "the warm-up of 9 covers all 5 requests"),
        (REQUESTS[3:4], 0, "none of the 1 requests after the warm-up has a result"),
    ],
)
def test_empty_window_raises_no_samples(points: Sequence[TelemetryPoint], warm_up: int, problem: str) -> None:
    with pytest.raises(NoSamples, match=problem):
        select_window({"request": points}, warm_up)
