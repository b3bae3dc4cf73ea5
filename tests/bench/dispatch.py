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
from brokers.protocol.messages import TensorContent, new_request_id
from brokers.protocol.safetensors_codec import from_numpy
from brokers.protocol.transport import Delivery, Properties
from brokers.server.local_broker import BrokerKind, start_broker
from brokers.server.mosquitto_conf import find_mosquitto as find_mosquitto
from monitor.launch.child_process import ChildProcess, terminate_all
from sources.client.offloader import Offloader
from tests.support.brokers.presence import wait_for_workers
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file

WORKER_COUNTS = (1, 2, 4, 8)
EQUAL_TASK_S = 0.05
UNEQUAL_TASK_S = {"fast": 0.02, "slow": 0.1}
REQUESTS_PER_WORKER = 3  # requests in flight
# Workers tell every second how long a task takes them; only then can a sender know that they are not equals.
WARM_UP_S = 3.0
# When a plain client takes a request for lost: several times what the longest queue before it can take.
REQUEST_TIMEOUT_S = 10.0

SendRequest = Callable[[], Awaitable[str | None]]


@dataclass(slots=True)
class ResponseStats:
    """What came in: the worker and the round trip in milliseconds of each, over so many seconds."""

    seconds: float = 0.0
    latency_ms: list[float] = field(default_factory=list)
    by_worker: Counter[str] = field(default_factory=Counter)
    lost: int = 0

    @property
    def per_s(self) -> float:
        return len(self.latency_ms) / self.seconds

    def record(self, worker: str | None, latency_ms: float) -> None:
        if worker is None:
            self.lost += 1
        else:
            self.latency_ms.append(latency_ms)
            self.by_worker[worker] += 1


class OffloaderClient:
    """Asks through an `Offloader`."""

    def __init__(self, file: Path, address: str, window: int | None) -> None:
        self.offloader = Offloader(file, broker=address, window=window)
        self._content = TensorContent({"values": from_numpy(np.array(1.0))})

    async def __aenter__(self) -> Self:
        await self.offloader.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.offloader.__aexit__(kind, error, trace)

    async def request(self) -> str | None:
        return (await self.offloader.request(self._content)).result.hops[0].worker


class SharedSubscriptionClient:
    """Asks as any MQTT client may: one message to the front door, one JSON object back."""

    def __init__(self, file: Path, address: str) -> None:
        pipeline = load_pipeline(file)
        self._door = pipeline.topics(pipeline.stage[0]).shared_task_topic
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

    async def request(self) -> str | None:
        request = new_request_id()
        answer = self._waiting[request] = asyncio.get_running_loop().create_future()
        properties = Properties("application/json", request, self._answers)
        await self._transport.publish(self._door, b'{"values": 1.0}', properties, qos=1)
        try:
            return await asyncio.wait_for(answer, REQUEST_TIMEOUT_S)
        except TimeoutError:
            return None
        finally:
            del self._waiting[request]

    def _heard(self, delivery: Delivery) -> None:
        if waiting := self._waiting.get(delivery.properties.correlation_data):
            waiting.set_result(json.loads(bytes(delivery.payload))["time"]["stages"][0]["worker"])


async def measure_for_seconds(
    request: SendRequest, concurrency: int, seconds: float, warm_up_s: float = WARM_UP_S
) -> ResponseStats:
    """What comes in within `seconds`, after the warm-up, while each asker has one request in flight at all times."""
    begin_s = time.monotonic() + warm_up_s
    end_s = begin_s + seconds
    answers = ResponseStats(seconds)

    async def keep_asking() -> None:
        while (asked_s := time.monotonic()) < end_s:
            worker = await request()
            now_s = time.monotonic()
            if begin_s <= now_s < end_s:
                answers.record(worker, 1000 * (now_s - asked_s))

    await asyncio.gather(*(keep_asking() for _ in range(concurrency)))
    return answers


async def measure_requests(
    request: SendRequest, concurrency: int, count: int, on_response: Callable[[int], None] = lambda done: None
) -> ResponseStats:
    """What comes in of `count` requests; `disturb` is called with how many have ended, as each does."""
    begin_s = time.monotonic()
    answers = ResponseStats()
    left = iter(range(count))

    async def keep_asking() -> None:
        for _ in left:
            asked_s = time.monotonic()
            worker = await request()
            answers.record(worker, 1000 * (time.monotonic() - asked_s))
            on_response(len(answers.latency_ms) + answers.lost)

    await asyncio.gather(*(keep_asking() for _ in range(concurrency)))
    answers.seconds = time.monotonic() - begin_s
    return answers


# The workers ----------------------------------------------------------------------------------------------------------


def write_sleep_pipeline_file(folder: Path, seconds: float) -> Path:
    """A pipeline of one stage that sleeps; all are one pipeline, so their workers serve one stage."""
    place = folder / f"{1000 * seconds:g}ms"
    place.mkdir(exist_ok=True)
    return write_pipeline_file(place, [stage_table("nap", "SleepExecutor", settings={"seconds": seconds})])


