"""Traffic, CPU time, power and energy equal values computed by hand from the points."""

from __future__ import annotations

import pytest

from monitor.report.resource_figures import cpu, cpu_seconds, energy, gpu, link_bytes, network, network_distribution
from monitor.report.run import ReportRun
from tests.unit.monitor.report.report_runs import (
    FOUR_REQUESTS,
    LINK_TRAFFIC,
    make_cpu_samples,
    make_point,
    make_request,
    make_run,
    select,
    summarize_runs,
)


def test_network_rate_is_the_traffic_of_links_per_bin() -> None:
    run = make_run("a", [*FOUR_REQUESTS, *LINK_TRAFFIC])
    rates = select(network([run]).table, "time_s", "rate_mb_per_s")
    assert [time_s for time_s, _ in rates] == [0.25, 0.75, 1.25, 1.75]
    assert [rate for _, rate in rates] == pytest.approx([2.1, 2.1, 1.0, 1.0])
    shares = select(network_distribution([run]).table, "rate_mb_per_s", "share")
    assert [rate for rate, _ in shares] == pytest.approx([1.0, 1.0, 2.1, 2.1])
    assert [share for _, share in shares] == [0.25, 0.5, 0.75, 1.0]


def test_reset_of_a_link_counter_is_no_negative_traffic() -> None:
    traffic = [
        make_point("link", second, {"from": "a", "to": "b"}, bytes_out=bytes_out, bytes_in=0)
        for second, bytes_out in ((1.0, 5_000_000), (2.0, 1_000_000), (3.0, 2_000_000))
    ]
    table = network([make_run("a", [*FOUR_REQUESTS, *traffic])]).table
    assert table.floats("rate_mb_per_s") == pytest.approx([1.0, 1.0, 1.0, 1.0])


def test_network_rate_without_links_counts_loopback_bytes_once() -> None:
    samples = [
        make_point("interface", second, {"interface": name}, sent_bytes=500_000, received_bytes=250_000)
        for second in (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
        for name in ("lo", "eth0")
    ]
    table = network([make_run("a", [*FOUR_REQUESTS, *samples])]).table
    assert table.floats("rate_mb_per_s") == pytest.approx([2 * (0.5 + 0.75)] * 4)


def test_run_shorter_than_a_bin_has_one_network_rate() -> None:
    short = make_run("a", [make_request(1, 1.2, 200.0), *LINK_TRAFFIC])
    assert select(network([short]).table, "time_s", "rate_mb_per_s") == [(0.25, pytest.approx(2.1))]
    not_covered = make_run("b", [make_request(1, 0.4, 200.0), *LINK_TRAFFIC])
    assert not network([not_covered]).table


def test_link_traffic_is_per_sample_and_direction() -> None:
    # 4 MB out and 0.1 MB in, counted from the first request on, for three results.
    table = link_bytes([make_run("a", [*FOUR_REQUESTS, *LINK_TRAFFIC])]).table
    assert table.distinct("part") == ["device to cloud", "cloud to device", "total"]
    assert table.floats("kb_per_sample") == pytest.approx([4000 / 3, 100 / 3, 4100 / 3])


def test_cpu_use_is_the_increase_of_cpu_time_per_bin() -> None:
    samples = [
        *make_cpu_samples((0.0, 2.0, 4.0), (10.0, 12.0, 13.0), "stage", "head-1"),
        *make_cpu_samples((0.0, 2.0, 4.0), (10.0, 12.0, 13.0), "monitor", "monitor"),
    ]
    run = make_run("a", [*FOUR_REQUESTS, *samples])
    assert select(cpu([run]).table, "process", "time_s", "cores") == [
        ("head-1", 0.25, 1.0),
        ("head-1", 0.75, 1.0),
        ("head-1", 1.25, 0.5),
        ("head-1", 1.75, 0.5),
    ]
    # From 11.0 s at 1.0 to 12.5 s at 3.0, for three results; the monitor is not counted.
    table = cpu_seconds([run]).table
    assert select(table, "part", "s_per_sample") == [("stage", pytest.approx(0.5)), ("total", pytest.approx(0.5))]


def test_smallest_of_many_processes_are_combined() -> None:
    samples = [
        point
        for number in range(1, 10)
        for point in make_cpu_samples((0.0, 4.0), (0.0, 4.0 * number), "stage", f"w-{number}")
    ]
    table = cpu([make_run("a", [*FOUR_REQUESTS, *samples])]).table
    assert table.distinct("process") == [*(f"w-{number}" for number in range(3, 10)), "others"]
    assert table.where("process", "others").floats("cores") == pytest.approx([1.0 + 2.0] * 4)


def test_bars_have_parts_in_one_order_and_only_totals_a_range() -> None:
    def run_of(name: str, **cores: float) -> ReportRun:
        samples = [
            point for role, used in cores.items() for point in make_cpu_samples((0, 4), (0, 4 * used), role, role)
        ]
        return make_run(name, [*FOUR_REQUESTS, *samples], group=name[0])

    runs = [
        run_of("a1", broker=3.0, monitor=9.0, stage=3.0),
        run_of("a2", other=3.0, run=3.0, stage=9.0),
        run_of("b", source=3.0),
    ]
    rows = select(cpu_seconds(runs).table, "run", "part", "s_per_sample", "low", "high")
    assert rows == [
        ("a", "stage", pytest.approx(4.0), None, None),
        ("a", "run", pytest.approx(1.0), None, None),
        ("a", "broker", pytest.approx(1.0), None, None),
        ("a", "other", pytest.approx(1.0), None, None),
        ("a", "total", pytest.approx(7.0), pytest.approx(4.0), pytest.approx(10.0)),
        ("b", "source", pytest.approx(2.0), None, None),
        ("b", "total", pytest.approx(2.0), None, None),
    ]
    cpu_time = summarize_runs(runs[:2])[1][0].values["CPU time"]
    assert cpu_time is not None
    assert cpu_time.median == pytest.approx(7.0)


def test_energy_is_that_of_the_measured_window() -> None:
    samples = [
        make_point("gpu", second, {"gpu": "0"}, use=second / 10, power_w=20.0, energy_j=20.0)
        for second in (0.0, 1.0, 2.0, 3.0, 4.0)
    ]
    run = make_run("a", [*FOUR_REQUESTS, *samples])
    rows = select(energy([run]).table, "part", "j_per_sample")
    assert rows == [("gpu 0", pytest.approx(40 / 3)), ("total", pytest.approx(40 / 3))]
    use = gpu([run]).table.where("of", "GPU use (share)")
    assert select(use, "time_s", "value") == [(0.25, 0.1), (1.25, 0.2)]
