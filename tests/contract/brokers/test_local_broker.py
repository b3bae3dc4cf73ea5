"""Broker processes: reachable until stopped, on a free port only, and never left running after their parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from brokers.errors import PortTaken, UsageError
from brokers.mqtt.client import MqttTransport
from brokers.server import mosquitto_conf
from brokers.server.local_broker import BrokerKind, is_port_free, start_broker
from tests.support.brokers.broker_kinds import DeliveryQueue, has_exited, run_async
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.processes import eventually

_PARENT = """\
import sys, time
from brokers.server.local_broker import start_broker
broker = start_broker(kind=sys.argv[1])
print(broker.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["mosquitto", "embedded"])
def kind(request: pytest.FixtureRequest) -> BrokerKind:
    kind: BrokerKind = request.param
    require_dependency("iotcore" if kind == "embedded" else "mosquitto")
    return kind


@pytest.fixture(name="temporary_folder")
def _temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of the brokers."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_broker_is_reachable_until_stopped(kind: BrokerKind) -> None:
    async def test(address: str) -> None:
        transport, queue = MqttTransport(address), DeliveryQueue()
        await transport.connect()
        await transport.subscribe("t", queue)
        await transport.publish("t", b"x")
        await queue.next()
        await transport.close()

    with start_broker(kind=kind) as broker:
        assert broker.kind == kind
        run_async(test(broker.address))
        assert not is_port_free(broker.port)
        with pytest.raises(PortTaken) as caught:
            start_broker(kind=kind, port=broker.port)
        assert caught.value.fields == {"host": "127.0.0.1", "port": broker.port}
    assert has_exited(broker.pid)
    assert not broker.is_running
    assert is_port_free(broker.port)
    broker.stop()


@pytest.mark.parametrize("host", ["192.0.2.1", "unknown.invalid", "x" * 80])
def test_host_of_another_machine_raises_cannot_listen(host: str) -> None:
    with pytest.raises(UsageError, match=f"cannot listen at {host}, port 1883: [a-z]") as caught:
        start_broker(host=host, port=1883)
    assert caught.value.code == "CannotListen"


def test_broker_ends_with_its_parent(kind: BrokerKind, tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", _PARENT, kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert list(tmp_path.iterdir())
        parent.kill()
    assert has_exited(pid)
    eventually("the guard to remove the broker's folder", lambda: not list(tmp_path.iterdir()))


def test_output_of_a_broker_that_fails_is_in_the_error(monkeypatch: pytest.MonkeyPatch, temporary_folder: Path) -> None:
    require_dependency("mosquitto")
    monkeypatch.setattr(mosquitto_conf, "render", lambda config: "no_such_option 1\n")
    with pytest.raises(UsageError, match="no_such_option") as caught:
        start_broker(kind="mosquitto")
    assert caught.value.code == "BrokerFailed"
    assert list(temporary_folder.iterdir()) == []


def test_embedded_broker_replaces_a_missing_mosquitto(monkeypatch: pytest.MonkeyPatch, temporary_folder: Path) -> None:
    require_dependency("iotcore")
    monkeypatch.setattr(mosquitto_conf, "find_mosquitto", lambda: None)
    with start_broker() as broker:
        assert broker.kind == "embedded"
    with pytest.raises(UsageError, match="not installed"):
        start_broker(kind="mosquitto")
    assert list(temporary_folder.iterdir()) == []


def test_broker_that_ignores_signals_is_killed(kind: BrokerKind, temporary_folder: Path) -> None:
    broker = start_broker(kind=kind)
    os.kill(broker.pid, signal.SIGSTOP)  # a stopped process handles no signal but SIGKILL
    broker.stop(timeout_s=0.1)
    assert has_exited(broker.pid)
    assert list(temporary_folder.iterdir()) == []
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((broker.host, broker.port), timeout=30).close()
