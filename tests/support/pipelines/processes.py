"""Processes of tests: started, waited for, and killed at the end of their test, however it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

from brokers.process.download_cache import cache_folder
from tests.support.environment.checkout import ROOT
from tests.support.pipelines import fork_server
from tests.support.pipelines.fork_server import SANDBOX_VARIABLE, SPARSE_COMMAND, ForkedProcess

# A deadline for events that a test waits for: generous, since the machine may be busy with other work.
PROCESS_TIMEOUT_S = 120.0
_POLL_S = 0.02
_TORCH_CACHE_PREFIX = "torchinductor_"  # a folder that torch creates when it is imported, and keeps

T = TypeVar("T")


def eventually(description: str, poll: Callable[[], T], timeout_s: float = PROCESS_TIMEOUT_S) -> T:
    """Return the first result of `poll` that is true; fail after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not (result := poll()):
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for {description}"
        time.sleep(_POLL_S)
    return result


class Process(Protocol):
    """The common interface of `subprocess.Popen` and a forked process."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


@dataclass(frozen=True)
class CommandResult:
    """Exit status and output of a command."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def json_output(self) -> dict[str, Any]:
        """The JSON object on the last line of standard output."""
        result: dict[str, Any] = json.loads(self.stdout.strip().splitlines()[-1])
        return result


class RunningCommand:
    """A command that was started, in its own session, as in a terminal."""

    def __init__(self, process: Process, stdout: Path, stderr: Path) -> None:
        self.process = process
        self._stdout = stdout
        self._stderr = stderr

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def has_exited(self) -> bool:
        return self.process.poll() is not None

    def read_stderr(self) -> str:
        """Standard error so far."""
        return self._stderr.read_text()

    def read_stdout(self) -> str:
        """Standard output so far."""
        return self._stdout.read_text()

    def wait(self, signal_number: int | None = None, timeout_s: float = PROCESS_TIMEOUT_S) -> CommandResult:
        """Send a signal, if any, and wait for the exit."""
        if signal_number is not None:
            self.process.send_signal(signal_number)
        status = self.process.wait(timeout_s)
        return CommandResult(status, self.read_stdout(), self.read_stderr())


class ProcessSandbox:
    """The processes of one test and their descendants, which have the id of the sandbox in their environment.

    `sparse` commands are forked from the fork server. Their own environment does not show in /proc, but the server
    lists them, and they pass it on to the programs that they start.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.temp_folder = folder / "temporary"
        self.temp_folder.mkdir(exist_ok=True)
        self.sandbox_id = uuid.uuid4().hex
        self.socket_folder = Path(tempfile.gettempdir()) / f"sparse-{self.sandbox_id[:12]}"
        self._started: list[Process] = []
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SPARSE_")},
            "SPARSE_CACHE": str(cache_folder()),
            "TMPDIR": str(self.temp_folder),
            # No monitor of this machine listens there. Short: the path of a socket has at most 107 bytes.
            "XDG_RUNTIME_DIR": str(self.socket_folder),
            SANDBOX_VARIABLE: self.sandbox_id,
            **(environment or {}),
        }

    def start(self, *command: str | Path, environment: Mapping[str, str] | None = None) -> RunningCommand:
        """Start a program, with `environment` added to that of the sandbox."""
        return self._start([str(word) for word in command], environment, forked=False)

    def start_sparse(
        self, *arguments: str | Path, environment: Mapping[str, str] | None = None, forked: bool = True
    ) -> RunningCommand:
        """Start a `sparse` command; `forked=False` starts the program itself, which takes seconds longer."""
        command = [*SPARSE_COMMAND, *(str(word) for word in arguments)]
        return self._start(command, environment, forked=forked and fork_server.is_available())

    def run_sparse(self, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> CommandResult:
        """Run a `sparse` command to its end."""
        return self.start_sparse(*arguments, environment=environment).wait()

    def _start(self, command: list[str], environment: Mapping[str, str] | None, *, forked: bool) -> RunningCommand:
        paths = [self.folder / f"output-{len(self._started)}.{stream}" for stream in ("stdout", "stderr")]
        with paths[0].open("wb") as stdout, paths[1].open("wb") as stderr:
            options: dict[str, Any] = {
                "cwd": ROOT,
                "env": {**self._environment, **(environment or {})},
                "stdin": subprocess.DEVNULL,
                "stdout": stdout,
                "stderr": stderr,
                "start_new_session": True,
            }
            process: Process = (
                ForkedProcess(command[len(SPARSE_COMMAND) :], **options)
                if forked
                else subprocess.Popen(command, **options)
            )
        self._started.append(process)
        return RunningCommand(process, *paths)

    def live_processes(self) -> list[psutil.Process]:
        """The processes of this sandbox that have not exited."""
        return [process for process, _ in self.live_commands()]

    def find_process(self, *arguments: str) -> psutil.Process | None:
        """The newest process with all these arguments on its command line."""
        matches = [process for process, command in self.live_commands() if set(arguments) <= set(command)]
        return max(matches, key=lambda process: process.create_time(), default=None)

    def live_commands(self) -> list[tuple[psutil.Process, list[str]]]:
        """The processes of this sandbox that have not exited, each with its command line."""
        forked = fork_server.forked_processes(self.sandbox_id)
        commands = []
        for pid in psutil.pids():
            if pid not in forked and not self._is_marked(pid):
                continue
            with suppress(psutil.Error):  # it has exited meanwhile
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    command = SPARSE_COMMAND + forked[pid] if pid in forked else process.cmdline()
                    commands.append((process, command))
        return commands

    def _is_marked(self, pid: int) -> bool:
        """Whether a process has the id of this sandbox in its environment, as of its start."""
        try:
            return self.sandbox_id.encode() in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:  # it has exited meanwhile, or belongs to another user
            return False

    def assert_nothing_left(self) -> None:
        """Assert that no `sparse` command is running, and that brokers exit and temporary files are removed."""
        running = [command for _, command in self.live_commands() if "brokers.cli" in command]
        assert running == [], "a command that has exited left commands that it started"
        self.wait_until_nothing_left()

    def wait_until_nothing_left(self) -> None:
        """Wait until all processes have exited; assert that the folder for temporary files is empty."""
        eventually("all processes to exit", lambda: not self.live_processes())
        names = [path.name for path in self.temp_folder.iterdir()]
        assert [name for name in names if not name.startswith(_TORCH_CACHE_PREFIX)] == []

    def kill_all(self) -> None:
        """Kill all processes of the sandbox that are left."""
        for started in self._started:
            started.kill()  # just after its start a process may have no environment yet
        for process in self.live_processes():
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        for started in self._started:
            started.wait(PROCESS_TIMEOUT_S)
        shutil.rmtree(self.socket_folder, ignore_errors=True)  # of monitors that were killed


@contextmanager
def process_sandbox(folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[ProcessSandbox]:
    """A sandbox whose processes are killed at the end of the block."""
    sandbox = ProcessSandbox(folder, environment)
    try:
        yield sandbox
    finally:
        sandbox.kill_all()


def start_with_slow_monitor(sandbox: ProcessSandbox, *arguments: str | Path) -> RunningCommand:
    """Start a `sparse` command whose monitor takes longer to start than a short source takes to finish."""
    folder = sandbox.folder / "slow-monitor"
    folder.mkdir()
    # Python imports it before anything else.
    (folder / "sitecustomize.py").write_text("import sys, time\nif 'monitor' in sys.orig_argv:\n    time.sleep(6)\n")
    return sandbox.start_sparse(*arguments, environment={"PYTHONPATH": str(folder)}, forked=False)
