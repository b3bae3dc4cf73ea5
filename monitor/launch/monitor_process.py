"""The monitor of a run: a process of its own that keeps what the others tell it. No run fails for it, or waits for it.

Where SPARSE_MONITOR names the monitor of the node, the run's processes tell that one, and none is started.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from brokers.config.pipeline_file import BROKER_VARIABLE, Pipeline
from brokers.telemetry.client import event_client_from_environment
from brokers.telemetry.event_socket import RUN_VARIABLE, SOCKET_VARIABLE
from monitor.daemon.unix_listener import PATH_LIMIT_BYTES
from monitor.errors import ProcessRefused
from monitor.launch.child_process import ChildProcess, kill_all, terminate_all
from monitor.launch.sites import SiteBrokers
from monitor.stores.sqlite import TELEMETRY_FILE

# It starts again so often; a monitor that dies at each start would take the stages' processor time.
_STARTS_LIMIT = 5
_LINKS_EVERY_S = 0.5
# For what it has heard to reach the disk.
_END_S = 12.0


class RunMonitor:
    """Life: `start`, `keep` now and then, `stop` when the others have ended; `kill` where nobody waits any more."""

    def __init__(self, pipeline: Pipeline, sites: SiteBrokers, folder: Path, wanted: bool) -> None:
        self._sites, self._folder = sites, folder
        self._run = os.environ.get(RUN_VARIABLE) or folder.resolve().name
        named = os.environ.get(SOCKET_VARIABLE)
        self._child: ChildProcess | None = None
        self._links_s = 0.0
        self._brokers: set[int] = set()  # process ids of those that the monitor has been told of
        self._over = False
        self._socket = Path(named) if named and wanted else _private_socket()
        if wanted and not named:
            self._child = self._made(pipeline)
        self._wanted = wanted
        self._events = event_client_from_environment(self.environment, "run", pipeline.name, pipeline=pipeline.name)

    @property
    def environment(self) -> dict[str, str]:
        """What the other processes of the run are told."""
        # Where none is wanted, that of a monitor that is not there: left out, it would be the usual one's.
        return {RUN_VARIABLE: self._run, SOCKET_VARIABLE: str(self._socket)}

    @property
    def telemetry_file(self) -> str | None:
        """Where its points are, below the run's folder."""
        return TELEMETRY_FILE if (self._folder / TELEMETRY_FILE).exists() else None

    def start(self) -> None:
        if self._child:
            self._child.start()
        if self._wanted:  # without, nothing is told
            self._events.open()

    def supervise(self, say: Callable[[str], None]) -> None:
        """Start it again should it have died, and tell what the links carried."""
        now_s = time.monotonic()
        if now_s - self._links_s >= _LINKS_EVERY_S:
            self._links_s = now_s
            self._tell_brokers()
            self._tell_links()
        child = self._child
        if child is None or self._over or child.exit_status is None:
            return
        said = child.last_log_line()
        if child.consecutive_starts >= _STARTS_LIMIT or child.exit_status == ProcessRefused.STATUS:
            self._over = True
            say(f"no more telemetry: the monitor ended: {said or 'it said nothing'} (its log: {child.log_file})")
        else:
            say("the monitor ended by itself, and was started again")
            child.start()

    def stop(self) -> None:
        """When all others have ended: say so, and end it; what it has heard is in its file then."""
        self._tell_links()
        self._events.close()
        if self._child:
            terminate_all([self._child], _END_S)
            shutil.rmtree(self._socket.parent, ignore_errors=True)  # one that was killed has left it

    def kill(self) -> None:
        """At once; `stop` still has to be called, or is waiting already."""
        if self._child:
            kill_all([self._child])

    def _made(self, pipeline: Pipeline) -> ChildProcess:
        store = str(self._folder / TELEMETRY_FILE)
        words = ("monitor", pipeline.path, "--socket", str(self._socket), "--store", store, "--run", self._run)
        handed = {BROKER_VARIABLE: self._sites.source_broker.address}
        return ChildProcess("monitor", words, self._folder / "logs" / "monitor.log", environment=handed)

    def _tell_brokers(self) -> None:
        """Brokers of ours are part of what a run costs, and cannot say so themselves."""
        for site, broker in self._sites.brokers.items():
            if broker.local_broker and broker.local_broker.pid not in self._brokers:
                self._brokers.add(broker.local_broker.pid)
                self._events.emit("start", role="broker", name=site, pid=broker.local_broker.pid)

    def _tell_links(self) -> None:
        for link in self._sites.links:
            crossed = link.emulator.byte_counts
            self._events.emit(
                "link_traffic",
                from_site=link.site,
                to_site=link.config.to,
                bytes_out=crossed.outbound,
                bytes_in=crossed.inbound,
            )


def _private_socket() -> Path:
    """Where nobody else is, nor can guess; the monitor makes the folder."""
    name = Path(f"sparse-{secrets.token_hex(8)}") / "events"
    usual = Path(tempfile.gettempdir()) / name
    # The folder for temporary files may lie deep, and a socket's path must be short.
    return usual if len(os.fsencode(usual)) <= PATH_LIMIT_BYTES else Path("/tmp") / name
