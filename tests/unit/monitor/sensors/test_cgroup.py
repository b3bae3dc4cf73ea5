"""The memory that a container may have, from folders like Linux's."""

from __future__ import annotations

from pathlib import Path

from monitor.sensors.cgroup import MemoryCgroups, MemoryUsage
from tests.support.monitor.cgroup_folders import GIB, write_cgroup_v1, write_cgroup_v2, write_proc_self_cgroup

MACHINE = 8 * GIB


def memory(root: Path) -> MemoryUsage | None:
    return MemoryCgroups(root).memory_usage(below_bytes=MACHINE)


def test_version_2_of_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/")
    write_cgroup_v2(tmp_path, "", str(GIB), 600, 200)
    assert memory(tmp_path) == MemoryUsage(used_bytes=400, total_bytes=GIB)


def test_version_1_of_a_container_that_is_told_its_path_on_the_host(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "5:devices:/docker/abc", "4:cpu,memory:/docker/abc", "0::/docker/abc")
    write_cgroup_v1(tmp_path, "", 2 * GIB, 600, 200)
    assert memory(tmp_path) == MemoryUsage(used_bytes=400, total_bytes=2 * GIB)


def test_a_limit_further_out_holds_where_the_own_group_has_none(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/system.slice/sparse.service")
    write_cgroup_v2(tmp_path, "system.slice/sparse.service", "max", 100, 0)
    write_cgroup_v2(tmp_path, "system.slice", str(3 * GIB), 5000, 1000)
    assert memory(tmp_path) == MemoryUsage(used_bytes=4000, total_bytes=3 * GIB)


def test_the_tightest_limit_counts(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "4:memory:/a/b")
    write_cgroup_v1(tmp_path, "a/b", 3 * GIB, 300, 0)
    write_cgroup_v1(tmp_path, "a", GIB, 700, 0)
    write_cgroup_v1(tmp_path, "", 9223372036854771712, 9000, 0)
    assert memory(tmp_path) == MemoryUsage(used_bytes=700, total_bytes=GIB)


def test_a_limit_that_is_changed_is_seen(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/")
    write_cgroup_v2(tmp_path, "", str(GIB), 600, 0)
    groups = MemoryCgroups(tmp_path)
    assert groups.memory_usage(below_bytes=MACHINE) == MemoryUsage(600, GIB)
    write_cgroup_v2(tmp_path, "", str(2 * GIB), 600, 0)
    assert groups.memory_usage(below_bytes=MACHINE) == MemoryUsage(600, 2 * GIB)


def test_without_a_limit_below_the_machines_memory_there_is_none(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/")
    for limit in ("max", str(MACHINE)):
        write_cgroup_v2(tmp_path, "", limit, 600, 200)
        assert memory(tmp_path) is None


def test_a_group_in_another_namespace_is_not_looked_for_outside_the_mount(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/../other")
    write_cgroup_v2(tmp_path, "", str(GIB), 600, 200)
    write_cgroup_v2(tmp_path, "../other", "4096", 7, 0)
    assert memory(tmp_path) == MemoryUsage(400, GIB)


def test_a_machine_without_control_groups_has_none(tmp_path: Path) -> None:
    assert memory(tmp_path) is None


def test_more_cached_than_used_is_nothing_used(tmp_path: Path) -> None:
    write_proc_self_cgroup(tmp_path, "0::/")
    write_cgroup_v2(tmp_path, "", str(GIB), 100, 200)
    assert memory(tmp_path) == MemoryUsage(0, GIB)
