"""Dispatch: throughput of several workers by our dispatcher, and by a shared subscription of the broker.

    python -m tests.bench.dispatch

Worker processes of one stage that sleeps, so that the cores of the machine do not limit them, at one broker; results
are counted at the client, with a fixed number of requests in flight for each worker.

* offloader: an `Offloader`, which picks a worker for each request;
* shared_subscription: the same workers, through the stage's shared task topic, by a plain MQTT 5 client: one message a
  request at QoS 1, with Response Topic and Correlation Data. The broker distributes the messages in turns.

Measured are 1, 2, 4 and 8 workers of 50 ms; one worker of 20 ms beside one of 100 ms (together 60/s); and how many
requests are never answered when the worker of 100 ms is killed halfway. "of linear" is the share of what the sleeps
alone would allow, "of n x one" the share of n times the throughput of one worker in the same run.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from brokers.config.pipeline_file import load_pipeline
from brokers.mqtt.client import MqttTransport
from brokers.protocol.messages import TensorContent, new_request_id
from brokers.protocol.safetensors_codec import from_numpy
from brokers.protocol.transport import Delivery, Properties
from brokers.server.local_broker import start_broker
from brokers.telemetry.percentiles import percentiles
from monitor.launch.child_process import ChildProcess
from sources import Offloader
from tests.bench.harness.output import add_broker_option, make_parser, print_json, print_table
from tests.bench.harness.processes import running
from tests.support.brokers.presence import wait_for_workers
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file

WORKER_COUNTS = (1, 2, 4, 8)
EQUAL_TASK_S = 0.05
UNEQUAL_TASK_S = {"fast": 0.02, "slow": 0.1}
REQUESTS_PER_WORKER = 3  # in flight
CLIENTS = ("offloader", "shared_subscription")
# Workers report each second how long a task takes; before the first report a sender treats them as equal.
WARM_UP_S = 3.0
# When the plain client gives up a request: several times what the longest queue can take.
REQUEST_TIMEOUT_S = 10.0
COLUMNS = {
    "workers": ("workers", ""),
    "client": ("client", ""),
    "results/s": ("per_s", ".2f"),
    "of linear": ("of_linear", ".3f"),
    "of n x one": ("of_one", ".3f"),
    "p50, ms": ("p50_ms", ".0f"),
    "p95, ms": ("p95_ms", ".0f"),
}

SendRequest = Callable[[], Awaitable[str | None]]


@dataclass(slots=True)
class ResponseStats:
    """Results within `seconds`: their latencies in milliseconds, and how many each worker has returned."""

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


# Clients ---------------------------------------------------------------------------------------------------------


class OffloaderClient:
    """Sends requests with an `Offloader`."""

    def __init__(self, file: Path, address: str, window: int) -> None:
        self._offloader = Offloader(file, broker=address, window=window)
        self._content = TensorContent({"values": from_numpy(np.array(1.0))})

    async def __aenter__(self) -> Self:
        await self._offloader.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._offloader.__aexit__(kind, error, trace)

    async def request(self) -> str | None:
        return (await self._offloader.request(self._content)).result.hops[0].worker


class SharedSubscriptionClient:
    """Sends requests as any MQTT 5 client can: one JSON message to the shared task topic, one JSON object back."""

    def __init__(self, file: Path, address: str) -> None:
        pipeline = load_pipeline(file)
        self._task_topic = pipeline.topics(pipeline.stage[0]).shared_task_topic
        self._response_topic = f"responses/{new_request_id().hex()}"
        self._transport = MqttTransport(address)
        self._pending: dict[bytes, asyncio.Future[str]] = {}

    async def __aenter__(self) -> Self:
        await self._transport.connect()
        await self._transport.subscribe(self._response_topic, self._on_response)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._transport.close()

    async def request(self) -> str | None:
        """Return the worker of the result, or None after a time-out."""
        request = new_request_id()
        response = self._pending[request] = asyncio.get_running_loop().create_future()
        properties = Properties("application/json", request, self._response_topic)
        await self._transport.publish(self._task_topic, b'{"values": 1.0}', properties, qos=1)
        try:
            return await asyncio.wait_for(response, REQUEST_TIMEOUT_S)
        except TimeoutError:
            return None
        finally:
            del self._pending[request]

    def _on_response(self, delivery: Delivery) -> None:
        if response := self._pending.get(delivery.properties.correlation_data):
            response.set_result(json.loads(bytes(delivery.payload))["time"]["stages"][0]["worker"])


async def measure_for_seconds(request: SendRequest, concurrency: int, seconds: float) -> ResponseStats:
    """The results within `seconds` after the warm-up, with `concurrency` requests in flight at all times."""
    begin_s = time.monotonic() + WARM_UP_S
    end_s = begin_s + seconds
    stats = ResponseStats(seconds)

    async def send() -> None:
        while (sent_s := time.monotonic()) < end_s:
            worker = await request()
            received_s = time.monotonic()
            if begin_s <= received_s < end_s:
                stats.record(worker, 1000 * (received_s - sent_s))

    await asyncio.gather(*(send() for _ in range(concurrency)))
    return stats


async def measure_requests(
    request: SendRequest, concurrency: int, count: int, on_response: Callable[[int], None]
) -> ResponseStats:
    """The results of `count` requests; `on_response` is called with the number of finished ones after each."""
    stats = ResponseStats()
    numbers = iter(range(count))

    async def send() -> None:
        for _ in numbers:
            sent_s = time.monotonic()
            worker = await request()
            stats.record(worker, 1000 * (time.monotonic() - sent_s))
            on_response(len(stats.latency_ms) + stats.lost)

    await asyncio.gather(*(send() for _ in range(concurrency)))
    return stats


# Workers ---------------------------------------------------------------------------------------------------------


def write_sleep_pipeline_file(folder: Path, seconds: float) -> Path:
    """Write a pipeline file of one stage that sleeps; all have one name, so that their workers serve one stage."""
    subfolder = folder / f"{1000 * seconds:g}ms"
    subfolder.mkdir(exist_ok=True)
    return write_pipeline_file(subfolder, [stage_table("sleep", "SleepExecutor", settings={"seconds": seconds})])


@contextmanager
def start_workers(folder: Path, address: str, task_s: Mapping[str, float]) -> Iterator[dict[str, ChildProcess]]:
    """Workers of one stage by id, each with the seconds of a task; all are up when the block begins."""
    children = {}
    for name, seconds in task_s.items():
        file = write_sleep_pipeline_file(folder, seconds)
        arguments = ("stage", str(file), "sleep", "--broker", address, "--worker", name)
        children[name] = ChildProcess(name, arguments, folder / f"{name}.log")
    with running(*children.values()):
        wait_for_workers(address, lambda workers: len(workers) == len(children))
        yield children


@dataclass(frozen=True, slots=True)
class DispatchBench:
    """The place and the length of the measurements."""

    folder: Path
    address: str
    seconds: float
    per_worker: int

    def compare(self, task_s: Mapping[str, float]) -> dict[str, ResponseStats]:
        """The results by each client in turn, with the same workers."""
        window = self.per_worker * len(task_s)

        async def measure_client(name: str) -> ResponseStats:
            async with self._client(name, window) as client:
                return await measure_for_seconds(client.request, window, self.seconds)

        with start_workers(self.folder, self.address, task_s):
            return {name: asyncio.run(measure_client(name)) for name in CLIENTS}

    def count_lost(self, name: str, count: int) -> int:
        """How many of `count` requests are never answered when the slow worker of the pair is killed halfway."""
        window = self.per_worker * len(UNEQUAL_TASK_S)

        async def measure_client(slow: ChildProcess) -> ResponseStats:
            def kill_halfway(finished: int) -> None:
                if finished == count // 2:
                    slow.process.kill()

            async with self._client(name, window) as client:
                return await measure_requests(client.request, window, count, kill_halfway)

        with start_workers(self.folder, self.address, UNEQUAL_TASK_S) as workers:
            return asyncio.run(measure_client(workers["slow"])).lost

    def _client(self, name: str, window: int) -> OffloaderClient | SharedSubscriptionClient:
        file = write_sleep_pipeline_file(self.folder, EQUAL_TASK_S)
        if name == "offloader":
            return OffloaderClient(file, self.address, window)
        return SharedSubscriptionClient(file, self.address)


def make_row(
    workers: str, client: str, stats: ResponseStats, linear_per_s: float, one_per_s: float | None
) -> dict[str, Any]:
    """A row of the table; `linear_per_s` is what the sleeps alone would allow, `one_per_s` n times one worker."""
    latency_ms = percentiles(stats.latency_ms, (50, 95))
    return {
        "workers": workers,
        "client": client,
        "per_s": stats.per_s,
        "of_linear": stats.per_s / linear_per_s,
        "of_one": None if one_per_s is None else stats.per_s / one_per_s,
        "p50_ms": latency_ms["p50"],
        "p95_ms": latency_ms["p95"],
        "by_worker": dict(sorted(stats.by_worker.items())),
    }


def measure(bench: DispatchBench, counts: Sequence[int], requests: int) -> dict[str, Any]:
    rows = []
    one_per_s: dict[str, float] = {}
    for count in counts:
        for client, stats in bench.compare({f"equal-{index}": EQUAL_TASK_S for index in range(count)}).items():
            one_per_s.setdefault(client, stats.per_s / count)
            rows.append(make_row(f"{count} of 50 ms", client, stats, count / EQUAL_TASK_S, count * one_per_s[client]))
    linear_per_s = sum(1 / seconds for seconds in UNEQUAL_TASK_S.values())
    for client, stats in bench.compare(UNEQUAL_TASK_S).items():
        rows.append(make_row("20 ms and 100 ms", client, stats, linear_per_s, None))
    lost = {client: bench.count_lost(client, requests) for client in CLIENTS}
    return {"per_worker": bench.per_worker, "rows": rows, "worker_killed": {"requests": requests, "lost": lost}}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="measured for each row (default 10)")
    parser.add_argument("--per-worker", type=int, default=REQUESTS_PER_WORKER, help="requests in flight (default 3)")
    parser.add_argument("--workers", type=int, nargs="*", default=WORKER_COUNTS, help="equal ones (default 1 2 4 8)")
    parser.add_argument("--kills", type=int, default=200, help="requests of the run with a killed worker (default 200)")
    add_broker_option(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, start_broker(kind=options.broker) as broker:
        bench = DispatchBench(Path(folder), broker.address, options.seconds, options.per_worker)
        result = {"broker": broker.kind, **measure(bench, options.workers, options.kills)}
    title = f"Workers that sleep, {options.per_worker} requests in flight for each, {options.broker}"
    print_table(title, COLUMNS, result["rows"])
    killed = result["worker_killed"]
    for client, lost in killed["lost"].items():
        print(f"{client}: the worker of 100 ms killed, {lost} of {killed['requests']} requests never answered")
    print_json(options, result)


if __name__ == "__main__":
    main()
