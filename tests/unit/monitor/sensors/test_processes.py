"""Our own processes: real ones, that begin, work, end, and whose ids are somebody else's."""

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

SLEEP = "import time; time.sleep(600)"
WORK = "while True: pass"


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[ProcessSandbox]:
    with process_sandbox(tmp_path) as found:
        yield found


def by_name(points: list[TelemetryPoint]) -> dict[str, dict[str, Any]]:
    return {point.tags["name"]: dict(point.fields) for point in points}


def test_the_monitor_itself_is_always_among_them() -> None:
    own = ProcessSensor()
    own.sample(1, 0.0)
    (point,) = own.sample(2, 1.0)
    assert_matches_schema([point])
    assert point.tags == {"role": "monitor", "name": "monitor"}
    assert point.fields["pid"] == os.getpid()
    assert isinstance(memory := point.fields["memory_bytes"], int)
    assert memory > 1 << 20


def test_the_monitor_stays_the_monitor_whoever_else_it_says_it_is() -> None:
    own = ProcessSensor()
    own.on_start("run", "street", os.getpid(), "r1")
    assert [point.tags["role"] for point in own.sample(1, 0.0)] == ["monitor"]
    own.on_stop(os.getpid())
    assert [point.tags["role"] for point in own.sample(2, 0.5)] == ["monitor"]


def test_a_process_that_began_is_sampled_with_its_role_name_and_run_until_it_ends(sandbox: ProcessSandbox) -> None:
    pid = sandbox.start(sys.executable, "-c", SLEEP).pid
    own = ProcessSensor()
    own.on_start("stage", "head", pid, "r1")
    _, point = own.sample(1, 0.0)
    assert point.tags == {"role": "stage", "name": "head", "run": "r1"}
    assert point.fields["pid"] == pid
    own.on_stop(pid)
    assert set(by_name(own.sample(2, 0.5))) == {"monitor"}


def test_a_busy_process_keeps_a_core_busy_and_an_idle_one_does_not(sandbox: ProcessSandbox) -> None:
    busy, idle = (sandbox.start(sys.executable, "-c", text).pid for text in (WORK, SLEEP))
    own = ProcessSensor()
    own.on_start("stage", "busy", busy, "")
    own.on_start("stage", "idle", idle, "")
    first = by_name(own.sample(1, 0.0))
    assert first["busy"]["cpu"] is None
    begun_s = first["busy"]["cpu_s"]
    eventually("work", lambda: sum(psutil.Process(busy).cpu_times()[:2]) > begun_s + 0.5)
    second = by_name(own.sample(2, 0.5))  # a clock of our own: half a second of work in half a second
    assert second["busy"]["cpu"] >= 1.0
    assert second["busy"]["cpu"] == pytest.approx((second["busy"]["cpu_s"] - begun_s) / 0.5)
    assert second["idle"]["cpu"] < second["busy"]["cpu"]


def test_a_process_that_is_killed_is_sampled_no_more_even_before_its_parent_knows(sandbox: ProcessSandbox) -> None:
    running = sandbox.start(sys.executable, "-c", SLEEP)
    own = ProcessSensor()
    own.on_start("stage", "head", running.pid, "")
    os.kill(running.pid, signal.SIGKILL)
    process = psutil.Process(running.pid)
    eventually("its end", lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert set(by_name(own.sample(1, 0.0))) == {"monitor"}
    running.wait()
    assert set(by_name(own.sample(2, 0.5))) == {"monitor"}
    assert own._known == {}


def test_a_pid_that_was_given_to_another_process_is_noticed(
    sandbox: ProcessSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = sandbox.start(sys.executable, "-c", SLEEP).pid
    own = ProcessSensor()
    own.on_start("stage", "head", pid, "")
    # As if the one that said it began had ended, and this one, which was made at another time, had its pid.
    stranger = own._known[pid].process
    monkeypatch.setattr(stranger, "_ident", (pid, stranger.create_time() - 1000))
    assert set(by_name(own.sample(1, 0.0))) == {"monitor"}
    assert own._known == {}


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1, 2**31, 2**53 - 1])
def test_a_pid_that_means_nothing_here_is_skipped(pid: int) -> None:
    own = ProcessSensor()
    own.on_start("stage", "head", pid, "")
    own.on_stop(pid)
    assert set(by_name(own.sample(1, 0.0))) == {"monitor"}


def test_a_process_that_cannot_be_looked_into_is_skipped(
    sandbox: ProcessSandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden(process: psutil.Process) -> None:
        raise psutil.AccessDenied(process.pid)

    pid = sandbox.start(sys.executable, "-c", SLEEP).pid
    own = ProcessSensor()
    own.on_start("stage", "head", pid, "")
    monkeypatch.setattr(own._known[pid].process, "num_threads", lambda: hidden(psutil.Process(pid)))
    assert set(by_name(own.sample(1, 0.0))) == {"monitor"}


def test_a_process_that_begins_once_more_is_what_it_said_last(sandbox: ProcessSandbox) -> None:
    pid = sandbox.start(sys.executable, "-c", SLEEP).pid
    own = ProcessSensor()
    own.on_start("other", "", pid, "")
    own.on_start("stage", "head", pid, "r2")
    assert set(by_name(own.sample(1, 0.0))) == {"monitor", "head"}


def test_a_process_ends_with_the_last_of_those_in_it_that_began(sandbox: ProcessSandbox) -> None:
    pid = sandbox.start(sys.executable, "-c", SLEEP).pid
    own = ProcessSensor()
    for name in ("left", "right"):
        own.on_start("source", name, pid, "")
    own.on_stop(pid)
    assert set(by_name(own.sample(1, 0.0))) == {"monitor", "right"}
    own.on_stop(pid)
    assert set(by_name(own.sample(2, 0.5))) == {"monitor"}


def test_two_processes_of_one_name_are_two_points_to_a_database_that_goes_by_tags_and_time(
    sandbox: ProcessSandbox,
) -> None:
    own = ProcessSensor()
    for _ in range(2):
        own.on_start("source", "camera", sandbox.start(sys.executable, "-c", SLEEP).pid, "r1")
    points = own.sample(1000, 0.0)
    assert len(points) == 3
    assert len({(point.time_ns, *sorted(point.tags.items())) for point in points}) == 3


def test_more_processes_than_anybody_runs_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "Process", lambda pid=None: object())
    own = ProcessSensor()
    for pid in range(10**6, 10**6 + 2 * PROCESSES_LIMIT):
        own.on_start("other", "", pid, "")
    assert len(own._known) == PROCESSES_LIMIT
    own.on_stop(10**6)
    own.on_start("stage", "head", 5, "")
    assert 5 in own._known


def test_processes_may_begin_and_end_while_others_are_sampled(sandbox: ProcessSandbox) -> None:
    pids = [sandbox.start(sys.executable, "-c", SLEEP).pid for _ in range(3)]
    own, done = ProcessSensor(), threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            for pid in pids:
                own.on_start("stage", str(pid), pid, "")
            for pid in pids:
                own.on_stop(pid)

    coming = threading.Thread(target=come_and_go, name="come and go")
    coming.start()
    try:
        for number in range(100):
            assert own.sample(number, float(number))[0].tags["role"] == "monitor"
    finally:
        done.set()
        coming.join()
