"""Metrics of a run, against values computed by hand from its points."""

from __future__ import annotations

import json

import pytest

from monitor.analysis.run_metrics import CounterSeries, LinkBytes, MedianRange, StageTime, compute_run_metrics
from monitor.errors import NoSamples
from monitor.points.points import TelemetryPoint
from monitor.presence.inference_stats import InferenceStats
from sources.inference.run_stats import InferenceRunStats
from tests.unit.monitor.analysis.run_points import REQUESTS, make_point, make_request


def hop(number: int, stage: str, place: int, queue_ms: float, compute_ms: float) -> TelemetryPoint:
    times = {"queue_ms": queue_ms, "decode_ms": 1.0, "compute_ms": compute_ms, "encode_ms": 0.5}
    tags = {"stage": stage, "worker": f"{stage}-1"}
    return make_point("hop", number, tags, **times, request=f"{number:02}", place=place)


def test_metrics_of_whole_run() -> None:
    metrics = compute_run_metrics({"request": REQUESTS})
    assert (metrics.kind, metrics.samples, metrics.failed, metrics.retries) == ("inference", 4, 1, 3)
    assert metrics.span_s == 3.0
    assert metrics.throughput_per_s == pytest.approx(4 / 3)
    assert metrics.latency_ms == {"mean": 350.0, "p50": 300.0, "p95": 500.0, "p99": 500.0}
    assert metrics.network_ms == 55.0


def test_metrics_exclude_warm_up() -> None:
    metrics = compute_run_metrics({"request": list(reversed(REQUESTS))}, warm_up=2)
    assert (metrics.samples, metrics.failed, metrics.warm_up) == (2, 1, 2)
    assert (metrics.span_s, metrics.throughput_per_s) == (2.0, 1.0)
    assert (metrics.latency_ms["mean"], metrics.network_ms) == (350.0, 50.0)


def test_percentiles_of_one_run_agree_in_live_view_summary_and_report() -> None:
    """The live view's are those of the published results, summary.json's those of the source, ours the report's."""
    latencies_ms = [(37 * number) % 101 + 0.5 for number in range(1, 101)]
    live, source = InferenceStats("street"), InferenceRunStats()
    requests = []
    for number, latency_ms in enumerate(latencies_ms, start=1):
        requests.append(make_request(number, number, latency_ms))
        live.on_result(json.dumps({"latency_ms": latency_ms}).encode(), float(number))
        source.record_request(number - 0.5)
        source.record_result(latency_ms, (), float(number))
    metrics = compute_run_metrics({"request": requests})
    expected = {"p50": 50.5, "p95": 95.5, "p99": 99.5}
    assert {name: metrics.latency_ms[name] for name in expected} == expected
    assert source.summary()["latency_ms"] == expected
    assert {name: live.latency_ms(float(name[1:])) for name in expected} == expected


def test_stage_times_follow_path_of_measured_requests() -> None:
    hops = [
        hop(4, "tail", 1, 4.0, 30.0),
        hop(4, "head", 0, 2.0, 10.0),
        hop(2, "head", 0, 6.0, 20.0),
        hop(2, "tail", 1, 0.0, 50.0),
        hop(1, "head", 0, 100.0, 100.0),  # of the warm-up
        hop(3, "head", 0, 100.0, 100.0),  # of the failed request
    ]
    stages = compute_run_metrics({"request": REQUESTS, "hop": hops}, warm_up=2).stages
    assert list(stages) == ["head", "tail"]
    assert stages["head"] == StageTime(4.0, 1.0, 15.0, 0.5)
    assert stages["tail"] == StageTime(2.0, 1.0, 40.0, 0.5)


def test_samples_of_training_are_rows() -> None:
    steps = [
        make_point("step", 1.0, step=1, rows=32, step_ms=900.0),
        make_point("step", 2.0, step=2, rows=32, step_ms=500.0),
        make_point("step", 4.0, step=3, rows=16, step_ms=300.0),
    ]
    tasks = [
        make_point("task", 1.5, {"stage": "head"}, queue_ms=1.0, decode_ms=2.0, compute_ms=100.0, encode_ms=3.0),
        make_point("task", 1.6, {"stage": "head"}, queue_ms=3.0, decode_ms=2.0, compute_ms=200.0, encode_ms=3.0),
        make_point("task", 0.9, {"stage": "head"}, queue_ms=9.0, decode_ms=9.0, compute_ms=900.0, encode_ms=9.0),
    ]
    metrics = compute_run_metrics({"step": steps, "task": tasks}, warm_up=1)
    assert (metrics.kind, metrics.samples, metrics.span_s, metrics.throughput_per_s) == ("training", 48, 0.8, 60.0)
    assert (metrics.latency_ms["mean"], metrics.network_ms) == (400.0, None)
    assert metrics.stages == {"head": StageTime(2.0, 2.0, 150.0, 3.0)}  # two tasks in two steps


def test_steps_without_rows_raise_no_samples() -> None:
    with pytest.raises(NoSamples, match="its steps have no rows"):
        compute_run_metrics({"step": [make_point("step", 1, step=1, rows=0, step_ms=10.0)]})


