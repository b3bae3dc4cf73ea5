"""Brokers of every kind behind one interface, so that one test runs on all of them."""

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

WAIT_S = 60.0

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
        """A new transport, not yet connected; `session` is the name of its MQTT session."""
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
        assert not session, "the in-memory broker has no sessions"
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
    """A handler that queues deliveries."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Delivery] = asyncio.Queue()

    def __call__(self, delivery: Delivery) -> None:
        self._queue.put_nowait(delivery)

    async def next(self) -> Delivery:
        return await asyncio.wait_for(self._queue.get(), WAIT_S)

    async def assert_empty(self, for_s: float = 0.3) -> None:
        """Assert that no delivery arrives within `for_s`."""
        try:
            delivery = await asyncio.wait_for(self._queue.get(), for_s)
        except TimeoutError:
            return
        raise AssertionError(f"received {delivery.topic}: {bytes(delivery.payload[:100])!r}")


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


def run_async(coroutine: Coroutine[Any, Any, None], timeout_s: float = 180.0) -> None:
    """Run a test on a new loop; assert that it leaves no task, and no exception that was not retrieved."""
    unretrieved: list[str] = []

    async def guarded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unretrieved.append(str(context)))
        await asyncio.wait_for(coroutine, timeout_s)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, f"tasks left: {sorted(task.get_name() for task in others if task)}"

    asyncio.run(guarded())
    assert unretrieved == []


def async_test(function: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a test of a coroutine function with fixtures as arguments; see `run_async`."""

    @wraps(function)
    def test(*args: Any, **kwargs: Any) -> None:
        run_async(function(*args, **kwargs))

    return test


def has_exited(pid: int, within_s: float = WAIT_S) -> bool:
    """Return whether a process exits within some time; a zombie has exited."""
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
