"""The processes of a run: started, watched, ended in good order, and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

# A stage finishes what it holds when told to end; one that does not in this time is killed.
DRAIN_TIMEOUT_S = 15.0
# One that lived so long did not die of its start: what is counted of its starts begins anew.
STABLE_AFTER_S = 60.0
_TAIL_BYTES = 4096


@dataclass(eq=False)
class ChildProcess:
    """One `sparse` subcommand in a process of its own, its words to standard error in a log file.

    It has a session of its own, so a Ctrl-C in the terminal reaches only us, who end things in order; and it holds the
    other end of a pipe, so it ends by itself should we be killed.
    """

    name: str
    arguments: tuple[str, ...]
    log_file: Path
    capture_stdout: bool = False
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)  # beside our own; may hold a password
    consecutive_starts: int = 0  # one soon after the other
    _begun_s: float = field(default=0.0, repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "brokers.cli", *self.arguments, "--with-parent"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if self.capture_stdout else log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        now_s = time.monotonic()
        self.consecutive_starts = 1 if now_s - self._begun_s >= STABLE_AFTER_S else self.consecutive_starts + 1
        self._begun_s = now_s

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not started"
        return self._process

    @property
    def exit_status(self) -> int | None:
        """The exit status; None while it runs."""
        return self.process.poll()

    @property
    def stdout(self) -> IO[bytes]:
        """What an answering child writes to standard output."""
        assert self.process.stdout is not None
        return self.process.stdout

    def terminate(self) -> None:
        """Ask it to end; it finishes what it holds."""
        if self.exit_status is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def last_log_line(self) -> str:
        """The last thing it said, for a person."""
        try:
            said = self.log_file.read_bytes()[-_TAIL_BYTES:].decode(errors="replace").strip()
        except OSError:
            return ""
        return said.splitlines()[-1].removeprefix("sparse: ") if said else ""


def kill_all(children: Sequence[ChildProcess]) -> None:
    """End all at once; `terminate_all` still has to be called, or is waiting already."""
    for child in children:
        if child.consecutive_starts and child.exit_status is None:
            child.process.kill()


def terminate_all(children: Sequence[ChildProcess], timeout_s: float = DRAIN_TIMEOUT_S) -> None:
    """Ask all to end, wait, and kill what does not; afterwards none is left."""
    started = [child for child in children if child.consecutive_starts]
    for child in started:
        child.terminate()
    deadline_s = time.monotonic() + timeout_s
    for child in started:
        try:
            child.process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
        for stream in (child.process.stdin, child.process.stdout):
            if stream is not None:
                stream.close()
