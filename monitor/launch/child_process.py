"""Child processes of a run: started, restarted after a crash, terminated in order, never left behind."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from brokers.cli import EXIT_USAGE

# How long a process may finish the work it holds after SIGTERM, before it is killed.
DRAIN_TIMEOUT_S = 15.0
# A process that was up for this long did not die of its start.
STABLE_AFTER_S = 60.0
_TAIL_BYTES = 4096


@dataclass(slots=True)
class RestartLimit:
    """Bounds restarts in a row: a process that crashes at every start would be restarted for ever."""

    limit: int = 20
    starts: int = 0  # in a row; one that follows `STABLE_AFTER_S` of uptime is the first of a new row
    _started_s: float = 0.0

    def record_start(self) -> None:
        self.starts = 1 if self._was_stable else self.starts + 1
        self._started_s = time.monotonic()

    @property
    def is_reached(self) -> bool:
        return self.starts > self.limit and not self._was_stable

    @property
    def _was_stable(self) -> bool:
        return time.monotonic() - self._started_s >= STABLE_AFTER_S


@dataclass(eq=False)
class ChildProcess:
    """One `sparse` subcommand in a separate process, with its log in a file.

    It has its own session, so that a Ctrl-C in the terminal reaches only us, who stop the children in order. It exits
    when the pipe to its standard input closes, so also when we are killed.
    """

    name: str
    arguments: tuple[str, ...]
    log_file: Path
    capture_stdout: bool = False
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)  # added to ours; may hold a password
    restart_limit: RestartLimit = field(default_factory=RestartLimit)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start the process; may be called again after it has exited."""
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "brokers.cli", *self.arguments, "--with-parent"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if self.capture_stdout else log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        self.restart_limit.record_start()

    @property
    def was_started(self) -> bool:
        return self._process is not None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not started"
        return self._process

    @property
    def exit_status(self) -> int | None:
        """The exit status, negative for a signal; None while the process runs."""
        return self.process.poll()

    @property
    def may_restart(self) -> bool:
        """Whether a process that has exited may be started again: not after a mistake of the user's."""
        return not self.restart_limit.is_reached and self.exit_status != EXIT_USAGE

    @property
    def stdout(self) -> IO[bytes]:
        """The standard output of a process whose output is captured."""
        assert self.process.stdout is not None
        return self.process.stdout

    def last_log_line(self) -> str:
        """The last line of its log, for an error message; empty if the log is."""
        try:
            text = self.log_file.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip()
        except OSError:
            return ""
        return text.splitlines()[-1].removeprefix("sparse: ") if text else ""


def kill_all(children: Sequence[ChildProcess]) -> None:
    """Kill all at once; `terminate_all` still has to be called to reap them."""
    for child in children:
        if child.was_started:
            child.process.kill()


def terminate_all(children: Sequence[ChildProcess], timeout_s: float = DRAIN_TIMEOUT_S) -> None:
    """Terminate all, wait for their exit, and kill those that take longer than `timeout_s` together."""
    started = [child.process for child in children if child.was_started]
    for process in started:
        process.terminate()
    deadline_s = time.monotonic() + timeout_s
    for process in started:
        try:
            process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
