"""The telemetry monitor of a run: a child process that stores the events of the run's other processes.

A run does not fail because of its monitor. It waits for its monitor only before the source starts, since a short source
could exit before its events can be received. Where SPARSE_MONITOR names the socket of the node's monitor, the processes
of the run send their events there, and no monitor is started.
"""

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from brokers.config.pipeline_file import BROKER_VARIABLE, Pipeline
from brokers.telemetry.client import RUN_VARIABLE, SOCKET_VARIABLE, event_client_from_environment
from monitor.daemon.event_socket import PATH_LIMIT_BYTES
from monitor.launch.child_process import ChildProcess, RestartLimit, kill_all, terminate_all
from monitor.launch.sites import SiteBrokers
from monitor.stores.sqlite import TELEMETRY_FILE

_RESTART_LIMIT = 4  # each start costs the workers a second of processor time
_LINK_TRAFFIC_INTERVAL_S = 0.5
# How long the source may wait for a monitor that neither receives events nor exits.
_START_TIMEOUT_S = 30.0
# How long the monitor may take to write what it has received.
_DRAIN_TIMEOUT_S = 12.0


class RunMonitor:
    """Lifecycle: `start`, `supervise` often, `stop` after all other processes; `kill` where the user will not wait."""

    def __init__(self, pipeline: Pipeline, sites: SiteBrokers, folder: Path, enabled: bool = True) -> None:
        self._sites = sites
        self._enabled = enabled
        node_socket = os.environ.get(SOCKET_VARIABLE) if enabled else None
        # Without telemetry, the path of a socket that does not exist: no path would mean the node's default one.
        self._socket = Path(node_socket) if node_socket else _private_socket()
        self._run = os.environ.get(RUN_VARIABLE) or folder.resolve().name
        self._child: ChildProcess | None = None
        if enabled and not node_socket:
            store = str(folder / TELEMETRY_FILE)
            self._child = ChildProcess(
                "monitor",
                ("monitor", pipeline.path, "--socket", str(self._socket), "--store", store, "--run", self._run),
                folder / "logs" / "monitor.log",
                environment={BROKER_VARIABLE: sites.source_broker.address},
                restart_limit=RestartLimit(_RESTART_LIMIT),
            )
        self._gave_up = False
        self._start_deadline_s = 0.0
        self._links_sent_s = 0.0
        self._announced_pids: set[int] = set()
        self._events = event_client_from_environment(self.environment, "run", pipeline.name, pipeline=pipeline.name)

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which the other processes of the run find the monitor."""
        return {RUN_VARIABLE: self._run, SOCKET_VARIABLE: str(self._socket)}

    def start(self) -> None:
        if self._child:
            self._start_deadline_s = time.monotonic() + _START_TIMEOUT_S
            self._child.start()
        if self._enabled:
            self._events.open()

    @property
    def is_starting(self) -> bool:
        """Whether the monitor runs but does not receive events yet; False after `_START_TIMEOUT_S`."""
        child = self._child
        if child is None or child.exit_status is not None or time.monotonic() > self._start_deadline_s:
            return False
        return not self._socket.exists()

    def supervise(self, print_line: Callable[[str], None]) -> None:
        """Restart the monitor if it has exited; report the run's brokers and the traffic of its links."""
        now_s = time.monotonic()
        if now_s - self._links_sent_s >= _LINK_TRAFFIC_INTERVAL_S:
            self._links_sent_s = now_s
            self._send_broker_starts()
            self._send_link_traffic()
        child = self._child
        if child is None or self._gave_up or child.exit_status is None:
            return
        if child.may_restart:
            print_line("the monitor exited and was restarted")
            child.start()
            return
        self._gave_up = True
        reason = child.last_log_line() or "no output"
        print_line(f"no telemetry from now on: the monitor exited: {reason} (its log: {child.log_file})")

    def stop(self) -> None:
        """Stop the monitor; afterwards all events it has received are in the telemetry file."""
        self._send_link_traffic()
        self._events.close()
        if self._child:
            terminate_all([self._child], _DRAIN_TIMEOUT_S)
            shutil.rmtree(self._socket.parent, ignore_errors=True)  # a monitor that was killed leaves it

    def kill(self) -> None:
        """Kill the monitor at once, and restart it no more; `stop` still has to be called."""
        self._gave_up = True
        if self._child:
            kill_all([self._child])

    def _send_broker_starts(self) -> None:
        """Brokers that the run started count towards its cost, and cannot announce themselves."""
        for site, broker in self._sites.brokers.items():
            process = broker.local_broker
            if process and process.pid not in self._announced_pids:
                self._announced_pids.add(process.pid)
                self._events.emit("start", role="broker", name=site, pid=process.pid)

    def _send_link_traffic(self) -> None:
        for link in self._sites.links:
            counts = link.emulator.byte_counts
            self._events.emit(
                "link_traffic",
                from_site=link.site,
                to_site=link.config.to,
                bytes_out=counts["outbound"],
                bytes_in=counts["inbound"],
            )


def _private_socket() -> Path:
    """A socket path that no other user can guess; the monitor creates its folder."""
    name = Path(f"sparse-{secrets.token_hex(8)}") / "events"
    path = Path(tempfile.gettempdir()) / name
    # The folder for temporary files may be too deep for a socket's path.
    return path if len(os.fsencode(path)) <= PATH_LIMIT_BYTES else Path("/tmp") / name
