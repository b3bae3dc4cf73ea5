"""Network interfaces: differences, counters that wrap, interfaces that come and go."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor.points.points import TelemetryPoint
from monitor.sensors.network import NetworkSensor, counter_delta, read_interface_counters
from tests.support.monitor.points import assert_matches_schema, missing_reasons
from tests.support.pipelines.processes import eventually

RANGE_32 = 1 << 32


@dataclass
class Counted:
    bytes_recv: int = 1
    bytes_sent: int = 1
    errin: int = 0
    errout: int = 0
    dropin: int = 0
    dropout: int = 0


def play(*moments: dict[str, Counted]) -> list[dict[str, dict[str, Any]]]:
    """What is said of each interface at each of these moments, two a second."""
    following = iter(moments)
    sensor = NetworkSensor(lambda: next(following))
    return [by_interface(sensor.sample(number, number / 2)) for number in range(len(moments))]


def by_interface(points: list[TelemetryPoint]) -> dict[str, dict[str, Any]]:
    return {point.tags["interface"]: dict(point.fields) for point in points if point.measurement == "interface"}


def test_what_was_carried_is_since_the_last_sample_and_for_a_second() -> None:
    _, second = play({"eth0": Counted(1000, 500)}, {"eth0": Counted(4000, 600, 1, 2, 3, 4)})
    assert second == {
        "eth0": {
            "received_bytes": 3000,
            "sent_bytes": 100,
            "received_bytes_per_s": 6000.0,
            "sent_bytes_per_s": 200.0,
            "errors": 10,
        }
    }


def test_the_first_sample_says_nothing_rather_than_all_since_the_machine_began() -> None:
    assert play({"eth0": Counted(10**12, 10**12)}) == [{}]


def test_a_counter_of_32_bits_that_wraps_is_counted_on() -> None:
    _, second = play({"eth0": Counted(RANGE_32 - 100, 5)}, {"eth0": Counted(50, 5)})
    assert second["eth0"]["received_bytes"] == 150
    assert second["eth0"]["sent_bytes"] == 0


@given(st.integers(0, RANGE_32 - 1), st.integers(0, RANGE_32 // 2))
def test_a_counter_of_32_bits_is_right_up_to_half_its_range(last: int, step: int) -> None:
    assert counter_delta(last, (last + step) % RANGE_32) == step


@given(st.integers(0, 1 << 63), st.integers(0, 1 << 63))
def test_nothing_was_ever_carried_back(last: int, value: int) -> None:
    assert 0 <= counter_delta(last, value) <= max(value, RANGE_32 // 2)


def test_a_counter_that_starts_again_has_what_it_counted_since() -> None:
    _, second, third = play({"eth0": Counted(10**12, 3000)}, {"eth0": Counted(700, 20)}, {"eth0": Counted(1700, 30)})
    assert (second["eth0"]["received_bytes"], second["eth0"]["sent_bytes"]) == (700, 20)
    assert third["eth0"]["received_bytes"] == 1000


def test_a_counter_beyond_32_bits_has_not_wrapped_there() -> None:
    assert counter_delta(RANGE_32 + 5, 10) == 10


def test_errors_that_were_counted_back_are_not_known() -> None:
    _, second, third = play({"eth0": Counted(dropin=9)}, {"eth0": Counted(dropin=2)}, {"eth0": Counted(dropin=3)})
    assert (second["eth0"]["errors"], third["eth0"]["errors"]) == (None, 1)


def test_an_interface_that_disappears_and_comes_back_disturbs_no_other_and_counts_from_its_return() -> None:
    lo = {"lo": Counted(5, 5)}
    found = play(
        {**lo, "wwan0": Counted(1000)},
        {**lo, "wwan0": Counted(1200)},
        lo,
        {**lo, "wwan0": Counted(50)},
        {**lo, "wwan0": Counted(80)},
    )
    assert [sorted(each) for each in found] == [[], ["lo", "wwan0"], ["lo"], ["lo"], ["lo", "wwan0"]]
    assert found[4]["wwan0"]["received_bytes"] == 30


def test_a_new_interface_is_counted_from_its_second_sample() -> None:
    found = play({}, {"veth1": Counted(10**9)}, {"veth1": Counted(10**9 + 7)})
    assert [each.get("veth1", {}).get("received_bytes") for each in found] == [None, None, 7]


def test_an_interface_that_never_carried_anything_has_no_points() -> None:
    silent = {"ifb0": Counted(0, 0)}
    assert play(silent, silent, {"ifb0": Counted(8, 0)})[1:] == [
        {},
        {
            "ifb0": {
                "received_bytes": 8,
                "sent_bytes": 0,
                "received_bytes_per_s": 16.0,
                "sent_bytes_per_s": 0.0,
                "errors": 0,
            }
        },
    ]


def test_counters_that_cannot_be_read_are_told_once_and_make_no_difference_up() -> None:
    moments = [{"lo": Counted(1)}, None, None, {"lo": Counted(9)}, {"lo": Counted(10)}]
    following = iter(moments)

    def read() -> dict[str, Counted]:
        found = next(following)
        if found is None:
            raise PermissionError(13, "Permission denied", "/proc/net/dev")
        return found

    sensor = NetworkSensor(read)
    found = [sensor.sample(number, float(number)) for number in range(5)]
    assert [missing_reasons(points) for points in found] == [{}, {"interface": "Permission denied"}, {}, {}, {}]
    assert by_interface(found[3]) == {}
    assert by_interface(found[4])["lo"]["received_bytes"] == 1


def test_counters_are_the_systems_own_and_not_what_psutil_makes_of_a_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    # psutil adds the last value to all that comes after a lower one: of a wrap at 2**32, what was left to it is lost.
    asked = {}

    def of_psutil(**settings: bool) -> dict[str, Counted]:
        asked.update(settings)
        return {}

    monkeypatch.setattr(psutil, "net_io_counters", of_psutil)
    read_interface_counters()
    assert asked == {"pernic": True, "nowrap": False}


def test_what_goes_through_the_loopback_of_this_machine_is_seen() -> None:
    sensor = NetworkSensor()
    sensor.sample(1, 0.0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mine:
        mine.bind(("127.0.0.1", 0))
        payload = bytes(10_000)
        for _ in range(20):
            mine.sendto(payload, mine.getsockname())
            mine.recv(len(payload))
    received = 0

    def seen() -> bool:
        nonlocal received
        points = sensor.sample(2, 1.0)
        assert_matches_schema(points)
        received += int(by_interface(points).get("lo", {}).get("received_bytes", 0))
        return received >= 20 * 10_000

    eventually("the loopback's counters", seen)
