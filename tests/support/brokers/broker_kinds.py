"""Brokers of every kind, and what a test may do to them; one small interface, so that one test runs on all."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Protocol

from brokers.mqtt.client import MqttTransport
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from brokers.protocol.transport import Delivery, Transport, Will
from brokers.server.local_broker import BrokerKind, LocalBroker, start_broker
from tests.support.brokers.in_memory import MemoryBroker, MemoryTransport

WAIT_S = 20.0

_DOOMED = """\
import asyncio, sys
from brokers.mqtt.client import MqttTransport
from brokers.protocol.transport import Will
async def main():
    await MqttTransport(sys.argv[1]).connect(will=Will(sys.argv[2], sys.argv[3].encode()))
    print("connected", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


class BrokerUnderTest(Protocol):
    """A broker under test."""

    def transport(self, session: str = "") -> Transport:
        """A new transport to it, not yet connected; with the session of that name."""
        ...

    async def kill_client_with_will(self, will: Will) -> None:
        """Connect a client with this will, and kill it."""
        ...

    def stop(self) -> None: ...

    def start(self) -> None:
        """Start again after `stop`, at the same address."""
        ...


class InMemoryBrokerUnderTest:
    def __init__(self) -> None:
        self._hub = MemoryBroker(max_packet_bytes=100_000_000)

    def transport(self, session: str = "") -> Transport:
        assert not session, "it has none"
        return MemoryTransport(self._hub)

    async def kill_client_with_will(self, will: Will) -> None:
        doomed = MemoryTransport(self._hub)
        await doomed.connect(will=will)
        self._hub.kill_client(doomed)
        await doomed.close()

    def stop(self) -> None:
        self._hub.stop()

    def start(self) -> None:
        self._hub.start()


class LocalBrokerUnderTest:
    def __init__(self, kind: BrokerKind, max_packet_bytes: int = MAX_REMAINING_BYTES) -> None:
        self._kind: BrokerKind = kind
        self._max_packet_bytes = max_packet_bytes
        self.local_broker: LocalBroker = start_broker(kind=kind, max_packet_bytes=max_packet_bytes)

    def transport(self, session: str = "") -> Transport:
        return MqttTransport(
            self.local_broker.address, client_id=session or None, session_expiry_s=600 if session else 0
        )

    async def kill_client_with_will(self, will: Will) -> None:
        await kill_client_process(self.local_broker.address, will)

    def stop(self) -> None:
        self.local_broker.stop()

    def start(self) -> None:
        self.local_broker = start_broker(
            kind=self._kind, port=self.local_broker.port, max_packet_bytes=self._max_packet_bytes
        )


class DeliveryQueue:
    """A handler that keeps what comes, and can be waited on."""

    def __init__(self) -> None:
        self._came: asyncio.Queue[Delivery] = asyncio.Queue()

    def __call__(self, delivery: Delivery) -> None:
        self._came.put_nowait(delivery)

    async def next(self) -> Delivery:
        return await asyncio.wait_for(self._came.get(), WAIT_S)

    async def assert_empty(self, for_s: float = 0.3) -> None:
        """Return after a while in which nothing came; fail otherwise."""
        try:
            delivery = await asyncio.wait_for(self._came.get(), for_s)
        except TimeoutError:
            return
        raise AssertionError(f"{delivery.topic} came with {bytes(delivery.payload[:100])!r}")


def reconnected_event(transport: Transport) -> asyncio.Event:
    """Return an event that is set after each reconnection."""
    event = asyncio.Event()

    async def set_event() -> None:
        event.set()

    transport.on_reconnect(set_event)
    return event


async def kill_client_process(address: str, will: Will) -> None:
    """Connect a process with this will to a broker, and kill it."""
    command = [sys.executable, "-c", _DOOMED, address, will.topic, will.payload.decode()]
    doomed = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert doomed.stdout is not None
    await doomed.stdout.readline()
    doomed.send_signal(signal.SIGKILL)
    await doomed.wait()


def run_async(coroutine: Coroutine[Any, Any, None], timeout_s: float = 60.0) -> None:
    """Run a test on a loop of its own; it must leave no task behind, and no exception that nobody saw."""
    unseen: list[str] = []

    async def guarded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(str(context)))
        await asyncio.wait_for(coroutine, timeout_s)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, f"tasks left: {sorted(task.get_name() for task in others if task)}"

    asyncio.run(guarded())
    assert unseen == []


def async_test(function: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a test of a coroutine function, whose arguments are fixtures, by `run_async`."""

    @wraps(function)
    def test(*args: Any, **kwargs: Any) -> None:
        run_async(function(*args, **kwargs))

    return test


def has_exited(pid: int, within_s: float = 5.0) -> bool:
    """Return whether a process ends within some time; one that nobody waits for counts as ended."""
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
            os.kill(pid, 0)
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False
