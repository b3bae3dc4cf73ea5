"""How often what died is started again: a few times what dies of its start, always what is killed now and then."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from brokers.errors import SparseError
from brokers.server.local_broker import start_broker
from monitor.launch.broker import RunBroker
from monitor.launch.child_process import ChildProcess, terminate_all
from tests.support.environment.external_programs import require_dependency


def test_starts_are_counted_while_they_follow_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = ChildProcess("nobody", ("--version",), tmp_path / "log")
    for expected in (1, 2, 3):
        child.start()
        terminate_all([child])
        assert child.consecutive_starts == expected
    monkeypatch.setattr("monitor.launch.child_process.STABLE_AFTER_S", 0.0)  # as if it had lived for long
    child.start()
    terminate_all([child])
    assert child.consecutive_starts == 1


def test_a_broker_that_lived_for_long_is_started_again_however_often_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    require_dependency("mosquitto")
    monkeypatch.setattr("monitor.launch.broker._RESTART_LIMIT", 1)
    own = start_broker(kind="mosquitto")
    broker = RunBroker(own.address, own)
    with ExitStack() as stack:
        stack.callback(broker.stop)

        def die() -> None:
            assert broker.local_broker is not None
            broker.local_broker.stop()

        die()
        broker.restart()
        die()
        with pytest.raises(SparseError, match="it was started again 1 times already"):
            broker.restart()
        monkeypatch.setattr("monitor.launch.broker.STEADY_S", 0.0)
        broker.restart()
        assert broker.restarts == 2
