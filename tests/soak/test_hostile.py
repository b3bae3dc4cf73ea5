"""Hostile clients at every topic of a pipeline: no process exits, and valid requests are answered correctly.

Not promised, and not tested: a client that may publish to an inbox can answer requests of others whose ids it knows,
and a client that may publish presence records can draw tasks to workers that do not exist. Access lists prevent both.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import psutil
import pytest

from brokers.cli import INTERVAL_S, MAX_LINE_CHARACTERS, MAX_LINES
from brokers.config.pipeline_file import load_pipeline
from brokers.errors import SparseError
from brokers.mqtt.client import MqttTransport
from brokers.protocol.messages import JSON
from brokers.protocol.transport import Delivery, Properties
from sources.client.offloader import Offloader
from tests.soak.conftest import PrintLine, sizes
from tests.soak.harness.hostile_clients import (
    PIPELINE_TOPIC,
    PIXELS_TOPIC,
    PRESENCE_TOPICS,
    AttackedPipeline,
    Attacker,
    start_attacked_pipeline,
)
from tests.soak.harness.hostile_messages import OVERSIZED_USER_PROPERTIES, HostileMessage, valid_messages
from tests.soak.harness.resource_usage import MIB
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S, process_sandbox

# Growth of a process in the second half of an attack: allocators keep some memory; a leak of 500 bytes a message shows.
GROWTH_LIMIT_BYTES = 48 * MIB
# How long an offloader waits here for the missing chunks of a message (30 s by default). What it holds of incomplete
# messages levels off after that time, which must be in the first half.
CHUNK_TIMEOUT_S = 3.0
# Call sites of warnings that hostile messages reach, in all processes together.
CALL_SITES = 30
TOPICS = (
    *(f"{PIPELINE_TOPIC}/{name}" for name in ("double/tasks", "last/tasks", "double/in/double-1", "last/in/last-1")),
    f"{PIXELS_TOPIC}/in/pixels-1",
    "sparse/local/ingress/echo",
    "sparse/local/results/echo",
)
INGRESS = "sparse/local/ingress/valid"
RESULTS = "sparse/local/results/valid"


@pytest.fixture(scope="module", name="pipeline")
def _pipeline(require_mosquitto: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttackedPipeline]:
    with (
        process_sandbox(tmp_path_factory.mktemp("attacked")) as sandbox,
        start_attacked_pipeline(sandbox, "mosquitto") as pipeline,
    ):
        yield pipeline


# Valid traffic -----------------------------------------------------------------------------------------------------


@dataclass
class ValidTraffic:
    """An offloader and an ingress client, each with one request at a time, whose every result is checked."""

    offload: Offloader
    camera: MqttTransport
    request_count: int = 0
    reading_count: int = 0
    republished_count: int = 0
    results: asyncio.Queue[dict[str, object]] = field(default_factory=asyncio.Queue)

    async def request(self) -> None:
        """Send one request and check its result."""
        value = float(self.request_count)
        async with asyncio.timeout(PROCESS_TIMEOUT_S):
            result = await self.offload(np.array(value))
        assert float(result) == 2 * value + 1
        self.request_count += 1

    async def publish_reading(self) -> None:
        """Publish one reading and wait for its result; publish it again if the ingress dropped it for a newer one."""
        self.reading_count += 1
        reading = json.dumps({"values": self.reading_count}).encode()
        expected = {"values": 2.0 * self.reading_count + 1}
        async with asyncio.timeout(PROCESS_TIMEOUT_S):
            while True:
                await self.camera.publish(INGRESS, reading, Properties(JSON), qos=1)
                try:
                    async with asyncio.timeout(5.0):  # not wait_for, which in Python 3.11 may ignore a cancellation
                        while (await self.results.get())["values"] != expected:
                            continue  # the result of an earlier reading
                except TimeoutError:
                    self.republished_count += 1
                else:
                    return

    def on_result(self, delivery: Delivery) -> None:
        self.results.put_nowait(json.loads(bytes(delivery.payload)))


@asynccontextmanager
async def valid_traffic(pipeline: AttackedPipeline) -> AsyncIterator[ValidTraffic]:
    camera = MqttTransport(pipeline.address)
    async with Offloader(load_pipeline(pipeline.path), broker=pipeline.address, name="valid") as offload:
        traffic = ValidTraffic(offload, camera)
        await camera.connect()
        try:
            await camera.subscribe(RESULTS, traffic.on_result, qos=1)
            yield traffic
        finally:
            await camera.close()


async def repeat(action: Callable[[], Awaitable[None]], pause_s: float) -> None:
    while True:
        await action()
        await asyncio.sleep(pause_s)


@asynccontextmanager
async def in_background(*actions: Coroutine[None, None, None]) -> AsyncIterator[Callable[[], None]]:
    """Run the actions as tasks; yields a function that raises the error of one that has failed."""
    tasks = [asyncio.create_task(action) for action in actions]

    def check() -> None:
        for task in tasks:
            if task.done():
                task.result()

    try:
        yield check
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def send_requests_of_victim(victim: Offloader, outcomes: Counter[str]) -> None:
    """Send requests whose results are forged: any outcome is allowed."""
    for number in itertools.count():
        try:
            await victim(np.array(float(number)), deadline_ms=2000)
        except (SparseError, TypeError, ValueError, KeyError) as error:
            outcomes[type(error).__name__] += 1
        else:
            outcomes["answered"] += 1
        await asyncio.sleep(0.01)


# The attack --------------------------------------------------------------------------------------------------------


def resident_bytes(pipeline: AttackedPipeline) -> dict[str, int]:
    """Resident memory of each process; this process is that of the offloaders."""
    sizes = {name: process.memory_info().rss for name, process in pipeline.processes().items()}
    return {**sizes, "offloader": psutil.Process().memory_info().rss}


async def attack(pipeline: AttackedPipeline, count: int, print_line: PrintLine) -> list[dict[str, int]]:
    """Publish `count` hostile messages beside valid traffic; return samples of the memory of all processes."""
    loaded = load_pipeline(pipeline.path)
    samples = [resident_bytes(pipeline)]
    begin_s = time.monotonic()
    outcomes: Counter[str] = Counter()
    async with (
        valid_traffic(pipeline) as traffic,
        Offloader(loaded, broker=pipeline.address, name="victim") as victim,
        Attacker(pipeline, seed=1) as attacker,
    ):
        for offloader in (traffic.offload, victim):
            offloader.channel._assembler.chunk_timeout_s = CHUNK_TIMEOUT_S
        await wait_until(lambda: set(attacker.worker_records) >= PRESENCE_TOPICS)
        rejected_before = attacker.rejected_count
        async with in_background(
            repeat(traffic.request, 0.005),
            repeat(traffic.publish_reading, 0.02),
            send_requests_of_victim(victim, outcomes),
        ) as check:
            while attacker.sent.total() < count:
                await attacker.attack()
                check()
                if attacker.sent.total() >= count * len(samples) / 16:
                    samples.append(resident_bytes(pipeline))
        for _ in range(20):
            await traffic.request()
            await traffic.publish_reading()
        to_workers = attacker.sent["tasks"] + attacker.sent["inbox"]
        # The others are tasks that can be done, and messages that are ignored because they have no sender to answer.
        await wait_until(lambda: attacker.rejected_count - rejected_before > 0.3 * to_workers)
        rejected = attacker.rejected_count - rejected_before
    elapsed_s = time.monotonic() - begin_s
    print_line(f"{attacker.sent.total()} hostile messages in {elapsed_s:.0f} s: {dict(attacker.sent)}")
    print_line(
        f"answered: {traffic.request_count} requests, {traffic.reading_count} readings "
        f"({traffic.republished_count} published again); requests with forged results: {dict(outcomes)}"
    )
    print_line(f"the workers counted {rejected} of {to_workers} messages as malformed or failed")
    return samples


async def wait_until(predicate: Callable[[], bool]) -> None:
    async with asyncio.timeout(PROCESS_TIMEOUT_S):
        while not predicate():  # noqa: ASYNC110 - the counters of a record have no event
            await asyncio.sleep(0.05)


def check_logs(pipeline: AttackedPipeline, print_line: PrintLine) -> None:
    """Assert that the logs have no traceback and no payload, and that their rate limit held."""
    logs = pipeline.read_logs()
    assert len(logs) >= 5
    for name, text in logs.items():
        assert "Traceback" not in text, f"{name}: {text[text.index('Traceback') - 500 :][:3000]}"
        assert all(len(line) < 4 * MAX_LINE_CHARACTERS for line in text.splitlines())
    lines = {name: text.count("\n") for name, text in logs.items()}
    print_line(f"log lines: {lines}, {sum(map(len, logs.values()))} characters")
    age_s = time.time() - min(process.create_time() for process in pipeline.processes().values())
    assert sum(lines.values()) < CALL_SITES * MAX_LINES * (1 + age_s / INTERVAL_S)


@pytest.mark.parametrize("count", sizes(3_000, 40_000))
@pytest.mark.timeout(1800)
def test_hostile_messages_neither_end_a_process_nor_disturb_valid_requests(
    pipeline: AttackedPipeline,
    count: int,
    soak_factor: int,
    print_line: PrintLine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pids = {name: process.pid for name, process in pipeline.processes().items()}
    with caplog.at_level(logging.ERROR, "brokers"):  # pytest would keep every warning in memory
        samples = asyncio.run(attack(pipeline, count * soak_factor, print_line))
    assert {name: process.pid for name, process in pipeline.processes().items()} == pids
    for name in samples[0]:
        print_line(f"{name:<10} MiB: {' '.join(f'{sample[name] / MIB:.0f}' for sample in samples)}")
    check_logs(pipeline, print_line)
    middle, last = samples[len(samples) // 2], samples[-1]
    growth = {name: last[name] - middle[name] for name in (*pids, "offloader")}
    assert max(growth.values()) < GROWTH_LIMIT_BYTES, growth


def test_answers_to_hostile_messages_do_not_circulate(pipeline: AttackedPipeline) -> None:
    """Every kind of message, with each topic of the pipeline as its Response Topic."""
    topics: list[str] = []  # of all messages that were received, presence records excepted

    def on_message(delivery: Delivery) -> None:
        if "/up/" not in delivery.topic:
            topics.append(delivery.topic)

    async def publish_all(attacker: Attacker) -> int:
        count = 0
        for topic in TOPICS:
            for response_topic in TOPICS:
                for message in valid_messages(random.Random(3)):
                    for extra in ((), (("accept", "json"),), (("kind", "?"),)):
                        user = (*message.properties.user_properties, *extra)
                        properties = replace(message.properties, response_topic=response_topic, user_properties=user)
                        await attacker.publish(topic, replace(message, properties=properties))
                        count += 1
            await attacker.probe()
        return count

    async def test() -> None:
        listener = MqttTransport(pipeline.address)
        await listener.connect()
        await listener.subscribe("sparse/#", on_message)
        async with Attacker(pipeline, seed=2) as attacker:
            published = await publish_all(attacker)
            # Each message is received once and may cause a few answers. Answers that caused answers would never end.
            async with asyncio.timeout(PROCESS_TIMEOUT_S):
                before = -1
                while len(topics) > before:
                    assert len(topics) < 20 * published
                    before = len(topics)
                    await asyncio.sleep(1.0)
        await listener.close()

    asyncio.run(test())


def test_oversized_retained_message_costs_no_client_its_connection(pipeline: AttackedPipeline) -> None:
    oversized = HostileMessage(Properties(user_properties=OVERSIZED_USER_PROPERTIES), b"x", retain=True)
    presence = [f"{PIPELINE_TOPIC}/{name}" for name in ("double/up/giant", "last/up/giant", "double/up/double-2")]

    async def test() -> None:
        async with valid_traffic(pipeline) as earlier, Attacker(pipeline, seed=3) as attacker:
            for topic in (*TOPICS, *presence):
                await attacker.publish(topic, oversized)
            await attacker.probe()
            async with valid_traffic(pipeline) as later:  # the broker sends it the retained messages first
                for _ in range(5):
                    await earlier.request()
                    await later.request()
            for topic in (*TOPICS, *presence):
                await attacker.publish(topic, HostileMessage(Properties(), b"", retain=True))

    asyncio.run(test())
    assert not [text for text in pipeline.read_logs().values() if "lost: bad MQTT packet" in text]
