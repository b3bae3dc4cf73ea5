"""The machine itself: the share of its processors' time, its load, and the memory of it or of a container."""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from monitor.sensors.host import HostSensor
from tests.support.monitor.cgroup_folders import GIB, write_cgroup_v1, write_cgroup_v2, write_proc_self_cgroup
from tests.support.monitor.points import assert_matches_schema, missing_reasons, single_point_fields

Times = namedtuple("Times", "user nice system idle iowait irq softirq steal guest guest_nice")


def host(root: Path, *times: Times) -> HostSensor:
    following: Iterator[Times] = iter(times) if times else itertools.repeat(Times(*[0.0] * 10))
    return HostSensor(root, cpu_times=lambda: next(following))


def shares(root: Path, *times: Times) -> list[float | None]:
    sensor = host(root, *times)
    return [single_point_fields(sensor.sample(number, float(number)), "node")["cpu"] for number in range(len(times))]


def test_this_machine_says_what_it_has() -> None:
    sensor = HostSensor()
    sensor.sample(1, 0.0)
    points = sensor.sample(2, 0.5)
    assert_matches_schema(points)
    fields = single_point_fields(points, "node")
    assert fields["load"] >= 0
    assert 0 < fields["memory_used_bytes"] <= fields["memory_total_bytes"] <= psutil.virtual_memory().total


def test_the_share_is_of_the_time_since_the_last_sample_and_unknown_at_first(tmp_path: Path) -> None:
    before = Times(100.0, 0.0, 50.0, 800.0, 50.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    after = before._replace(user=100.5, system=50.25, idle=801.0, iowait=50.25)
    assert shares(tmp_path, before, after) == [None, pytest.approx(0.75 / 2)]


def test_what_a_guest_spends_counts_once(tmp_path: Path) -> None:
    before = Times(*[0.0] * 10)
    after = before._replace(user=1.0, guest=1.0, idle=1.0)  # Linux has a guest's time in `user` as well
    assert shares(tmp_path, before, after)[1] == 0.5


@pytest.mark.parametrize(("idle", "iowait", "share"), [(1.0, 9.0, 1.0), (3.0, 10.0, 0.0)])
def test_times_that_go_back_a_little_are_still_a_share(
    tmp_path: Path, idle: float, iowait: float, share: float
) -> None:
    before = Times(1.0, 0, 0, 1.0, 10.0, 0, 0, 0, 0, 0)
    user = 3.0 if share else 0.5
    assert shares(tmp_path, before, before._replace(user=user, idle=idle, iowait=iowait))[1] == share


def test_two_samples_of_one_moment_have_no_share(tmp_path: Path) -> None:
    assert shares(tmp_path, Times(*[1.0] * 10), Times(*[1.0] * 10)) == [None, None]


def test_in_a_container_memory_is_the_containers(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/")
    write_cgroup_v2(tmp_path, "", limit=str(GIB // 2), usage=GIB // 4, inactive_file=GIB // 16)
    fields = single_point_fields(host(tmp_path).sample(1, 0.0), "node")
    assert fields["memory_total_bytes"] == GIB // 2
    assert fields["memory_used_bytes"] == GIB // 4 - GIB // 16


def test_a_container_without_a_limit_has_the_machines(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "9:memory:/docker/abc")
    write_cgroup_v1(tmp_path, "docker/abc", limit=9223372036854771712, usage=GIB, inactive_file=0)
    fields = single_point_fields(host(tmp_path).sample(1, 0.0), "node")
    assert fields["memory_total_bytes"] == psutil.virtual_memory().total


def test_what_cannot_be_read_is_told_once_and_the_rest_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden() -> None:
        raise PermissionError(13, "Permission denied", "/proc/loadavg")

    monkeypatch.setattr(psutil, "getloadavg", hidden)
    sensor = host(tmp_path)
    first, second = sensor.sample(1, 0.0), sensor.sample(2, 0.5)
    assert [missing_reasons(points) for points in (first, second)] == [{"node.load": "Permission denied"}, {}]
    assert_matches_schema(first)
    assert single_point_fields(first, "node")["load"] is None
    assert single_point_fields(first, "node")["memory_total_bytes"] > 0
