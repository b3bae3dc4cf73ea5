"""Real processes for tests: started, waited for, and ended by their ids, all of them, however the test ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil

from brokers.process.download_cache import cache_folder
from tests.support.environment.checkout import ROOT

# On a machine that does other things as well, starting a process that imports torch takes its time.
PROCESS_TIMEOUT_S = 90.0
_POLL_S = 0.02
_MARK = "SPARSE_TEST_MARK"
_TORCHS_OWN = "torchinductor_"  # a cache that torch makes when it is imported, and means to keep

T = TypeVar("T")


def eventually(description: str, poll: Callable[[], T], timeout_s: float = PROCESS_TIMEOUT_S) -> T:
    """Return what `look` sees as soon as that is something; fail when it takes too long."""
    end_s = time.monotonic() + timeout_s
    while not (found := poll()):
        assert time.monotonic() < end_s, f"waited {timeout_s:g} s for {description}"
        time.sleep(_POLL_S)
    return found


@dataclass(frozen=True)
class CommandResult:
    """What a command that has ended said."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def json_output(self) -> dict[str, Any]:
        """The one JSON object on its last line of standard output."""
        found: dict[str, Any] = json.loads(self.stdout.strip().splitlines()[-1])
        return found


class RunningCommand:
    """A command that runs, in a session of its own, as in a terminal of its own."""

    def __init__(self, process: subprocess.Popen[bytes], out: Path, err: Path) -> None:
        self.process, self._out, self._err = process, out, err

    @property
    def pid(self) -> int:
        return self.process.pid

    def read_stderr(self) -> str:
        """What it has said so far to standard error."""
        return self._err.read_text()

    def read_stdout(self) -> str:
        """What it has written so far to standard output."""
        return self._out.read_text()

    def wait(self, signal_number: int | None = None, timeout_s: float = PROCESS_TIMEOUT_S) -> CommandResult:
        """Wait until it ends, by this signal if one is given."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        status = self.process.wait(timeout_s)
        return CommandResult(status, self._out.read_text(), self._err.read_text())


class ProcessSandbox:
    """Everything that one test starts. What it starts carries a mark in its environment, as do its own children."""

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.temp_folder = folder / "temporary"
        self.temp_folder.mkdir(exist_ok=True)
        self.sandbox_id = uuid.uuid4().hex
        self.socket_folder = Path(tempfile.gettempdir()) / f"sparse-{self.sandbox_id[:12]}"
        self._started: list[subprocess.Popen[bytes]] = []
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SPARSE_")},
            # pytest makes warnings errors in this process; what users start has none of its settings.
            "SPARSE_CACHE": str(cache_folder()),
            "TMPDIR": str(self.temp_folder),
            # Where no monitor of this machine listens. Short: a socket's path has some hundred bytes.
            "XDG_RUNTIME_DIR": str(self.socket_folder),
            _MARK: self.sandbox_id,
            **(environment or {}),
        }

    def start(self, *command: str | Path, environment: Mapping[str, str] | None = None) -> RunningCommand:
        """Start any program; `environment` is beside what all have."""
        out, err = (self.folder / f"said-{len(self._started)}.{end}" for end in ("out", "err"))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=ROOT,
                env={**self._environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        self._started.append(process)
        return RunningCommand(process, out, err)

    def start_sparse(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> RunningCommand:
        """Start `sparse`."""
        return self.start(sys.executable, "-m", "brokers.cli", *arguments, environment=environment)

    def live_processes(self) -> list[psutil.Process]:
        """The processes that this test has started, directly or not, and that have not ended."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == self.sandbox_id and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # it has ended meanwhile, or is somebody else's
                continue
        return found

    def find_process(self, *words: str) -> psutil.Process | None:
        """The newest process whose command line has all these words."""
        found = [process for process in self.live_processes() if set(words) <= set(_words(process))]
        return max(found, key=lambda process: process.create_time(), default=None)

    def assert_nothing_left(self, within_s: float = 0.5) -> None:
        """Assert that every process has ended, and left nothing in the folder for temporary files."""
        end_s = time.monotonic() + within_s
        while (alive := self.live_processes()) and time.monotonic() < end_s:
            time.sleep(_POLL_S)
        left = [" ".join(_words(process)) for process in alive]
        left += [path.name for path in self.temp_folder.iterdir() if not path.name.startswith(_TORCHS_OWN)]
        assert not left, f"left behind: {left}"

    def kill_all(self) -> None:
        """Kill what is left, by its id."""
        for started in self._started:
            started.kill()  # for an instant after its start a process shows no environment, and so no mark
        for process in self.live_processes():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.Error:
                continue
        for started in self._started:
            started.wait(PROCESS_TIMEOUT_S)
        shutil.rmtree(self.socket_folder, ignore_errors=True)  # of monitors that were killed


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def process_sandbox(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[ProcessSandbox]:
    """A machine whose processes all end with the test."""
    found = ProcessSandbox(folder, environment)
    try:
        yield found
    finally:
        found.kill_all()
