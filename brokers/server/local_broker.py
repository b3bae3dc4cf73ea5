"""A broker process on this machine: started, waited for, stopped, and never left running after its parent."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Literal, Self

from brokers.config.topology import Bridge
from brokers.errors import PortTaken, UsageError
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from brokers.protocol.broker_url import BrokerAddress
from brokers.server import mosquitto_conf
from brokers.server.mosquitto_conf import MosquittoConfig

BrokerKind = Literal["mosquitto", "embedded"]

_POLL_S = 0.01
_KILL_TIMEOUT_S = 1.0  # ample for the kernel to end a process
_GUARD = Path(__file__).with_name("guard.sh").read_text(encoding="utf-8")
_RUMQTTD_CONF = Path(__file__).with_name("rumqttd.toml").read_text(encoding="utf-8")
# Run in a child process, because rumqttd cannot be stopped. It logs every packet as an error, hence the level.
_RUMQTTD_PROGRAM = """\
import logging, sys
logging.basicConfig(level=logging.WARNING)
logging.getLogger("rumqttd").setLevel(logging.CRITICAL)
from iotcore import IotCoreBroker
IotCoreBroker(config_path=sys.argv[1]).run_forever()
"""


@dataclass(eq=False)
class LocalBroker:
    """A broker process and how to reach it; a context manager that stops it."""

    kind: BrokerKind
    host: str
    port: int
    pid: int = 0
    _guard: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _folder: Path | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        return str(BrokerAddress("mqtt", self.host, self.port))

    @property
    def is_running(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def last_output(self) -> str:
        """Return the last lines that a broker that has exited wrote."""
        guard, self._guard = self._guard, None
        return "" if guard is None else guard.communicate()[0].decode(errors="replace").strip()

    def start(self, conf: str, log_path: Path | None, timeout_s: float) -> None:
        """Run it with a configuration, in its own folder, and wait until it accepts connections."""
        self._folder = Path(tempfile.mkdtemp(prefix="sparse-broker-"))
        try:
            command = _command(self.kind, self._folder, conf)
            log_path = log_path or self._folder / "broker.log"
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "broker-guard", self._folder, log_path, *command],
                env={**os.environ, **(mosquitto_conf.MALLOC_ENVIRONMENT if self.kind == "mosquitto" else {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            assert self._guard.stdout is not None
            self.pid = int(self._guard.stdout.readline())
            self._wait(timeout_s)
        except BaseException:
            self.stop()
            shutil.rmtree(self._folder, ignore_errors=True)
            raise

    def _wait(self, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        while not _accepts(self.host, self.port):
            if not self.is_running:
                raise _start_error(self.kind, self.last_output() or "it wrote no message")
            if time.monotonic() > end_s:
                raise _start_error(self.kind, f"it accepted no connection within {timeout_s:g} s")
            time.sleep(_POLL_S)

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop it and wait until its port is free; kill it after `timeout_s`. May be called twice."""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        assert guard.stdin is not None
        assert guard.stdout is not None
        guard.stdin.close()
        guard.stdout.close()
        try:
            guard.wait(timeout_s)  # the guard kills a broker that ignores SIGTERM
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):  # it has just exited
                os.killpg(guard.pid, signal.SIGKILL)
            guard.wait()
            end_s = time.monotonic() + _KILL_TIMEOUT_S
            while _accepts(self.host, self.port) and time.monotonic() < end_s:  # the broker's threads end one by one
                time.sleep(_POLL_S)
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def start_broker(
    *,
    kind: BrokerKind | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    max_packet_bytes: int = MAX_REMAINING_BYTES,
    bridges: tuple[Bridge, ...] = (),
    accepts_bridges: bool = False,
    log_path: Path | None = None,
    timeout_s: float = 10.0,
) -> LocalBroker:
    """Start a broker and return it when it accepts connections: Mosquitto if it is installed, else the embedded one.

    Port 0 is any free port. `bridges` to other brokers, and `accepts_bridges` from them, need Mosquitto. Raises
    `PortTaken`, or `UsageError` ("CannotListen", "BrokerFailed").
    """
    kind = kind or ("mosquitto" if mosquitto_conf.find_mosquitto() else "embedded")
    port = _free_port(host, port)
    if kind == "mosquitto":
        conf = mosquitto_conf.render(MosquittoConfig(port, host, max_packet_bytes, bridges, accepts_bridges))
    else:
        address = BrokerAddress("mqtt", host, port)
        conf = Template(_RUMQTTD_CONF).substitute(listen=address.host_and_port, max_packet_bytes=max_packet_bytes)
    broker = LocalBroker(kind, host, port)
    broker.start(conf, log_path, timeout_s)
    return broker


def _command(kind: BrokerKind, folder: Path, conf: str) -> list[str]:
    """Write the configuration file; return the command that runs the broker with it."""
    path = folder / ("broker.conf" if kind == "mosquitto" else "broker.toml")
    path.write_text(conf, encoding="utf-8")
    if kind == "embedded":
        return [sys.executable, "-I", "-c", _RUMQTTD_PROGRAM, str(path)]  # -I: no local folder can shadow the wheel
    program = mosquitto_conf.find_mosquitto()
    if program is None:
        raise _start_error(kind, "the program mosquitto is not installed")
    return [program, "-c", str(path)]


def _start_error(kind: BrokerKind, reason: str) -> UsageError:
    return UsageError("BrokerFailed", f"the {kind} broker did not start: {reason}", kind=kind, reason=reason)


def _accepts(host: str, port: int) -> bool:
    """Return whether a connection is accepted; a listener on all addresses is reached on the loopback one."""
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with socket.create_connection((target, port), timeout=1.0):
            return True
    except OSError:
        return False


def is_port_free(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether a broker could listen on a port now."""
    try:
        _free_port(host, port)
    except UsageError:
        return False
    return True


def _free_port(host: str, port: int) -> int:
    """Return `port`, or any free one for 0; raise `PortTaken` or `UsageError` ("CannotListen")."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as brokers do: a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that IDNA cannot encode
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise PortTaken(host, port) from error
            reason = getattr(error, "strerror", None) or "this is not a host name"
            message = f"cannot listen at {host}, port {port}: {reason[:1].lower()}{reason[1:]}"
            raise UsageError("CannotListen", message, host=host, port=port) from error
        return int(probe.getsockname()[1])