@contextmanager
def start_workers(folder: Path, address: str, seconds: dict[str, float]) -> Iterator[dict[str, ChildProcess]]:
    """Workers of one stage, by their ids, each asleep for so long a task; up when this begins, gone when it ends."""
    children = {
        name: ChildProcess(
            name,
            ("stage", str(write_sleep_pipeline_file(folder, each_s)), "nap", "--broker", address, "--worker", name),
            folder / f"{name}.log",
        )
        for name, each_s in seconds.items()
    }
    try:
        for child in children.values():
            child.start()
        wait_for_workers(address, lambda workers: len(workers) == len(children))
        yield children
    finally:
        terminate_all(list(children.values()))


@dataclass(frozen=True, slots=True)
class DispatchBench:
    """Where it runs, and for how long."""

    folder: Path
    address: str
    seconds: float
    per_worker: int

    def compare(self, seconds: dict[str, float]) -> dict[str, ResponseStats]:
        """Ours and plain, one after the other, with the same workers."""
        with start_workers(self.folder, self.address, seconds):
            return {name: asyncio.run(self._one(name, len(seconds))) for name in ("ours", "plain")}

    async def _one(self, name: str, workers: int) -> ResponseStats:
        window = self.per_worker * workers
        async with self._asking(name, window) as asking:
            return await measure_for_seconds(asking.request, window, self.seconds)

    def measure_worker_kill(self, name: str, count: int) -> ResponseStats:
        """What comes back of `count` requests when the slow one of the unequal pair is killed midway."""

        async def go() -> ResponseStats:
            window = self.per_worker * len(UNEQUAL_TASK_S)
            async with self._asking(name, window) as asking:
                return await measure_requests(asking.request, window, count, disturb)

        def disturb(done: int) -> None:
            if done == count // 2:
                workers["slow"].process.kill()

        with start_workers(self.folder, self.address, UNEQUAL_TASK_S) as workers:
            return asyncio.run(go())

    def _asking(self, name: str, window: int) -> OffloaderClient | SharedSubscriptionClient:
        file = write_sleep_pipeline_file(self.folder, EQUAL_TASK_S)
        return (
            OffloaderClient(file, self.address, window)
            if name == "ours"
            else SharedSubscriptionClient(file, self.address)
        )


# What it says ---------------------------------------------------------------------------------------------------------


def table_row(
    workers: str, client: str, answers: ResponseStats, linear_per_s: float, one_per_s: float | None
) -> dict[str, Any]:
    """One line of the table; `linear_per_s` is what the sleeps alone would allow, `one_per_s` n times one."""
    latency_ms = quantiles(answers.latency_ms, n=20)
    return {
        "workers": workers,
        "way": client,
        "per_s": answers.per_s,
        "of_linear": answers.per_s / linear_per_s,
        "of_one": None if one_per_s is None else answers.per_s / one_per_s,
        "p50_ms": latency_ms[9],
        "p95_ms": latency_ms[18],
        "by_worker": dict(sorted(answers.by_worker.items())),
    }


def measure(bench: DispatchBench, counts: Sequence[int], kills: int) -> dict[str, Any]:
    rows = []
    one_per_s: dict[str, float] = {}
    for count in counts:
        for way, answers in bench.compare({f"equal-{index}": EQUAL_TASK_S for index in range(count)}).items():
            one_per_s.setdefault(way, answers.per_s / count)
            rows.append(table_row(f"{count} of 50 ms", way, answers, count / EQUAL_TASK_S, count * one_per_s[way]))
    pair_per_s = sum(1 / seconds for seconds in UNEQUAL_TASK_S.values())
    for way, answers in bench.compare(UNEQUAL_TASK_S).items():
        rows.append(table_row("20 ms and 100 ms", way, answers, pair_per_s, None))
    lost = {way: bench.measure_worker_kill(way, kills).lost for way in ("ours", "plain")}
    return {"per_worker": bench.per_worker, "rows": rows, "killed": {"requests": kills, "lost": lost}}


def print_tables(found: dict[str, Any], kind: BrokerKind) -> None:
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
    parser.add_argument(
        "--per-worker",
        type=int,
        default=REQUESTS_PER_WORKER,
        help=f"requests in flight (default {REQUESTS_PER_WORKER})",
    )
    parser.add_argument("--workers", type=int, nargs="*", default=WORKER_COUNTS, help="equal ones (default 1 2 4 8)")
    parser.add_argument("--kills", type=int, default=200, help="requests of the run with a killed worker (default 200)")
    parser.add_argument(
        "--broker", choices=["mosquitto", "embedded"], default="mosquitto" if find_mosquitto() else "embedded"
    )
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, start_broker(kind=options.broker) as broker:
        bench = DispatchBench(Path(folder), broker.address, options.seconds, options.per_worker)
        found = {"broker": broker.kind, **measure(bench, options.workers, options.kills)}
    print_tables(found, broker.kind)
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
