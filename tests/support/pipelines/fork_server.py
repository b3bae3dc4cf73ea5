"""Fork server: a process that has imported torch and Sparse once, and forks the `sparse` commands of tests.

A new Python process spends 1 to 9 s of processor time on imports before it runs a command; a forked one about 0.05 s.
A forked command has the standard streams, environment, working folder and session that its caller asks for. Signals
reach it, and its exit status is reported to its caller. `sparse` commands that it starts are forked from the server,
too; other programs are started as always.

The server is started by the first test that needs it, serves all processes of a test run, and exits with their parent
(see tests/conftest.py). It has a single thread, so that forking it is safe.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from brokers.cli import main
from brokers.process.files import file_lock
from tests.support.environment.checkout import PACKAGES, ROOT

SOCKET_VARIABLE = "SPARSE_TEST_FORK_SERVER"  # path of the server's socket
OWNER_VARIABLE = "SPARSE_TEST_OWNER_PID"  # the process with which the server exits
SANDBOX_VARIABLE = "SPARSE_TEST_SANDBOX_ID"  # in the environment of all processes of a sandbox
SPARSE_COMMAND = [sys.executable, "-m", "brokers.cli"]

_START_TIMEOUT_S = 180.0
_POLL_S = 0.02
_MAX_REQUEST_BYTES = 1 << 20
_POPEN_OPTIONS = {"stdin", "stdout", "stderr", "env", "cwd", "start_new_session"}

Stream = int | IO[Any] | None


def is_available() -> bool:
    """Whether commands can be forked: on Linux, unless SPARSE_TEST_REAL_PROCESSES is set."""
    return hasattr(os, "pidfd_open") and not os.environ.get("SPARSE_TEST_REAL_PROCESSES")


# Client ---------------------------------------------------------------------------------------------------------------


class ForkedProcess:
    """A forked `sparse` command, with the part of the interface of `subprocess.Popen` that Sparse and its tests use."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
        env: dict[str, str] | None = None,
        cwd: str | Path | None = None,
        start_new_session: bool = False,
    ) -> None:
        self.args = [*SPARSE_COMMAND, *arguments]
        self.returncode: int | None = None
        self._lock = threading.Lock()
        request = {
            "arguments": list(arguments),
            "environment": dict(os.environ if env is None else env),
            "folder": str(cwd or os.getcwd()),
            "new_session": start_new_session,
        }
        with ExitStack() as child_ends:
            self.stdin, child_stdin = _open_stream(stdin, 0, child_ends)
            self.stdout, child_stdout = _open_stream(stdout, 1, child_ends)
            same = stderr == subprocess.STDOUT
            self.stderr, child_stderr = (None, child_stdout) if same else _open_stream(stderr, 2, child_ends)
            self._connection = _connect()
            socket.send_fds(self._connection, [json.dumps(request).encode()], [child_stdin, child_stdout, child_stderr])
        self.pid: int = json.loads(self._connection.recv(_MAX_REQUEST_BYTES))["pid"]

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while the process runs."""
        with self._lock:
            if self.returncode is None and self._is_readable(0.0):
                reply = self._connection.recv(_MAX_REQUEST_BYTES)
                # The server has killed all its processes if it exited.
                self.returncode = json.loads(reply)["status"] if reply else -signal.SIGKILL
                self._connection.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline_s = float("inf") if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            self._is_readable(min(remaining_s, 0.5))  # in slices: another thread may take the status
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has just exited
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _is_readable(self, timeout_s: float) -> bool:
        with suppress(ValueError):  # another thread has closed the connection
            poll = select.poll()
            poll.register(self._connection, select.POLLIN)
            return bool(poll.poll(timeout_s * 1000))
        return False


def forked_processes(sandbox_id: str) -> dict[int, list[str]]:
    """Return the arguments of the forked commands of a sandbox that are running, by process id."""
    if not (path := os.environ.get(SOCKET_VARIABLE)) or not Path(path).exists():
        return {}
    with _connect() as connection:
        connection.send(json.dumps({"sandbox": sandbox_id}).encode())
        return dict(json.loads(connection.recv(_MAX_REQUEST_BYTES)))


def _open_stream(stream: Stream, number: int, child_ends: ExitStack) -> tuple[IO[bytes] | None, int]:
    """Return our end of a pipe, if one was asked for, and the file descriptor for the child."""
    if stream == subprocess.PIPE:
        reader, writer = os.pipe()
        ours, theirs = (writer, reader) if number == 0 else (reader, writer)
        child_ends.callback(os.close, theirs)
        return open(ours, "wb" if number == 0 else "rb"), theirs
    if stream == subprocess.DEVNULL:
        null = os.open(os.devnull, os.O_RDWR)
        child_ends.callback(os.close, null)
        return None, null
    if stream is None:
        return None, number
    return None, stream if isinstance(stream, int) else stream.fileno()


def _connect() -> socket.socket:
    """Connect to the server; start it if it is not up."""
    path = Path(os.environ[SOCKET_VARIABLE])
    if not path.exists():
        _start_server(path)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    return connection


def _start_server(path: Path) -> None:
    with file_lock(path.with_name("lock")):
        if path.exists():  # another process has started it
            return
        log = path.with_name("log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.pipelines.fork_server", path, os.environ[OWNER_VARIABLE]],
                cwd=ROOT,
                env={name: value for name, value in os.environ.items() if not name.startswith("SPARSE_")},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not path.exists():
            status = process.poll()
            assert status is None, f"the fork server exited with status {status}: {log.read_text()}"
            assert time.monotonic() < deadline_s, "the fork server did not start"
            time.sleep(_POLL_S)
        process.returncode = 0  # it outlives this process: no warning that it was not waited for


# Server ---------------------------------------------------------------------------------------------------------------


@dataclass
class _Child:
    pid: int
    arguments: list[str]
    sandbox: str
    pidfd: int
    connection: socket.socket | None  # None after its caller has closed it


@dataclass(frozen=True)
class _ForkRequest:
    """The command of a forked process and its environment."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    new_session: bool
    streams: list[int]


