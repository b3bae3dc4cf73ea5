"""Hostile clients: whatever they publish to the topics that the system reads, nobody dies and valid traffic goes on.

What is not promised, and not tested: who may publish to an inbox can answer for others if it knows the identifier of a
request that is in flight, and who may publish presence records can draw work to workers that do not exist. Which
clients may publish where is for the broker's access lists to say.
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

from brokers.config.pipeline_file import load_pipeline
from brokers.errors import SparseError
from brokers.mqtt.client import MqttTransport
from brokers.protocol.messages import JSON
from brokers.protocol.transport import Delivery, Properties
from sources.client.offloader import Offloader
from tests.soak.conftest import PrintLine
from tests.soak.harness.hostile_clients import (
    LOOK_STAGE_TOPIC,
    PIPELINE_TOPIC,
    PRESENCE_TOPICS,
    AttackedPipeline,
    Attacker,
    start_attacked_pipeline,
)
from tests.soak.harness.hostile_messages import OVERSIZED_USER_PROPERTIES, HostileMessage, valid_messages
from tests.support.pipelines.processes import PROCESS_TIMEOUT_S, process_sandbox

# Messages in the short form and the long one.
SHORT, LONG = 3_000, 200_000
# What a process may grow in the second half: allocators keep some; a leak of 500 bytes a message would show.
GROWTH_BYTES = 48 << 20
# For how long an offloader waits for the rest of a message here, else 30 s: what it holds of those that stay unfinished
# is bounded by what they claim, and levels off after that time. It shall be level in the second half.
UNFINISHED_S = 3.0
DOORS = (
    *(f"{PIPELINE_TOPIC}/{stage}" for stage in ("double/tasks", "last/tasks", "double/in/double-1", "last/in/last-1")),
    f"{LOOK_STAGE_TOPIC}/in/look-1",
    "sparse/local/ingress/door",
    "sparse/local/results/door",
)
INGRESS = "sparse/local/ingress/honest"
RESULTS = "sparse/local/results/honest"


@pytest.fixture(scope="module", name="place")
def _place(mosquitto: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AttackedPipeline]:
    with (
        process_sandbox(tmp_path_factory.mktemp("town")) as sandbox,
        start_attacked_pipeline(sandbox, "mosquitto") as found,
    ):
        yield found


# Valid traffic -----------------------------------------------------------------------------------------------------


@dataclass
class Honest:
    """An offloader and an ingress client, each of which waits for the answer to one request before the next."""

    offload: Offloader
    camera: MqttTransport
    answered: int = 0
    frames: int = 0
    frames_again: int = 0
    found: asyncio.Queue[dict[str, object]] = field(default_factory=asyncio.Queue)

    async def ask(self) -> None:
        """One request, answered rightly."""
        value = float(self.answered)
        given = await asyncio.wait_for(self.offload(np.array(value)), PROCESS_TIMEOUT_S)
        assert float(given) == 2 * value + 1
        self.answered += 1

    async def publish(self) -> None:
        """One reading, answered rightly; again when it gave way to newer frames, which is what an ingress does."""
        self.frames += 1
        reading = json.dumps({"values": self.frames}).encode()
        async with asyncio.timeout(PROCESS_TIMEOUT_S):
            while True:
                await self.camera.publish(INGRESS, reading, Properties(JSON), qos=1)
                try:
                    while (await asyncio.wait_for(self.found.get(), 5.0))["values"] != {
                        "values": 2.0 * self.frames + 1
                    }:
                        continue  # the answer to an earlier publication of it, or of the one before
                except TimeoutError:
                    self.frames_again += 1
                else:
                    return

    def heard(self, delivery: Delivery) -> None:
        self.found.put_nowait(json.loads(bytes(delivery.payload)))


@asynccontextmanager
async def honest(place: AttackedPipeline) -> AsyncIterator[Honest]:
    camera = MqttTransport(place.address)
    async with Offloader(load_pipeline(place.path), broker=place.address, name="honest") as offload:
        found = Honest(offload, camera)
        await camera.connect()
        try:
            await camera.subscribe(RESULTS, found.heard, qos=1)
            yield found
        finally:
            await camera.close()


async def forever(act: Callable[[], Awaitable[None]], pause_s: float) -> None:
    while True:
        await act()
        await asyncio.sleep(pause_s)


@asynccontextmanager
async def meanwhile(*acts: Coroutine[None, None, None]) -> AsyncIterator[Callable[[], None]]:
    """Do these in the background; gives what fails as soon as one of them has failed."""
    tasks = [asyncio.create_task(act) for act in acts]

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


async def be_a_victim(victim: Offloader, outcomes: Counter[str]) -> None:
    """Ask, whatever comes of it: answers to these requests are forged."""
    for number in itertools.count():
        try:
            await victim(np.array(float(number)), deadline_ms=2000)
        except (SparseError, TypeError, ValueError, KeyError) as error:
            outcomes[type(error).__name__] += 1
        else:
            outcomes["answered"] += 1
        await asyncio.sleep(0.01)


# The attack --------------------------------------------------------------------------------------------------------


def memory(place: AttackedPipeline) -> dict[str, int]:
    """Resident set of each process, bytes; this one is the offloader's."""
    found = {name: process.memory_info().rss for name, process in place.processes().items()}
    return {**found, "offloader": psutil.Process().memory_info().rss}


