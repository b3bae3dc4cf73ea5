"""Network interfaces: differences, and interfaces that appear and disappear."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import pytest

from monitor.points.points import TelemetryPoint
from monitor.sensors.host import NetworkSensor, read_interface_counters
from tests.support.monitor.points import assert_matches_schema, missing_reasons
from tests.support.pipelines.processes import eventually


@dataclass
class Counts:
    """The fields of psutil's counters that the sensor reads."""

    bytes_recv: int = 1
    bytes_sent: int = 1
    errin: int = 0
    errout: int = 0
    dropin: int = 0
    dropout: int = 0


def sample_all(*readings: Mapping[str, Counts]) -> list[dict[str, dict[str, Any]]]:
    """The fields by interface of a sample for each reading, two samples per second."""
    remaining = iter(readings)
    sensor = NetworkSensor(lambda: next(remaining))
    return [by_interface(sensor.sample(number, number / 2)) for number in range(len(readings))]


def by_interface(points: list[TelemetryPoint]) -> dict[str, dict[str, Any]]:
    return {point.tags["interface"]: dict(point.fields) for point in points if point.measurement == "interface"}


def test_fields_are_differences_and_rates_since_previous_sample() -> None:
    first, second = sample_all({"eth0": Counts(1000, 500)}, {"eth0": Counts(4000, 600, 1, 2, 3, 4)})
    assert first == {}
    assert second == {
        "eth0": {
            "received_bytes": 3000,
            "sent_bytes": 100,
            "received_bytes_per_s": 6000.0,
            "sent_bytes_per_s": 200.0,
            "errors": 10,
        }
    }


def test_32_bit_counter_wraps_and_large_drop_is_a_restart() -> None:
    readings = [Counts((1 << 32) - 100, 10**12), Counts(50, 700), Counts(60, 1700)]
    _, second, third = sample_all(*({"eth0": counts} for counts in readings))
    assert (second["eth0"]["received_bytes"], second["eth0"]["sent_bytes"]) == (150, 700)
    assert (third["eth0"]["received_bytes"], third["eth0"]["sent_bytes"]) == (10, 1000)


def test_errors_after_restart_are_unknown() -> None:
    _, second, third = sample_all({"eth0": Counts(dropin=9)}, {"eth0": Counts(dropin=2)}, {"eth0": Counts(dropin=3)})
    assert (second["eth0"]["errors"], third["eth0"]["errors"]) == (None, 1)


def test_interface_that_returns_counts_from_its_return() -> None:
    lo = {"lo": Counts(5, 5)}
    samples = sample_all(
        {**lo, "wwan0": Counts(1000)},
        {**lo, "wwan0": Counts(1200)},
        lo,
        {**lo, "wwan0": Counts(50)},
        {**lo, "wwan0": Counts(80)},
    )
    assert [sorted(sample) for sample in samples] == [[], ["lo", "wwan0"], ["lo"], ["lo"], ["lo", "wwan0"]]
    assert samples[4]["wwan0"]["received_bytes"] == 30


def test_unused_interface_has_no_points() -> None:
    unused = {"ifb0": Counts(0, 0)}
    second, third = sample_all(unused, unused, {"ifb0": Counts(8, 0)})[1:]
    assert second == {}
    assert (third["ifb0"]["received_bytes"], third["ifb0"]["sent_bytes"]) == (8, 0)


def test_unreadable_counters_are_reported_once_and_start_again() -> None:
    readings = iter([{"lo": Counts(1)}, None, None, {"lo": Counts(9)}, {"lo": Counts(10)}])

    def read() -> dict[str, Counts]:
        counters = next(readings)
        if counters is None:
            raise PermissionError(13, "Permission denied", "/proc/net/dev")
        return counters

    sensor = NetworkSensor(read)
    samples = [sensor.sample(number, float(number)) for number in range(5)]
    assert [missing_reasons(points) for points in samples] == [{}, {"network": "Permission denied"}, {}, {}, {}]
    assert by_interface(samples[3]) == {}
    assert by_interface(samples[4])["lo"]["received_bytes"] == 1


def test_counters_are_read_without_psutils_own_wrap_handling(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {}

    def net_io_counters(**arguments: bool) -> dict[str, Counts]:
        options.update(arguments)
        return {}

    monkeypatch.setattr(psutil, "net_io_counters", net_io_counters)
    read_interface_counters()
    assert options == {"pernic": True, "nowrap": False}


def test_loopback_traffic_of_this_machine_is_measured() -> None:
    sensor = NetworkSensor()
    sensor.sample(1, 0.0)
    payload = bytes(10_000)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        for _ in range(20):
            udp.sendto(payload, udp.getsockname())
            udp.recv(len(payload))
    received = 0

    def all_measured() -> bool:
        nonlocal received
        points = sensor.sample(2, 1.0)
        assert_matches_schema(points)
        received += int(by_interface(points).get("lo", {}).get("received_bytes", 0))
        return received >= 20 * len(payload)

    eventually("the loopback's counters", all_measured)
