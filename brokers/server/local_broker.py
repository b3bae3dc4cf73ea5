"""A broker of this machine's own: started, waited for, stopped, and never left behind."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from brokers.config.bridge_rules import Bridge
from brokers.errors import PortTaken, UsageError
from brokers.server import mosquitto_conf as mosquitto
from brokers.server import rumqttd_conf as embedded

BrokerKind = Literal["mosquitto", "embedded"]

MAX_PACKET_BYTES: dict[BrokerKind, int] = {
    "mosquitto": mosquitto.MAX_PACKET_BYTES,
    "embedded": embedded.MAX_PACKET_BYTES,
}
_POLL_S = 0.01
_KILLED_S = 1.0  # ample for the kernel to end a process
# The broker runs under a shell that waits for two ends: the broker's own, and that of its standard input, whose other
# end only we hold. However we die, that pipe closes, the broker is ended and its folder is removed. It has a session of
# its own, so that a Ctrl-C in the terminal reaches us and not the broker, which is still needed for a clean end. In the
# end it kills its process group, itself with it: whatever is left of the wait and of the broker.
_GUARD = """\
folder=$1; log=$2; shift 2
exec 3<&0
"$@" </dev/null >>"$log" 2>&1 3<&- &
broker=$!
echo $broker
(read -r _ <&3; kill $broker 2>/dev/null; sleep 3; kill -9 $broker 2>/dev/null) >/dev/null 2>&1 &
exec 3<&-
wait $broker
tail -n 3 "$log" | tr '\\n' ' '
rm -rf "$folder"
kill -9 0
"""


@dataclass(eq=False)
class BrokerFailed(UsageError):
    """A local broker that did not come up."""

    kind: str
    reason: str

    def __str__(self) -> str:
        return f"the {self.kind} broker did not start: {self.reason}"


@dataclass(eq=False)
class CannotListen(UsageError):
    """An address that is none of this machine's, or a port that not everybody may use."""

    host: str
    port: int
    reason: str

    def __str__(self) -> str:
        return f"no broker can listen at {self.host}, port {self.port}: {self.reason}"


@dataclass(eq=False)
class LocalBroker:
    """A broker that runs, and how to reach it. Stop it with `stop`, or use it as a context manager."""

    kind: BrokerKind
    host: str
    port: int
    pid: int
    mqtt311_port: int | None = None  # where MQTT 3.1.1 clients go; Mosquitto speaks both versions on `port`
    _guard: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _folder: Path | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt://{host}:{self.port}"

    @property
    def is_running(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def last_output(self) -> str:
        """Return what a broker that has ended wrote last."""
        guard, self._guard = self._guard, None
        return "" if guard is None else guard.communicate()[0].decode(errors="replace").strip()

    def stop(self, timeout_s: float = 5.0) -> None:
        """End it and wait until its port is free; kill it when that takes longer. May be called twice."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        assert guard.stdin is not None
        assert guard.stdout is not None
        guard.stdin.close()
        guard.stdout.close()
        try:
            guard.wait(timeout_s)  # the guard itself kills a broker that does not end
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(guard.pid, signal.SIGKILL)  # its whole group: the broker is in it
            guard.wait()
            end_s = time.monotonic() + _KILLED_S
            while _accepts(self.host, self.port) and time.monotonic() < end_s:  # threads end one by one
                time.sleep(_POLL_S)
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_broker(
    *,
    kind: BrokerKind | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    mqtt311_port: int | None = None,
    max_packet_bytes: int | None = None,
    bridges: tuple[Bridge, ...] = (),
    accepts_bridges: bool = False,
    log_path: Path | None = None,
    timeout_s: float = 10.0,
) -> LocalBroker:
    """Start a broker and return when it accepts connections: Mosquitto where it is installed, else the embedded one.

    Port 0 is any free port. `plain_port` opens a second listener for MQTT 3.1.1 on the embedded broker. `bridges`: kept
    by it, `bridged`: by others to it; Mosquitto only. Raises `PortTaken`, `CannotListen` or `BrokerFailed`.
    """
    kind = kind or ("mosquitto" if mosquitto.find_mosquitto() else "embedded")
    port = _free_port(host, port)
    if mqtt311_port is not None:
        mqtt311_port = _free_port(host, mqtt311_port) if kind == "embedded" else port
    limit = max_packet_bytes or MAX_PACKET_BYTES[kind]
    if kind == "mosquitto":
        conf = mosquitto.render(
            mosquitto.MosquittoConfig(port, host, limit, bridges=bridges, accepts_bridges=accepts_bridges)
        )
    else:
        conf = embedded.render(embedded.RumqttdConfig(port, host, mqtt311_port, limit))
    folder = Path(tempfile.mkdtemp(prefix="sparse-broker-"))
    try:
        command = _configure(kind, folder, conf)
        arguments = [str(folder), str(log_path or folder / "broker.log"), *command]
        broker = _start(LocalBroker(kind, host, port, 0, mqtt311_port, None, folder), arguments)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # from here on the guard removes it
        raise
    try:
        _wait(broker, timeout_s)
    except BaseException:
        broker.stop()
        raise
    return broker


def _configure(kind: BrokerKind, folder: Path, conf: str) -> list[str]:
    """Write the configuration into `folder`; return the command that runs the broker with it."""
    path = folder / ("broker.conf" if kind == "mosquitto" else "broker.toml")
    path.write_text(conf, encoding="utf-8")
    if kind == "embedded":
        return embedded.command(str(path))
    program = mosquitto.find_mosquitto()
    if program is None:
        raise BrokerFailed(kind, "the program mosquitto is not installed")
    return [program, "-c", str(path)]


def _start(broker: LocalBroker, arguments: list[str]) -> LocalBroker:
    guard = subprocess.Popen(
        ["/bin/sh", "-c", _GUARD, "broker-guard", *arguments],
        env={**os.environ, **(mosquitto.MALLOC_ENVIRONMENT if broker.kind == "mosquitto" else {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert guard.stdout is not None
    return replace(broker, pid=int(guard.stdout.readline()), _guard=guard)


def _wait(broker: LocalBroker, timeout_s: float) -> None:
    end_s = time.monotonic() + timeout_s
    ports = {broker.port, broker.mqtt311_port or broker.port}
    while ports:
        if not broker.is_running:
            raise BrokerFailed(broker.kind, broker.last_output() or "it said nothing")
        if time.monotonic() > end_s:
            raise BrokerFailed(broker.kind, f"it accepted no connection within {timeout_s:g} s")
        ports = {port for port in ports if not _accepts(broker.host, port)}
        if ports:
            time.sleep(_POLL_S)


def _accepts(host: str, port: int) -> bool:
    """Return whether something listens; a listener on every address is reached on the loopback one."""
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with socket.create_connection((target, port), timeout=1.0):
            return True
    except OSError:
        return False


def is_port_free(port: int, host: str = "127.0.0.1") -> bool:
    """Whether a broker could listen there now."""
    try:
        _free_port(host, port)
    except (PortTaken, CannotListen):
        return False
    return True


def _free_port(host: str, port: int) -> int:
    """Return `port`, or any free one for 0; raise `PortTaken` or `CannotListen`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as brokers do: a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except (OSError, UnicodeError) as error:  # the latter for what no name of a host can be
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise PortTaken(host, port) from error
            reason = getattr(error, "strerror", None) or "that is no name of a host"
            raise CannotListen(host, port, reason[:1].lower() + reason[1:]) from error
        return int(probe.getsockname()[1])
