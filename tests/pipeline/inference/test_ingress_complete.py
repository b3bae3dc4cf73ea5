"""An ingress gateway with `keep = "all"`: killed, stopped or disconnected, every frame gets its result."""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from brokers.mqtt.client import MqttTransport
from brokers.mqtt.connection import RECEIVE_MAXIMUM
from brokers.protocol.topics import ingress_topic, results_topic
from brokers.protocol.transport import Delivery
from brokers.server.link_emulator import LinkEmulator
from brokers.server.local_broker import LocalBroker, start_broker
from tests.support.brokers.presence import wait_for_workers
from tests.support.environment.external_programs import require_broker
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S, CommandResult, ProcessSandbox, RunningCommand

STEP_S = 0.03
STEP = stage_table("step", "SleepExecutor", settings={"seconds": STEP_S})


@pytest.fixture(name="mosquitto")
def _mosquitto() -> Iterator[LocalBroker]:
    require_broker("mosquitto")
    with start_broker(kind="mosquitto") as broker:
        yield broker


class Camera:
    """Publishes numbered frames, each acknowledged by the broker, and receives all results."""

    def __init__(self, address: str) -> None:
        self._transport = MqttTransport(address)
        self.published = 0
        self._result_received = asyncio.Event()
        self._has_greeted = asyncio.Event()
        self.results: list[dict[str, Any]] = []

    @property
    def counts(self) -> Counter[int]:
        """The number of results of each frame."""
        assert [result for result in self.results if "error" in result] == []
        return Counter(round(result["values"]["values"]) for result in self.results)

    async def __aenter__(self) -> Self:
        await self._transport.connect()
        await self._transport.subscribe(results_topic("local"), self._on_result, qos=1)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._transport.close()

    async def greet(self) -> None:
        """Publish until there is a result: MQTT does not tell whether the gateway has subscribed."""
        async with asyncio.timeout(PROCESS_TIMEOUT_S):
            while not self._has_greeted.is_set():
                await self._transport.publish(ingress_topic("local", "greeting"), b'{"values": 0}', qos=1)
                await asyncio.sleep(0.1)

    async def publish(self, count: int) -> None:
        for number in range(self.published, self.published + count):
            self.published += 1
            await self._transport.publish(ingress_topic("local", "camera"), b'{"values": %d}' % number, qos=1)

    async def publish_until_exit(self, gateway: RunningCommand, result_count: int, signal_number: int) -> CommandResult:
        """Signal the gateway after so many results; publish until it exits, so that it always has frames to receive."""
        has_exited = False

        async def publish_all() -> None:
            await self.publish(60)
            while not has_exited:
                await self.publish(1)
                await asyncio.sleep(STEP_S)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(publish_all())
            await self.wait_until(lambda: len(self.counts) >= result_count)
            result = await asyncio.to_thread(gateway.wait, signal_number)
            has_exited = True
        return result

    async def wait_until(self, predicate: Callable[[], object]) -> None:
        """Wait for results until the predicate holds."""
        async with asyncio.timeout(PROCESS_TIMEOUT_S):
            while not predicate():
                self._result_received.clear()
                await self._result_received.wait()

    def _on_result(self, delivery: Delivery) -> None:
        result = json.loads(bytes(delivery.payload))
        if result["source"] == "greeting":
            self._has_greeted.set()
        else:
            self.results.append(result)
            self._result_received.set()


def write_file_and_start_worker(sandbox: ProcessSandbox, broker: LocalBroker) -> Path:
    path = write_pipeline_file(sandbox.folder, [STEP], {"kind": "ingress", "keep": "all", "window": 4})
    sandbox.start_sparse("stage", path, "step", "--broker", broker.address)
    wait_for_workers(broker.address, lambda workers: len(workers) == 1)
    return path


def start_gateway(sandbox: ProcessSandbox, path: Path, address: str) -> RunningCommand:
    return sandbox.start_sparse("source", path, "--broker", address, "--json", "--out", sandbox.folder / "out")


def test_killed_gateway_loses_no_frame(sandbox: ProcessSandbox, mosquitto: LocalBroker) -> None:
    path = write_file_and_start_worker(sandbox, mosquitto)

    async def main() -> None:
        async with Camera(mosquitto.address) as camera:
            first = start_gateway(sandbox, path, mosquitto.address)
            await camera.greet()
            await camera.publish_until_exit(first, 20, signal.SIGKILL)
            await camera.publish(30)
            second = start_gateway(sandbox, path, mosquitto.address)
            await camera.wait_until(lambda: len(camera.counts) == camera.published)
            result = await asyncio.to_thread(second.wait, signal.SIGTERM)
            assert result.returncode == 0, result.stderr
            assert result.json_output["failed"] == 0
            assert sorted(camera.counts) == list(range(camera.published))
            # A second result is marked. It had been published, but not acknowledged, when the gateway was killed.
            for number, count in camera.counts.items():
                results = [each for each in camera.results if round(each["values"]["values"]) == number]
                assert [each.get("redelivered", False) for each in results[1:]] == [True] * (count - 1)
            assert max(camera.counts.values()) <= 2
            assert sum(count - 1 for count in camera.counts.values()) <= RECEIVE_MAXIMUM

    asyncio.run(main())


def test_stopped_gateway_leaves_the_rest_at_the_broker(sandbox: ProcessSandbox, mosquitto: LocalBroker) -> None:
    path = write_file_and_start_worker(sandbox, mosquitto)

    async def main() -> None:
        async with Camera(mosquitto.address) as camera:
            first = start_gateway(sandbox, path, mosquitto.address)
            await camera.greet()
            result = await camera.publish_until_exit(first, 5, signal.SIGTERM)
            assert result.returncode == 0, result.stderr
            assert result.json_output["requests"] == result.json_output["results"]
            await camera.publish(30)
            second = start_gateway(sandbox, path, mosquitto.address)
            await camera.wait_until(lambda: len(camera.counts) == camera.published)
            await asyncio.to_thread(second.wait, signal.SIGTERM)
            assert camera.counts == Counter(range(camera.published))

    asyncio.run(main())


def test_interrupted_connections_lose_no_frame(sandbox: ProcessSandbox, mosquitto: LocalBroker) -> None:
    path = write_file_and_start_worker(sandbox, mosquitto)

    async def main(link: LinkEmulator) -> None:
        async with Camera(mosquitto.address) as camera:
            gateway = start_gateway(sandbox, path, f"mqtt://127.0.0.1:{link.port}")
            await camera.greet()
            await camera.publish(90)
            for count in (20, 40, 60):
                await camera.wait_until(lambda count=count: len(camera.counts) >= count)  # type: ignore[misc]
                link.disable()  # closes the connection
                link.enable()
            await camera.wait_until(lambda: len(camera.counts) == 90)
            await asyncio.to_thread(gateway.wait, signal.SIGTERM)
            assert sorted(camera.counts) == list(range(90))
            # Only acknowledgements that were lost with a connection cause a second result.
            assert sum(count - 1 for count in camera.counts.values()) <= 3 * RECEIVE_MAXIMUM

    link = LinkEmulator(mosquitto.port)
    link.start()
    try:
        asyncio.run(main(link))
    finally:
        link.stop()
