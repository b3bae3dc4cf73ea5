"""Local brokers: they come up, take no port that is taken, and never outlive who started them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from brokers.errors import PortTaken
from brokers.mqtt.client import MqttTransport
from brokers.server import mosquitto_conf as mosquitto
from brokers.server.local_broker import BrokerFailed, BrokerKind, CannotListen, start_broker
from tests.contract.conftest import require_mosquitto
from tests.support.brokers.broker_kinds import DeliveryQueue, has_exited, run_async

_STARTER = """\
import sys, time
from brokers.server.local_broker import start_broker
broker = start_broker(kind=sys.argv[1])
print(broker.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["mosquitto", "embedded"])
def kind(request: pytest.FixtureRequest) -> BrokerKind:
    if request.param == "mosquitto":
        require_mosquitto()
        return "mosquitto"
    pytest.importorskip("iotcore", reason="the embedded broker has no wheel for this machine")
    return "embedded"


def test_a_broker_is_reachable_until_it_is_stopped(kind: BrokerKind) -> None:
    with start_broker(kind=kind) as broker:
        assert broker.kind == kind

        async def test() -> None:
            line, inbox = MqttTransport(broker.address), DeliveryQueue()
            await line.connect()
            await line.subscribe("t", inbox)
            await line.publish("t", b"x")
            await inbox.next()
            await line.close()

        run_async(test())
    assert has_exited(broker.pid)
    assert not broker.is_running
    broker.stop()


def test_a_port_that_is_taken_is_told_by_its_number(kind: BrokerKind) -> None:
    with start_broker(kind=kind) as broker, pytest.raises(PortTaken, match=str(broker.port)):
        start_broker(kind=kind, port=broker.port)


@pytest.mark.parametrize("host", ["192.0.2.1", "nobody.invalid", "x" * 80])
def test_an_address_that_is_not_this_machines_is_told_as_that_and_not_as_a_taken_port(
    kind: BrokerKind, host: str
) -> None:
    with pytest.raises(CannotListen, match=f"no broker can listen at {host}, port 1883: [a-z]"):
        start_broker(kind=kind, host=host, port=1883)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_broker_ends_with_its_parent_however_that_ends(
    kind: BrokerKind, ending: signal.Signals, tmp_path: Path
) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", _STARTER, kind]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
        assert list(tmp_path.iterdir())
        parent.send_signal(ending)
        parent.wait()
    assert has_exited(pid)
    for _ in range(100):
        if not list(tmp_path.iterdir()):
            break
        asyncio.run(asyncio.sleep(0.05))
    assert list(tmp_path.iterdir()) == []


def test_a_broker_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_mosquitto()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(mosquitto, "render", lambda config: "no_such_option 1\n")
    with pytest.raises(BrokerFailed, match="no_such_option"):
        start_broker(kind="mosquitto")


def test_where_mosquitto_is_not_installed_the_embedded_broker_serves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("iotcore")
    monkeypatch.setattr(mosquitto, "find_mosquitto", lambda: None)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with start_broker() as broker:
        assert broker.kind == "embedded"
    with pytest.raises(BrokerFailed, match="not installed"):
        start_broker(kind="mosquitto")
    assert list(tmp_path.iterdir()) == []


def test_a_broker_that_does_not_end_in_time_is_killed(
    kind: BrokerKind, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    broker = start_broker(kind=kind)
    os.kill(broker.pid, signal.SIGSTOP)  # it takes no other signal but SIGKILL now
    broker.stop(timeout_s=0.3)
    assert has_exited(broker.pid)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((broker.host, broker.port), timeout=1.0).close()
