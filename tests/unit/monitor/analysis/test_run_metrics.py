"""The figures of a run are those that a reader works out by hand from its points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from monitor.analysis.measurement_window import select_window
from monitor.analysis.run_metrics import LinkBytes, StageTime, compute_run_metrics, percentiles
from monitor.errors import NoSamples
from monitor.points.points import FieldValue, TelemetryPoint

S = 1_000_000_000


def point(measurement: str, at_s: float, tags: Mapping[str, str] | None = None, **fields: FieldValue) -> TelemetryPoint:
    return TelemetryPoint(measurement, round(at_s * S), tags or {}, fields)


def request(
    number: int, at_s: float, latency_ms: float, network_ms: float = 0.0, **fields: FieldValue
) -> TelemetryPoint:
    own: dict[str, FieldValue] = {"latency_ms": latency_ms, "network_ms": network_ms}
    own |= {"attempts": 1, "request": f"{number:02}", "error": "", **fields}
    return point("request", at_s, {"source": "s"}, **own)


def hop(number: int, stage: str, place: int, queue_ms: float, compute_ms: float) -> TelemetryPoint:
    fields = {"queue_ms": queue_ms, "decode_ms": 1.0, "compute_ms": compute_ms, "encode_ms": 0.5}
    return point("hop", number, {"stage": stage, "worker": f"{stage}-1"}, **fields, request=f"{number:02}", place=place)


# Asked at 10.0; four results, at 10.5, 11.0, 11.5 and 13.0, and one failure.
REQUESTS = [
    request(0, 10.5, 500, 100),
    request(1, 11.0, 200, 20),
    request(2, 11.5, 300, 40),
    request(3, 12.0, 900, 0, error="BadPayload", attempts=3),
    request(4, 13.0, 400, 60, attempts=2),
]


def test_without_a_warm_up_the_window_begins_with_the_first_request() -> None:
    found = compute_run_metrics({"request": REQUESTS})
    assert (found.kind, found.samples, found.failed, found.retries) == ("inference", 4, 1, 3)
    assert found.span_s == 3.0  # 10.0 to 13.0
    assert found.throughput_per_s == pytest.approx(4 / 3)
    assert found.latency_ms == {"mean": 350.0, "p50": 300.0, "p95": 500.0, "p99": 500.0}
    assert found.network_ms == 55.0


def test_the_warm_up_does_not_count_and_its_last_result_begins_the_window() -> None:
    found = compute_run_metrics({"request": list(reversed(REQUESTS))}, warm_up=2)
    assert (found.samples, found.failed, found.warm_up) == (2, 1, 2)
    assert found.span_s == 2.0  # 11.0 to 13.0
    assert found.throughput_per_s == 1.0
    assert found.latency_ms["mean"] == 350.0
    assert found.network_ms == 50.0


def test_the_time_goes_to_the_stages_on_the_requests_way() -> None:
    hops = [
        hop(4, "tail", 1, 4.0, 30.0),
        hop(4, "head", 0, 2.0, 10.0),
        hop(2, "head", 0, 6.0, 20.0),
        hop(2, "tail", 1, 0.0, 50.0),
        hop(1, "head", 0, 100.0, 100.0),  # of the warm-up
        hop(3, "head", 0, 100.0, 100.0),  # of the one that failed
    ]
    found = compute_run_metrics({"request": REQUESTS, "hop": hops}, warm_up=2)
    assert list(found.stages) == ["head", "tail"]
    assert found.stages["head"] == StageTime(4.0, 1.0, 15.0, 0.5)
    assert found.stages["tail"] == StageTime(2.0, 1.0, 40.0, 0.5)
    assert found.stages["tail"].total_ms == 43.5


def test_steps_make_it_training_whose_samples_are_rows() -> None:
    steps = [
        point("step", 1.0, step=1, rows=32, step_ms=900.0),
        point("step", 2.0, step=2, rows=32, step_ms=500.0),
        point("step", 4.0, step=3, rows=16, step_ms=300.0),
    ]
    tasks = [
        point("task", 1.5, {"stage": "head"}, queue_ms=1.0, decode_ms=2.0, compute_ms=100.0, encode_ms=3.0),
        point("task", 1.6, {"stage": "head"}, queue_ms=3.0, decode_ms=2.0, compute_ms=200.0, encode_ms=3.0),
        point("task", 0.9, {"stage": "head"}, queue_ms=9.0, decode_ms=9.0, compute_ms=900.0, encode_ms=9.0),
    ]
    found = compute_run_metrics({"step": steps, "task": tasks}, warm_up=1)
    assert (found.kind, found.samples, found.span_s, found.throughput_per_s) == ("training", 48, 0.8, 60.0)
    assert found.latency_ms["mean"] == 400.0
    assert found.network_ms is None
    assert found.stages == {"head": StageTime(2.0, 2.0, 150.0, 3.0)}  # of two tasks in two steps


def link(at_s: float, there: int, back: int) -> TelemetryPoint:
    return point("link", at_s, {"from": "device", "to": "cloud"}, bytes_out=there, bytes_in=back)


def test_a_link_counts_from_the_warm_ups_end_to_what_was_seen_after_the_last_result() -> None:
    links = [link(9.0, 0, 0), link(10.5, 1000, 10), link(11.5, 3000, 30), link(13.2, 8000, 90), link(15.0, 8100, 95)]
    # At 11.0 half way from 1000 to 3000.
    assert compute_run_metrics({"request": REQUESTS, "link": links}, warm_up=2).links == {
        "device - cloud": LinkBytes((8000 - 2000) / 2, (90 - 20) / 2)
    }
    # Without a warm-up: all, over four results.
    assert compute_run_metrics({"request": REQUESTS, "link": links}).links == {
        "device - cloud": LinkBytes(2000.0, 22.5)
    }


def test_weights_that_are_fetched_after_training_are_not_counted_as_its_traffic() -> None:
    steps = [point("step", second, step=second, rows=10, step_ms=1000.0) for second in (1, 2, 3)]
    links = [link(1.0, 500, 0), link(2.5, 2000, 300), link(3.1, 900_000, 900_000)]
    found = compute_run_metrics({"step": steps, "link": links}, warm_up=1).links["device - cloud"]
    assert found == LinkBytes(1500 * (2.0 / 1.5) / 20, 300 * (2.0 / 1.5) / 20)


def process(at_s: float, role: str, pid: int, cpu_s: float | None) -> TelemetryPoint:
    return point("process", at_s, {"role": role, "node": "n", "name": f"{role}-1"}, cpu_s=cpu_s, pid=pid)


def test_processor_time_is_of_the_window_and_by_role() -> None:
    seen = [
        process(10.0, "stage", 1, 5.0),
        process(12.0, "stage", 1, 6.0),
        process(14.0, "stage", 1, 9.0),
        process(12.0, "stage", 2, 0.5),  # another in its place, begun in the window: all of it counts
        process(12.5, "stage", 2, 0.7),
        process(10.0, "source", 3, 1.0),
        process(11.0, "source", 3, 1.25),
        process(11.0, "source", 3, None),
    ]
    born = point("life", 11.5, {"role": "stage", "name": "stage-1"}, event="start", pid=2)
    found = compute_run_metrics({"request": REQUESTS, "process": seen, "life": [born]}, warm_up=2)
    # Stage: at 11.0 it is 5.5, at 13.0 it is 7.5; and 0.7 of the other.
    assert found.cpu_s == {"stage": pytest.approx((2.0 + 0.7) / 2), "source": 0.0}


def test_processor_time_from_before_the_window_is_no_samples() -> None:
    """A process that imported for seconds, began just before the window, and is seen in it for the first time."""
    born = point("life", 10.9, {"role": "source", "name": "source-1"}, event="start", pid=7)
    seen = [process(11.4, "source", 7, 3.0), process(13.0, "source", 7, 3.5)]
    found = compute_run_metrics({"request": REQUESTS, "process": seen, "life": [born]}, warm_up=2)
    assert found.cpu_s == {"source": pytest.approx(0.25)}


def test_steps_of_no_rows_are_no_samples() -> None:
    with pytest.raises(NoSamples, match="no samples"):
        compute_run_metrics({"step": [point("step", 1, step=1, rows=0, step_ms=10.0)]})


def energy(at_s: float, joules: float | None, rail: str = "package-0") -> TelemetryPoint:
    return point("power", at_s, {"rail": rail}, energy_j=joules)


def test_energy_is_of_the_window_and_a_sample_that_it_cuts_counts_in_part() -> None:
    seen = [energy(10.0, 50.0), energy(12.0, 4.0), energy(14.0, 6.0), energy(14.0, 1.0, "package-0/core")]
    found = compute_run_metrics({"request": REQUESTS, "power": seen}, warm_up=2)
    assert found.energy_j == {"rail package-0": (4.0 / 2 + 6.0 / 2) / 2}
    assert found.energy_missing_reason == ""


def test_without_a_sensor_there_is_a_reason_and_never_a_zero() -> None:
    told = [
        point("missing", 9.0, {"sensor": "rapl"}, reason="only root may read it"),
        point("missing", 9.0, {"sensor": "interface.eth0"}, reason="it has gone"),
    ]
    found = compute_run_metrics({"request": REQUESTS, "missing": told, "power": [energy(11.5, None)]})
    assert (found.energy_j, found.energy_missing_reason) == (None, "rapl: only root may read it")
    assert compute_run_metrics({"request": REQUESTS}).energy_missing_reason == "no sensor said anything"


@pytest.mark.parametrize(
    ("points", "warm_up", "said"),
    [
        ([], 0, "none of its requests is in its telemetry"),
        (REQUESTS, 5, "its warm-up of 5 takes all 5 requests"),
        (REQUESTS, 9, "its warm-up of 9 takes all 5 requests"),
        (REQUESTS[3:4], 0, "none of the 1 requests after its warm-up has a result"),
    ],
)
def test_a_run_with_nothing_to_measure_says_so(points: Sequence[TelemetryPoint], warm_up: int, said: str) -> None:
    with pytest.raises(NoSamples, match=said):
        compute_run_metrics({"request": points}, warm_up)


def test_percentiles_are_values_that_were_there() -> None:
    assert percentiles([float(value) for value in range(1, 101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([7.0]) == {"p50": 7.0, "p95": 7.0, "p99": 7.0}
    assert percentiles([]) == {}


def test_the_window_holds_what_counts_in_the_order_of_its_end() -> None:
    window = select_window({"request": list(reversed(REQUESTS))}, 1)
    assert [found.fields["request"] for found in window.points] == ["01", "02", "03", "04"]
    assert [found.fields["request"] for found in window.succeeded] == ["01", "02", "04"]
    assert (window.begin_ns, window.end_ns) == (round(10.5 * S), 13 * S)
