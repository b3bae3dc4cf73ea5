"""Restarts are bounded; a child process is terminated, or killed where it does not exit, and reaped."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from monitor.launch.child_process import STABLE_AFTER_S, ChildProcess, RestartLimit, kill_all, terminate_all

# Announces that its handlers are set; its argument is what it does at a SIGTERM.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[1] == "ignore" else lambda *_: sys.exit(3))
print("ready", flush=True)
signal.pause()
"""


@pytest.fixture(name="clock")
def _clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now_s = [1000.0]
    monkeypatch.setattr("monitor.launch.child_process.time.monotonic", lambda: now_s[0])
    return now_s


def test_restart_limit_is_reached_after_as_many_restarts(clock: list[float]) -> None:
    limit = RestartLimit(2)
    for expected in (False, False, True):
        limit.record_start()
        clock[0] += 1
        assert limit.is_reached is expected


def test_stable_process_is_restarted_however_often(clock: list[float]) -> None:
    limit = RestartLimit(1)
    for _ in range(5):
        limit.record_start()
        clock[0] += STABLE_AFTER_S
        assert not limit.is_reached
    assert limit.starts == 1


def start_child(folder: Path, on_sigterm: str) -> ChildProcess:
    """A child whose process is `PROGRAM` in place of a subcommand, so that no imports take time."""
    child = ChildProcess("child", (), folder / "child.log", capture_stdout=True)
    child._process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, on_sigterm], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"ready\n"
    return child


def test_terminate_waits_for_an_orderly_exit(tmp_path: Path) -> None:
    child = start_child(tmp_path, "exit")
    terminate_all([child, ChildProcess("never started", (), tmp_path / "log")])
    assert child.exit_status == 3
    assert child.stdout.closed


def test_terminate_kills_after_its_timeout(tmp_path: Path) -> None:
    child = start_child(tmp_path, "ignore")
    terminate_all([child], timeout_s=0.0)
    assert child.exit_status == -signal.SIGKILL


def test_kill_does_not_wait_for_an_orderly_exit(tmp_path: Path) -> None:
    child = start_child(tmp_path, "ignore")
    kill_all([child])
    terminate_all([child])
    assert child.exit_status == -signal.SIGKILL


@pytest.mark.parametrize(("log", "line"), [("one\nsparse: two\n", "two"), ("", ""), (None, "")])
def test_last_log_line_has_no_program_name(tmp_path: Path, log: str | None, line: str) -> None:
    child = ChildProcess("child", (), tmp_path / "child.log")
    if log is not None:
        child.log_file.write_text(log)
    assert child.last_log_line() == line