async def attack(place: AttackedPipeline, count: int, print_line: PrintLine) -> list[dict[str, int]]:
    """Write that many messages while valid traffic goes on; return what memory was over time."""
    loaded = load_pipeline(place.path)
    samples = [memory(place)]
    begin_s = time.monotonic()
    outcomes: Counter[str] = Counter()
    async with (
        honest(place) as good,
        Offloader(loaded, broker=place.address, name="victim") as victim,
        Attacker(place, seed=1) as attacker,
    ):
        for each in (good.offload, victim):
            each.channel._assembler.chunk_timeout_s = UNFINISHED_S
        await until(lambda: set(attacker.worker_records) >= PRESENCE_TOPICS)
        before = attacker.rejected_count
        async with meanwhile(
            forever(good.ask, 0.005), forever(good.publish, 0.02), be_a_victim(victim, outcomes)
        ) as check:
            while attacker.sent.total() < count:
                await attacker.attack()
                check()
                if attacker.sent.total() >= count * len(samples) / 16:
                    samples.append(memory(place))
        for _ in range(20):
            await good.ask()
            await good.publish()
        sent, elapsed_s = attacker.sent, time.monotonic() - begin_s
        to_workers = sent["door"] + sent["inbox"]
        # The others are tasks that can be done, and messages that are passed over in silence: nobody can be told.
        await until(lambda: attacker.rejected_count - before > 0.3 * to_workers)  # they report every second
        taken = attacker.rejected_count - before
    print_line(f"{place.broker.kind}: {sent.total()} hostile messages in {elapsed_s:.0f} s: {dict(sent)}")
    frames = f"{good.frames} frames ({good.frames_again} published again)"
    print_line(f"answered meanwhile: {good.answered} requests, {frames}; of the victim: {dict(outcomes)}")
    print_line(f"workers say that they refused or failed {taken} of the {to_workers} sent to them")
    return samples


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PROCESS_TIMEOUT_S):
        while not holds():  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0.05)


def check_logs(place: AttackedPipeline, hostile: int, print_line: PrintLine) -> None:
    said = place.read_logs()
    assert len(said) >= 5
    for name, text in said.items():
        assert "Traceback" not in text, f"{name}: {text[text.index('Traceback') - 500 :][:3000]}"
    lines = {name: text.count("\n") for name, text in said.items()}
    print_line(f"lines of log for {hostile} messages: {lines}, {sum(map(len, said.values()))} letters")
    assert sum(lines.values()) < 500 + 0.2 * hostile
    assert all(len(line) < 4000 for text in said.values() for line in text.splitlines())


def test_whatever_hostile_clients_write_nobody_dies_and_valid_traffic_goes_on(
    place: AttackedPipeline, is_long_run: bool, print_line: PrintLine, caplog: pytest.LogCaptureFixture
) -> None:
    count = LONG if is_long_run else SHORT
    before = {name: process.pid for name, process in place.processes().items()}
    with caplog.at_level(logging.ERROR, "brokers"):  # pytest would keep every line in memory
        samples = asyncio.run(attack(place, count, print_line))
    assert {name: process.pid for name, process in place.processes().items()} == before
    for name in samples[0]:
        print_line(f"{name:<10} MiB: {' '.join(f'{sample[name] / 2**20:.0f}' for sample in samples)}")
    check_logs(place, count, print_line)
    middle, last = samples[len(samples) // 2], samples[-1]
    growth = {name: last[name] - middle[name] for name in (*before, "offloader")}
    assert max(growth.values()) < GROWTH_BYTES, growth


def test_no_answer_to_a_hostile_message_is_itself_answered_for_ever(place: AttackedPipeline) -> None:
    """Every message of every kind, with an answer that leads to each of the system's own topics."""
    heard: list[str] = []

    async def go() -> None:
        spy = MqttTransport(place.address)
        await spy.connect()
        await spy.subscribe("sparse/#", lambda delivery: heard.append(delivery.topic))
        async with Attacker(place, seed=2) as attacker:
            for topic in DOORS:
                for address in DOORS:
                    for message in valid_messages(random.Random(3)):
                        for user in ((), (("accept", "json"),), (("kind", "?"),)):
                            changed = (*message.properties.user_properties, *user)
                            properties = replace(message.properties, response_topic=address, user_properties=changed)
                            await attacker.publish(topic, replace(message, properties=properties))
                await attacker.probe()
            sent = len(DOORS) ** 2 * 3 * len(valid_messages(random.Random(3)))
            # Each is heard once, and is worth a few answers; a storm would not end, and not be quiet again.
            async with asyncio.timeout(PROCESS_TIMEOUT_S):
                while await one_second(heard) > 0:
                    assert len(heard) < 20 * sent
        await spy.close()

    asyncio.run(go())


async def one_second(heard: list[str]) -> int:
    """How many messages that are not presence come in a second."""
    before = len(heard)
    await asyncio.sleep(1)
    return sum("/up/" not in topic for topic in heard[before:])


def test_a_retained_message_of_gigantic_properties_costs_nobody_its_connection(place: AttackedPipeline) -> None:
    async def go() -> None:
        async with honest(place) as good, Attacker(place, seed=3) as attacker:
            topics = [
                *DOORS,
                f"{PIPELINE_TOPIC}/double/up/giant",
                f"{PIPELINE_TOPIC}/last/up/giant",
                f"{PIPELINE_TOPIC}/double/up/double-2",
            ]
            for topic in topics:
                await attacker.publish(
                    topic, HostileMessage(Properties(user_properties=OVERSIZED_USER_PROPERTIES), b"x", retain=True)
                )
            await attacker.probe()
            async with honest(place) as newcomer:  # what is retained comes to it at once
                for _ in range(5):
                    await good.ask()
                    await newcomer.ask()
            for topic in topics:
                await attacker.publish(topic, HostileMessage(Properties(), b"", retain=True))

    asyncio.run(go())
    assert not [text for text in place.read_logs().values() if "lost: bad MQTT packet" in text]
