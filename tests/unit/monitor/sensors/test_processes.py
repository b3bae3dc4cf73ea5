"""Processes of Sparse: real ones that start, work and end, and pids that are reused or foreign."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from monitor.points.points import TelemetryPoint
from monitor.sensors.processes import PROCESSES_LIMIT, ProcessSensor
from tests.support.monitor.points import assert_matches_schema
from tests.support.pipelines.processes import ProcessSandbox, eventually, process_sandbox

BUSY_LOOP = "while True: pass"


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[ProcessSandbox]:
    with process_sandbox(tmp_path) as processes:
        yield processes


def start_sleep(sandbox: ProcessSandbox) -> int:
    return sandbox.start("sleep", "600").pid


def by_name(points: list[TelemetryPoint]) -> dict[str, dict[str, Any]]:
    return {point.tags["name"]: dict(point.fields) for point in points}


def test_monitor_itself_is_sampled() -> None:
    sensor = ProcessSensor()
    sensor.sample(1, 0.0)
    [point] = sensor.sample(2, 1.0)
    assert_matches_schema([point])
    assert point.tags == {"role": "monitor", "name": "monitor"}
    assert point.fields["pid"] == os.getpid()
    assert isinstance(memory_bytes := point.fields["memory_bytes"], int)
    assert memory_bytes > 1 << 20


def test_events_with_the_monitors_pid_are_ignored() -> None:
    sensor = ProcessSensor()
    sensor.on_start("run", "street", os.getpid(), "r1")
    assert [point.tags["role"] for point in sensor.sample(1, 0.0)] == ["monitor"]
    sensor.on_stop(os.getpid())
    assert [point.tags["role"] for point in sensor.sample(2, 0.5)] == ["monitor"]


def test_process_is_sampled_from_start_to_stop(sandbox: ProcessSandbox) -> None:
    pid = start_sleep(sandbox)
    sensor = ProcessSensor()
    sensor.on_start("stage", "head", pid, "r1")
    _, point = sensor.sample(1, 0.0)
    assert point.tags == {"role": "stage", "name": "head", "run": "r1"}
    assert point.fields["pid"] == pid
    sensor.on_stop(pid)
    assert set(by_name(sensor.sample(2, 0.5))) == {"monitor"}


def test_cpu_is_cores_in_use_since_previous_sample(sandbox: ProcessSandbox) -> None:
    busy = sandbox.start(sys.executable, "-c", BUSY_LOOP).pid
    sensor = ProcessSensor()
    sensor.on_start("stage", "busy", busy, "")
    sensor.on_start("stage", "idle", start_sleep(sandbox), "")
    first = by_name(sensor.sample(1, 0.0))
    assert first["busy"]["cpu"] is None
    begin_s = first["busy"]["cpu_s"]
    eventually("CPU time", lambda: sum(psutil.Process(busy).cpu_times()[:2]) > begin_s + 0.1)
    second = by_name(sensor.sample(2, 0.1))  # by the sensor's clock 0.1 s later
    assert second["busy"]["cpu"] >= 1.0
    assert second["busy"]["cpu"] == pytest.approx((second["busy"]["cpu_s"] - begin_s) / 0.1)
    assert second["idle"]["cpu"] < second["busy"]["cpu"]


def test_killed_process_is_dropped_even_as_zombie(sandbox: ProcessSandbox) -> None:
    running = sandbox.start("sleep", "600")
    sensor = ProcessSensor()
    sensor.on_start("stage", "head", running.pid, "")
    os.kill(running.pid, signal.SIGKILL)
    process = psutil.Process(running.pid)
    eventually("its end", lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert set(by_name(sensor.sample(1, 0.0))) == {"monitor"}
    assert sensor._processes == {}


def test_reused_pid_is_dropped(sandbox: ProcessSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = start_sleep(sandbox)
    sensor = ProcessSensor()
    sensor.on_start("stage", "head", pid, "")
    # As if the sampled process had another start time than the one that has the pid now.
    sampled = sensor._processes[pid].process
    monkeypatch.setattr(sampled, "_ident", (pid, sampled.create_time() - 1000))
    assert set(by_name(sensor.sample(1, 0.0))) == {"monitor"}
    assert sensor._processes == {}


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1, 2**31, 2**53 - 1])
def test_unknown_pid_is_ignored(pid: int) -> None:
    sensor = ProcessSensor()
    sensor.on_start("stage", "head", pid, "")
    sensor.on_stop(pid)
    assert set(by_name(sensor.sample(1, 0.0))) == {"monitor"}


def test_unreadable_process_is_skipped(sandbox: ProcessSandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def num_threads() -> int:
        raise psutil.AccessDenied(pid)

    pid = start_sleep(sandbox)
    sensor = ProcessSensor()
    sensor.on_start("stage", "head", pid, "")
    monkeypatch.setattr(sensor._processes[pid].process, "num_threads", num_threads)
    assert set(by_name(sensor.sample(1, 0.0))) == {"monitor"}


def test_second_start_replaces_tags_and_adds_a_client(sandbox: ProcessSandbox) -> None:
    pid = start_sleep(sandbox)
    sensor = ProcessSensor()
    for name in ("left", "right"):
        sensor.on_start("source", name, pid, "")
    sensor.on_stop(pid)
    assert set(by_name(sensor.sample(1, 0.0))) == {"monitor", "right"}
    sensor.on_stop(pid)
    assert set(by_name(sensor.sample(2, 0.5))) == {"monitor"}


def test_processes_of_one_name_have_a_point_each(sandbox: ProcessSandbox) -> None:
    sensor = ProcessSensor()
    for _ in range(2):
        sensor.on_start("source", "camera", start_sleep(sandbox), "r1")
    assert [point.tags["name"] for point in sensor.sample(1000, 0.0)] == ["monitor", "camera", "camera"]


def test_number_of_processes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "Process", lambda pid=None: object())
    sensor = ProcessSensor()
    for pid in range(10**6, 10**6 + 2 * PROCESSES_LIMIT):
        sensor.on_start("other", "", pid, "")
    assert len(sensor._processes) == PROCESSES_LIMIT
    sensor.on_stop(10**6)
    sensor.on_start("stage", "head", 5, "")
    assert 5 in sensor._processes


def test_events_and_samples_may_come_from_different_threads(sandbox: ProcessSandbox) -> None:
    pids = [start_sleep(sandbox) for _ in range(3)]
    sensor = ProcessSensor()
    done = threading.Event()

    def send_events() -> None:
        while not done.is_set():
            for pid in pids:
                sensor.on_start("stage", str(pid), pid, "")
            for pid in pids:
                sensor.on_stop(pid)

    sender = threading.Thread(target=send_events, name="sender")
    sender.start()
    try:
        for number in range(100):
            assert sensor.sample(number, float(number))[0].tags["role"] == "monitor"
    finally:
        done.set()
        sender.join()