def link(at_s: float, bytes_out: int, bytes_in: int) -> TelemetryPoint:
    return make_point("link", at_s, {"from": "device", "to": "cloud"}, bytes_out=bytes_out, bytes_in=bytes_in)


@pytest.mark.parametrize(
    ("warm_up", "expected"),
    [
        (0, LinkBytes(8000 / 4, 90 / 4)),
        (2, LinkBytes((8000 - 2000) / 2, (90 - 20) / 2)),  # at 11.0 s half way between two readings
    ],
)
def test_link_bytes_count_from_warm_up_to_reading_after_last_result(warm_up: int, expected: LinkBytes) -> None:
    readings = [link(9.0, 0, 0), link(10.5, 1000, 10), link(11.5, 3000, 30), link(13.2, 8000, 90), link(15.0, 8100, 95)]
    metrics = compute_run_metrics({"request": REQUESTS, "link": readings}, warm_up)
    assert metrics.links == {"device - cloud": expected}


def test_weights_fetched_after_training_are_not_link_traffic() -> None:
    steps = [make_point("step", second, step=second, rows=10, step_ms=1000.0) for second in (1, 2, 3)]
    readings = [link(1.0, 500, 0), link(2.5, 2000, 300), link(3.1, 900_000, 900_000)]
    links = compute_run_metrics({"step": steps, "link": readings}, warm_up=1).links
    assert links["device - cloud"] == LinkBytes(1500 * (2.0 / 1.5) / 20, 300 * (2.0 / 1.5) / 20)


def process(at_s: float, role: str, pid: int, cpu_s: float | None) -> TelemetryPoint:
    return make_point("process", at_s, {"role": role, "node": "n", "name": f"{role}-1"}, cpu_s=cpu_s, pid=pid)


def process_start(at_s: float, role: str, pid: int) -> TelemetryPoint:
    return make_point("lifecycle", at_s, {"role": role, "name": f"{role}-1"}, event="start", pid=pid)


def test_cpu_time_of_window_is_summed_by_role() -> None:
    samples = [
        process(10.0, "stage", 1, 5.0),
        process(12.0, "stage", 1, 6.0),
        process(14.0, "stage", 1, 9.0),
        process(12.0, "stage", 2, 0.5),  # starts inside the window: all of it counts
        process(12.5, "stage", 2, 0.7),
        process(10.0, "source", 3, 1.0),
        process(11.0, "source", 3, 1.25),
        process(11.0, "source", 3, None),
        process(10.0, "monitor", 4, 1.0),
        process(13.0, "monitor", 4, 9.0),
    ]
    points = {"request": REQUESTS, "process": samples, "lifecycle": [process_start(11.5, "stage", 2)]}
    metrics = compute_run_metrics(points, warm_up=2)
    # Process 1 has 5.5 s at 11.0 and 7.5 s at 13.0.
    assert metrics.cpu_s == {"stage": pytest.approx((2.0 + 0.7) / 2), "source": 0.0}
    assert sum(metrics.cpu_s.values()) == pytest.approx(1.35)


def test_cpu_time_before_window_does_not_count() -> None:
    """The process imports for seconds, starts just before the window, and has its first sample inside it."""
    samples = [process(11.4, "source", 7, 3.0), process(13.0, "source", 7, 3.5)]
    points = {"request": REQUESTS, "process": samples, "lifecycle": [process_start(10.9, "source", 7)]}
    assert compute_run_metrics(points, warm_up=2).cpu_s == {"source": pytest.approx(0.25)}


def energy(at_s: float, energy_j: float | None, rail: str = "package-0") -> TelemetryPoint:
    return make_point("power", at_s, {"rail": rail}, energy_j=energy_j)


def test_energy_at_edge_of_window_counts_in_proportion() -> None:
    readings = [energy(10.0, 50.0), energy(12.0, 4.0), energy(14.0, 6.0), energy(14.0, 1.0, "package-0/core")]
    metrics = compute_run_metrics({"request": REQUESTS, "power": readings}, warm_up=2)
    assert metrics.energy_j == {"rail package-0": (4.0 / 2 + 6.0 / 2) / 2}
    assert metrics.energy_missing_reason == ""


def test_missing_energy_has_reason() -> None:
    missing = [
        make_point("missing", 9.0, {"sensor": "rapl"}, reason="only root may read it"),
        make_point("missing", 9.0, {"sensor": "network.eth0"}, reason="removed"),
    ]
    metrics = compute_run_metrics({"request": REQUESTS, "missing": missing, "power": [energy(11.5, None)]})
    assert (metrics.energy_j, metrics.energy_missing_reason) == (None, "rapl: only root may read it")
    assert compute_run_metrics({"request": REQUESTS}).energy_missing_reason == "no power sensor reported"


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


def test_median_range_of_several_values() -> None:
    found = MedianRange.from_values([11.0, 10.0, 14.0])
    assert found == MedianRange(11.0, 10.0, 14.0, 3)
    assert found.bounds == (10.0, 14.0)


def test_single_value_has_no_bounds() -> None:
    assert MedianRange.from_values([1.5]).bounds == (None, None)


def test_no_values_raise_value_error() -> None:
    with pytest.raises(ValueError, match="no median"):
        MedianRange.from_values([])