class ForkServer:
    """Serves fork requests at a UNIX socket until the process `owner_pid` exits."""

    def __init__(self, path: Path, owner_pid: int) -> None:
        self._path = path
        self._selector = selectors.PollSelector()  # no epoll, whose kernel object forked processes would share
        self._children: dict[int, _Child] = {}  # by pidfd
        self._owner = os.pidfd_open(owner_pid)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._selector.register(self._owner, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def serve(self) -> _ForkRequest | None:
        """Serve to the end; returns None in the server, and its request in each forked process."""
        self._listener.bind(f"{self._path}.new")
        self._listener.listen(128)
        os.rename(f"{self._path}.new", self._path)  # appears when it accepts connections
        while True:
            for key, _ in self._selector.select():
                if key.fd == self._owner:
                    self._kill_all()
                    return None
                if key.fd in self._children:
                    self._reap(self._children[key.fd])
                elif key.fileobj is self._listener:
                    self._selector.register(self._listener.accept()[0], selectors.EVENT_READ)
                elif isinstance(key.fileobj, socket.socket) and (request := self._receive(key.fileobj)):
                    return request

    def _receive(self, connection: socket.socket) -> _ForkRequest | None:
        """Handle one message of a client; returns a request in the process that was forked for it."""
        data, streams, _, _ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, 3)
        if not data:
            self._close(connection)
            return None
        message = json.loads(data)
        if "sandbox" in message:
            children = [
                [each.pid, each.arguments] for each in self._children.values() if each.sandbox == message["sandbox"]
            ]
            connection.send(json.dumps(children).encode())
            return None
        request = _ForkRequest(**message, streams=streams)
        pid = os.fork()
        if pid == 0:
            self._close_all()
            return request
        for descriptor in streams:
            os.close(descriptor)
        sandbox = request.environment.get(SANDBOX_VARIABLE, "")
        child = _Child(pid, request.arguments, sandbox, os.pidfd_open(pid), connection)
        self._children[child.pidfd] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ)
        with suppress(BrokenPipeError):
            connection.send(json.dumps({"pid": pid}).encode())
        return None

    def _reap(self, child: _Child) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
        self._selector.unregister(child.pidfd)
        os.close(child.pidfd)
        del self._children[child.pidfd]
        if child.connection is not None:
            with suppress(BrokenPipeError):
                child.connection.send(json.dumps({"status": status}).encode())
            self._close(child.connection)

    def _close(self, connection: socket.socket) -> None:
        for child in self._children.values():
            if child.connection is connection:
                child.connection = None
        self._selector.unregister(connection)
        connection.close()

    def _kill_all(self) -> None:
        for child in self._children.values():
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)

    def _close_all(self) -> None:
        """Close all descriptors of the server, in a forked process."""
        for key in self._selector.get_map().values():
            os.close(key.fd)
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.detach()


def _run_forked(request: _ForkRequest, server: Path) -> None:
    """Become a process as if started with this request, run its command, and exit."""
    if request.new_session:
        os.setsid()
    for number, descriptor in enumerate(request.streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request.environment)
    os.environ[SOCKET_VARIABLE] = str(server)
    os.chdir(request.folder)
    tempfile.tempdir = None  # set again by TMPDIR
    sys.path += [path for path in request.environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = ["sparse", *request.arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    subprocess.Popen = _ForkingPopen  # type: ignore[misc]
    status = 1
    try:
        status = main(request.arguments)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)  # as the interpreter ends itself
    except SystemExit as exit_request:
        status = exit_request.code if isinstance(exit_request.code, int) else int(exit_request.code is not None)
    except BaseException:  # noqa: BLE001 - printed, as the interpreter does
        traceback.print_exc()
    # The end of the interpreter in short: destroying all modules would take longer than most commands.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _ForkingPopen(subprocess.Popen[bytes]):
    """`subprocess.Popen` in a forked process: forks `sparse` commands, starts all other programs."""

    def __new__(cls, args: Any, *positional: Any, **options: Any) -> Any:
        if isinstance(args, list) and args[:3] == SPARSE_COMMAND and not positional and set(options) <= _POPEN_OPTIONS:
            return ForkedProcess(args[3:], **options)  # of another class: `__init__` is not called
        return super().__new__(cls)


def _import_everything() -> None:
    """Import all modules of Sparse, and libraries that they import when they are used."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)
    for library in ("torchvision", "typer.main", "sklearn.datasets"):
        with suppress(ModuleNotFoundError):  # an optional dependency
            importlib.import_module(library)


def _serve(path: Path, owner_pid: int) -> None:
    _import_everything()
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which ends this process by its own end
    gc.collect()
    gc.freeze()  # a collection in a forked process would copy the memory that it shares with this one
    request = ForkServer(path, owner_pid).serve()
    if request is not None:
        _run_forked(request, path)
    shutil.rmtree(path.parent, ignore_errors=True)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
