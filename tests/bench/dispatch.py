"""What workers give together, dispatched our way and dealt by the broker: `python -m tests.bench.dispatch`.

Stages that sleep, so that the machine's cores are not what limits them; real processes, one broker, answers counted at
the source, with so many requests in flight throughout.

* ours: an `Offloader`, which picks a worker for each request;
* plain shared subscription: the very same workers, asked by a plain MQTT 5 client at the stage's front door, whole
  messages with a Response Topic and Correlation Data at QoS 1; the broker deals them out.

Three questions: do 1, 2, 4 and 8 equal workers give so many times what one gives; do one of 20 ms and one of 100 ms
give the sum of what each can (60 a second); and how many requests never come back when one of that pair is killed with
work in hand. "Of linear" is the share of what the sleeps alone would allow, "of n x one" that of what one worker gave
in the same run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from types import TracebackType
from typing import Any, Self

import numpy as np
from rich.console import Console
from rich.table import Table

from brokers.config.pipeline_file import load_pipeline
from brokers.mqtt.client import MqttTransport
from brokers.protocol.messages import Body, new_request_id
from brokers.protocol.safetensors_codec import from_numpy
from brokers.protocol.transport import Delivery, Properties
from brokers.server.local_broker import Kind, start_broker
from brokers.server.mosquitto_conf import find as find_mosquitto
from monitor.launch.child_process import Child, end_all
from sources.client.offloader import Offloader
from tests.support.brokers.presence import await_workers
from tests.support.pipelines.pipeline_files import pipeline_file, stage

EQUAL = (1, 2, 4, 8)
EQUAL_S = 0.05
PAIR_S = {"fast": 0.02, "slow": 0.1}
PER_WORKER = 3  # requests in flight
# Workers tell every second how long a task takes them; only then can a sender know that they are not equals.
WARM_UP_S = 3.0
# When a plain client takes a request for lost: several times what the longest queue before it can take.
GIVE_UP_S = 10.0

Ask = Callable[[], Awaitable[str | None]]


@dataclass(slots=True)
class Answers:
    """What came in: the worker and the round trip in milliseconds of each, over so many seconds."""

    seconds: float = 0.0
    latency_ms: list[float] = field(default_factory=list)
    by_worker: Counter[str] = field(default_factory=Counter)
    lost: int = 0

    @property
    def per_s(self) -> float:
        return len(self.latency_ms) / self.seconds

    def add(self, worker: str | None, latency_ms: float) -> None:
        if worker is None:
            self.lost += 1
        else:
            self.latency_ms.append(latency_ms)
            self.by_worker[worker] += 1


class Ours:
    """Asks through an `Offloader`."""

    def __init__(self, file: Path, address: str, window: int | None) -> None:
        self.offload = Offloader(file, broker=address, window=window)
        self._content = Body({"values": from_numpy(np.array(1.0))})

    async def __aenter__(self) -> Self:
        await self.offload.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.offload.__aexit__(kind, error, trace)

    async def ask(self) -> str | None:
        return (await self.offload.ask(self._content)).hops[0].worker


class Plain:
    """Asks as any MQTT client may: one message to the front door, one JSON object back."""

    def __init__(self, file: Path, address: str) -> None:
        pipeline = load_pipeline(file)
        self._door = pipeline.topics(pipeline.stage[0]).front_door
        self._answers = f"answers/{new_request_id().hex()}"
        self._transport = MqttTransport(address)
        self._waiting: dict[bytes, asyncio.Future[str]] = {}

    async def __aenter__(self) -> Self:
        await self._transport.connect()
        await self._transport.subscribe(self._answers, self._heard)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._transport.close()

    async def ask(self) -> str | None:
        request = new_request_id()
        answer = self._waiting[request] = asyncio.get_running_loop().create_future()
        properties = Properties("application/json", request, self._answers)
        await self._transport.publish(self._door, b'{"values": 1.0}', properties, qos=1)
        try:
            return await asyncio.wait_for(answer, GIVE_UP_S)
        except TimeoutError:
            return None
        finally:
            del self._waiting[request]

    def _heard(self, delivery: Delivery) -> None:
        if waiting := self._waiting.get(delivery.properties.correlation):
            waiting.set_result(json.loads(bytes(delivery.payload))["time"]["stages"][0]["worker"])


async def for_seconds(ask: Ask, askers: int, seconds: float, warm_up_s: float = WARM_UP_S) -> Answers:
    """What comes in within `seconds`, after the warm-up, while each asker has one request in flight at all times."""
    begin_s = time.monotonic() + warm_up_s
    end_s = begin_s + seconds
    answers = Answers(seconds)

    async def keep_asking() -> None:
        while (asked_s := time.monotonic()) < end_s:
            worker = await ask()
            now_s = time.monotonic()
            if begin_s <= now_s < end_s:
                answers.add(worker, 1000 * (now_s - asked_s))

    await asyncio.gather(*(keep_asking() for _ in range(askers)))
    return answers


async def so_many(ask: Ask, askers: int, count: int, disturb: Callable[[int], None] = lambda done: None) -> Answers:
    """What comes in of `count` requests; `disturb` is called with how many have ended, as each does."""
    begin_s = time.monotonic()
    answers = Answers()
    left = iter(range(count))

    async def keep_asking() -> None:
        for _ in left:
            asked_s = time.monotonic()
            worker = await ask()
            answers.add(worker, 1000 * (time.monotonic() - asked_s))
            disturb(len(answers.latency_ms) + answers.lost)

    await asyncio.gather(*(keep_asking() for _ in range(askers)))
    answers.seconds = time.monotonic() - begin_s
    return answers


# The workers ----------------------------------------------------------------------------------------------------------


def stage_file(folder: Path, seconds: float) -> Path:
    """A pipeline of one stage that sleeps; all are one pipeline, so their workers serve one stage."""
    place = folder / f"{1000 * seconds:g}ms"
    place.mkdir(exist_ok=True)
    return pipeline_file(place, [stage("nap", "Slow", settings={"seconds": seconds})])


@contextmanager
def crew(folder: Path, address: str, seconds: dict[str, float]) -> Iterator[dict[str, Child]]:
    """Workers of one stage, by their ids, each asleep for so long a task; up when this begins, gone when it ends."""
    children = {
        name: Child(
            name,
            ("stage", str(stage_file(folder, each_s)), "nap", "--broker", address, "--worker", name),
            folder / f"{name}.log",
        )
        for name, each_s in seconds.items()
    }
    try:
        for child in children.values():
            child.start()
        await_workers(address, lambda workers: len(workers) == len(children))
        yield children
    finally:
        end_all(list(children.values()))


@dataclass(frozen=True, slots=True)
class Bench:
    """Where it runs, and for how long."""

    folder: Path
    address: str
    seconds: float
    per_worker: int

    def both(self, seconds: dict[str, float]) -> dict[str, Answers]:
        """Ours and plain, one after the other, with the same workers."""
        with crew(self.folder, self.address, seconds):
            return {name: asyncio.run(self._one(name, len(seconds))) for name in ("ours", "plain")}

    async def _one(self, name: str, workers: int) -> Answers:
        window = self.per_worker * workers
        async with self._asking(name, window) as asking:
            return await for_seconds(asking.ask, window, self.seconds)

    def killed(self, name: str, count: int) -> Answers:
        """What comes back of `count` requests when the slow one of the unequal pair is killed midway."""

        async def go() -> Answers:
            window = self.per_worker * len(PAIR_S)
            async with self._asking(name, window) as asking:
                return await so_many(asking.ask, window, count, disturb)

        def disturb(done: int) -> None:
            if done == count // 2:
                workers["slow"].process.kill()

        with crew(self.folder, self.address, PAIR_S) as workers:
            return asyncio.run(go())

    def _asking(self, name: str, window: int) -> Ours | Plain:
        file = stage_file(self.folder, EQUAL_S)
        return Ours(file, self.address, window) if name == "ours" else Plain(file, self.address)


# What it says ---------------------------------------------------------------------------------------------------------


def row(workers: str, way: str, answers: Answers, linear_per_s: float, one_per_s: float | None) -> dict[str, Any]:
    """One line of the table; `linear_per_s` is what the sleeps alone would allow, `one_per_s` n times one."""
    latency_ms = quantiles(answers.latency_ms, n=20)
    return {
        "workers": workers,
        "way": way,
        "per_s": answers.per_s,
        "of_linear": answers.per_s / linear_per_s,
        "of_one": None if one_per_s is None else answers.per_s / one_per_s,
        "p50_ms": latency_ms[9],
        "p95_ms": latency_ms[18],
        "by_worker": dict(sorted(answers.by_worker.items())),
    }


def measure(bench: Bench, counts: Sequence[int], kills: int) -> dict[str, Any]:
    rows = []
    one_per_s: dict[str, float] = {}
    for count in counts:
        for way, answers in bench.both({f"equal-{index}": EQUAL_S for index in range(count)}).items():
            one_per_s.setdefault(way, answers.per_s / count)
            rows.append(row(f"{count} of 50 ms", way, answers, count / EQUAL_S, count * one_per_s[way]))
    pair_per_s = sum(1 / seconds for seconds in PAIR_S.values())
    for way, answers in bench.both(PAIR_S).items():
        rows.append(row("20 ms and 100 ms", way, answers, pair_per_s, None))
    lost = {way: bench.killed(way, kills).lost for way in ("ours", "plain")}
    return {"per_worker": bench.per_worker, "rows": rows, "killed": {"requests": kills, "lost": lost}}


def show(found: dict[str, Any], kind: Kind) -> None:
    table = Table(title=f"Stages that sleep, {found['per_worker']} requests in flight for each worker, {kind}")
    for column in ("workers", "way"):
        table.add_column(column, no_wrap=True)
    for column in ("/s", "of linear", "of n x one", "p50 ms", "p95 ms"):
        table.add_column(column, justify="right")
    ways = {"ours": "ours", "plain": "$share"}
    for each in found["rows"]:
        of_one = "" if each["of_one"] is None else f"{each['of_one']:.3f}"
        figures = (f"{each['per_s']:.2f}", f"{each['of_linear']:.3f}", of_one)
        table.add_row(
            each["workers"], ways[each["way"]], *figures, *(f"{each[key]:.0f}" for key in ("p50_ms", "p95_ms"))
        )
    Console().print(table)
    killed = found["killed"]
    for way, lost in killed["lost"].items():
        print(
            f"{ways[way]}: the worker of 100 ms killed midway, {lost} of {killed['requests']} requests never answered"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="What workers give together: our dispatch, and shared subscriptions.")
    parser.add_argument("--seconds", type=float, default=10.0, help="of counting, for each line (default 10)")
    parser.add_argument("--per-worker", type=int, default=PER_WORKER, help=f"requests in flight (default {PER_WORKER})")
    parser.add_argument("--workers", type=int, nargs="*", default=EQUAL, help="equal ones (default 1 2 4 8)")
    parser.add_argument("--kills", type=int, default=200, help="requests of the run with a killed worker (default 200)")
    parser.add_argument(
        "--broker", choices=["mosquitto", "embedded"], default="mosquitto" if find_mosquitto() else "embedded"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, start_broker(kind=options.broker) as broker:
        bench = Bench(Path(folder), broker.address, options.seconds, options.per_worker)
        found = {"broker": broker.kind, **measure(bench, options.workers, options.kills)}
    show(found, broker.kind)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
