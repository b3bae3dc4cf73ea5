"""What workers give together: each does its share, by what it can. The long form measures, by tests.bench.dispatch."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from brokers.server.local_broker import LocalBroker, start_broker
from tests.bench.dispatch import (
    EQUAL_TASK_S,
    REQUESTS_PER_WORKER,
    UNEQUAL_TASK_S,
    WORKER_COUNTS,
    DispatchBench,
    OffloaderClient,
    ResponseStats,
    measure_requests,
    start_workers,
    write_sleep_pipeline_file,
)
from tests.soak.conftest import PrintLine

# Twice the sleeps of the long form: on a busy machine what is not sleep weighs less against them.
SLOWER = 2


async def ask(folder: Path, address: str, window: int, count: int) -> ResponseStats:
    async with OffloaderClient(write_sleep_pipeline_file(folder, EQUAL_TASK_S), address, window) as ours:
        return await measure_requests(ours.request, window, count)


def equal(count: int) -> dict[str, float]:
    return {f"equal-{index}": EQUAL_TASK_S for index in range(count)}


@pytest.mark.usefixtures("require_mosquitto")
def test_each_of_eight_equal_workers_does_its_share(tmp_path: Path, print_line: PrintLine) -> None:
    # As many in flight as have room: whoever ends one gets the next. With fewer it would count, too, how long each said
    # that a task takes it, and one hiccup is enough for a worker to be passed over for a while.
    with start_broker(kind="mosquitto") as broker, start_workers(tmp_path, broker.address, equal(8)):
        answers = asyncio.run(ask(tmp_path, broker.address, 8 * REQUESTS_PER_WORKER, 160))
    print_line(f"160 requests: {dict(sorted(answers.by_worker.items()))}")
    assert sum(answers.by_worker.values()) == 160
    assert len(answers.by_worker) == 8
    assert min(answers.by_worker.values()) >= 7  # an equal share is 20


def test_of_two_workers_the_one_that_is_five_times_as_fast_does_most(
    tmp_path: Path, broker: LocalBroker, print_line: PrintLine
) -> None:
    with start_workers(tmp_path, broker.address, {name: SLOWER * seconds for name, seconds in UNEQUAL_TASK_S.items()}):
        answers = asyncio.run(ask(tmp_path, broker.address, 2 * REQUESTS_PER_WORKER, 120))
    fast, slow = answers.by_worker["fast"], answers.by_worker["slow"]
    print_line(f"{broker.kind}, 120 requests: {fast} by the fast worker, {slow} by the slow one")
    assert fast + slow == 120
    assert fast >= 2.5 * slow  # five times as many, less what a busy machine adds to both; dealt in turns: as many
    assert slow >= 5  # a fifth of the work of the fast one is still work: 20


@pytest.mark.usefixtures("require_mosquitto")
def test_throughput_is_that_of_all_workers_together(tmp_path: Path, is_long_run: bool, print_line: PrintLine) -> None:
    if not is_long_run:
        pytest.skip("measures time: make soak")
    pair_per_s = sum(1 / seconds for seconds in UNEQUAL_TASK_S.values())
    with start_broker(kind="mosquitto") as broker:
        bench = DispatchBench(tmp_path, broker.address, 20.0, REQUESTS_PER_WORKER)
        for count in WORKER_COUNTS:
            share = bench.compare(equal(count))["ours"].per_s * EQUAL_TASK_S / count
            print_line(f"{count} workers of 50 ms: {share:.3f} of linear")
            assert share >= 0.9
        shares = {way: answers.per_s / pair_per_s for way, answers in bench.compare(UNEQUAL_TASK_S).items()}
        print_line(
            f"20 ms and 100 ms: {shares['ours']:.3f} of their sum, {shares['plain']:.3f} by plain shared subscription"
        )
        assert shares["ours"] >= 0.95
        assert shares["ours"] > shares["plain"]
