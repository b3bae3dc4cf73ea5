"""CPU share, load, and the memory of the machine or of its container."""

from __future__ import annotations

import itertools
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from monitor.sensors.host import HostSensor, MemoryUsage, cgroup_memory
from tests.support.monitor.cgroup_folders import GIB, write_cgroup_v1, write_cgroup_v2, write_proc_self_cgroup
from tests.support.monitor.points import assert_matches_schema, missing_reasons, single_point_fields

MACHINE_BYTES = 8 * GIB
CpuTimes = namedtuple("CpuTimes", "user nice system idle iowait irq softirq steal guest guest_nice")


def make_sensor(root: Path, *times: CpuTimes) -> HostSensor:
    remaining: Iterator[CpuTimes] = iter(times) if times else itertools.repeat(CpuTimes(*[0.0] * 10))
    return HostSensor(root, cpu_times=lambda: next(remaining))


def cpu_shares(root: Path, *times: CpuTimes) -> list[float | None]:
    sensor = make_sensor(root, *times)
    return [single_point_fields(sensor.sample(number, float(number)), "node")["cpu"] for number in range(len(times))]


def memory(root: Path) -> MemoryUsage | None:
    return cgroup_memory(root, below_bytes=MACHINE_BYTES)


def test_this_machine_has_load_and_memory() -> None:
    sensor = HostSensor()
    sensor.sample(1, 0.0)
    points = sensor.sample(2, 0.5)
    assert_matches_schema(points)
    fields = single_point_fields(points, "node")
    assert fields["load"] >= 0
    assert 0 < fields["memory_used_bytes"] <= fields["memory_total_bytes"] <= psutil.virtual_memory().total


def test_cpu_is_share_of_time_since_previous_sample(tmp_path: Path) -> None:
    before = CpuTimes(100.0, 0.0, 50.0, 800.0, 50.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    after = before._replace(user=100.5, system=50.25, idle=801.0, iowait=50.25)
    assert cpu_shares(tmp_path, before, after) == [None, pytest.approx(0.75 / 2)]


def test_guest_time_counts_once(tmp_path: Path) -> None:
    before = CpuTimes(*[0.0] * 10)
    after = before._replace(user=1.0, guest=1.0, idle=1.0)
    assert cpu_shares(tmp_path, before, after)[1] == 0.5


@pytest.mark.parametrize(("idle", "iowait", "share"), [(1.0, 9.0, 1.0), (3.0, 10.0, 0.0)])
def test_times_that_decrease_still_give_a_share(tmp_path: Path, idle: float, iowait: float, share: float) -> None:
    before = CpuTimes(1.0, 0, 0, 1.0, 10.0, 0, 0, 0, 0, 0)
    user = 3.0 if share else 0.5
    assert cpu_shares(tmp_path, before, before._replace(user=user, idle=idle, iowait=iowait))[1] == share


def test_two_samples_at_one_time_have_no_share(tmp_path: Path) -> None:
    assert cpu_shares(tmp_path, CpuTimes(*[1.0] * 10), CpuTimes(*[1.0] * 10)) == [None, None]


def test_memory_in_container_is_that_of_its_limit(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/")
    write_cgroup_v2(tmp_path, "", limit=str(GIB // 2), usage=GIB // 4, inactive_file=GIB // 16)
    fields = single_point_fields(make_sensor(tmp_path).sample(1, 0.0), "node")
    assert (fields["memory_total_bytes"], fields["memory_used_bytes"]) == (GIB // 2, GIB // 4 - GIB // 16)


def test_memory_in_container_without_limit_is_the_machines(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "9:memory:/docker/abc")
    write_cgroup_v1(tmp_path, "docker/abc", limit=9223372036854771712, usage=GIB, inactive_file=0)
    fields = single_point_fields(make_sensor(tmp_path).sample(1, 0.0), "node")
    assert fields["memory_total_bytes"] == psutil.virtual_memory().total


def test_unreadable_value_is_reported_once_and_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def getloadavg() -> None:
        raise PermissionError(13, "Permission denied", "/proc/loadavg")

    monkeypatch.setattr(psutil, "getloadavg", getloadavg)
    sensor = make_sensor(tmp_path)
    first, second = sensor.sample(1, 0.0), sensor.sample(2, 0.5)
    assert [missing_reasons(points) for points in (first, second)] == [{"host.load": "Permission denied"}, {}]
    assert_matches_schema(first)
    assert single_point_fields(first, "node")["load"] is None
    assert single_point_fields(first, "node")["memory_total_bytes"] > 0


# Control groups -------------------------------------------------------------------------------------------------------


def test_version_2_with_own_group_as_root(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/")
    write_cgroup_v2(tmp_path, "", str(GIB), 600, 200)
    assert memory(tmp_path) == MemoryUsage(used_bytes=400, total_bytes=GIB)


def test_version_1_with_path_on_host(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "5:devices:/docker/abc", "4:cpu,memory:/docker/abc", "0::/docker/abc")
    write_cgroup_v1(tmp_path, "", 2 * GIB, 600, 200)
    assert memory(tmp_path) == MemoryUsage(used_bytes=400, total_bytes=2 * GIB)


def test_limit_of_outer_group_applies(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/system.slice/sparse.service")
    write_cgroup_v2(tmp_path, "system.slice/sparse.service", "max", 100, 0)
    write_cgroup_v2(tmp_path, "system.slice", str(3 * GIB), 5000, 1000)
    assert memory(tmp_path) == MemoryUsage(used_bytes=4000, total_bytes=3 * GIB)


def test_smallest_limit_applies(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "4:memory:/a/b")
    write_cgroup_v1(tmp_path, "a/b", 3 * GIB, 300, 0)
    write_cgroup_v1(tmp_path, "a", GIB, 700, 0)
    write_cgroup_v1(tmp_path, "", 9223372036854771712, 9000, 0)
    assert memory(tmp_path) == MemoryUsage(used_bytes=700, total_bytes=GIB)


def test_changed_limit_is_read_again(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/")
    write_cgroup_v2(tmp_path, "", str(GIB), 600, 0)
    assert memory(tmp_path) == MemoryUsage(600, GIB)
    write_cgroup_v2(tmp_path, "", str(2 * GIB), 600, 0)
    assert memory(tmp_path) == MemoryUsage(600, 2 * GIB)


@pytest.mark.parametrize("limit", ["max", str(MACHINE_BYTES)])
def test_no_limit_below_the_machines_memory(tmp_path: Path, limit: str) -> None:
    write_proc_self_cgroup(tmp_path, "0::/")
    write_cgroup_v2(tmp_path, "", limit, 600, 200)
    assert memory(tmp_path) is None


def test_group_of_another_namespace_is_not_read(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/../other")
    write_cgroup_v2(tmp_path, "", str(GIB), 600, 200)
    write_cgroup_v2(tmp_path, "../other", "4096", 7, 0)
    assert memory(tmp_path) == MemoryUsage(400, GIB)


def test_machine_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert memory(tmp_path) is None


def test_used_memory_is_not_negative(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/")
    write_cgroup_v2(tmp_path, "", str(GIB), 100, 200)
    assert memory(tmp_path) == MemoryUsage(0, GIB)
