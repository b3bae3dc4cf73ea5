"""The Python API with real workers: results, failures, deadlines and routes.

One test starts worker processes at a broker of each kind; all others run in one process.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brokers.config.pipeline_file import load_pipeline
from brokers.errors import BrokerUnreachable, DeadlinePassed, Disconnected, NoWorker, RequestFailed
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_numpy
from brokers.server.local_broker import LocalBroker
from sources.client import offloader
from sources.client.offloader import Offloader
from tests.support.brokers.presence import wait_for_workers
from tests.support.pipelines.contents import make_content, result_value
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox
from tests.support.pipelines.served_pipeline import GatedExecutor, ServedPipeline, wait_until, with_pipeline

CHAIN = (stage_table("double", "double"), stage_table("add", "add_one"))


def test_each_request_gets_its_own_result(sandbox: ProcessSandbox, broker: LocalBroker) -> None:
    path = write_pipeline_file(sandbox.folder, CHAIN, name="chain")
    for name in ("double", "add"):
        sandbox.start_sparse("stage", path, name, "--broker", broker.address)
    wait_for_workers(broker.address, lambda workers: len(workers) == 2)

    async def main() -> None:
        async with Offloader(load_pipeline(path), broker=broker.address, window=20) as offload:
            results = await asyncio.gather(*(offload(np.array(float(number))) for number in range(200)))
            assert [float(result) for result in results] == [2.0 * number + 1 for number in range(200)]
            table = await offload({"values": np.array([1, 2], np.float32)})
            assert table["values"].dtype == np.float32
            np.testing.assert_array_equal(table["values"], [3, 5])

    asyncio.run(main())


def test_json_reading_reaches_a_numeric_stage(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        await served.add_all()
        async with served.offloader() as offload:
            assert await offload(b'{"values": [1, 2]}') == {"values": {"values": [3.0, 5.0]}}

    with_pipeline(tmp_path, test, *CHAIN)


def test_failure_names_stage_worker_error_and_reason(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        worker = await served.add_worker()
        async with served.offloader() as offload:
            assert float(await offload(np.array(1.0))) == 1.0
            with pytest.raises(RequestFailed) as caught:
                await offload(np.array(-3.0))
        assert (caught.value.stage, caught.value.worker) == ("reject", worker.worker)
        assert (caught.value.error, caught.value.reason) == ("ArithmeticError", "-3.0 is below zero")

    with_pipeline(tmp_path, test, stage_table("reject", "reject_negative"))


def test_any_exception_of_a_stage_fails_one_request(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        await served.add_worker()
        failures = []
        async with served.offloader() as offload:
            for value in (1, 2, 3, 4):
                with pytest.raises(RequestFailed) as caught:
                    await offload(np.array(float(value)))
                failures.append((caught.value.error, caught.value.reason))
            assert float(await offload(np.array(5.0))) == 5.0
        unprintable, long, exit_request, busy = failures
        assert unprintable[0] == "UnprintableError"
        assert long[0] == "ValueError"
        assert long[1].startswith("first second xxx")
        assert long[1].endswith("... (100013 characters)")
        assert exit_request == ("SystemExit", "enough")
        assert busy == ("Busy", "the sensor is in use")

    with_pipeline(tmp_path, test, stage_table("raise", "raise_by_value"))


@pytest.mark.parametrize(
    ("stage", "value", "error", "reason"),
    [
        (stage_table("bad", "return_non_dict"), np.array(1.0), "TypeError", "dict"),
        (stage_table("good", "double"), {"other": np.array(1.0)}, "BadPayload", "['values'] missing from ['other']"),
    ],
    ids=["not-a-dict", "missing-tensor"],
)
def test_bad_tensors_fail_their_request(
    tmp_path: Path, stage: dict[str, Any], value: Any, error: str, reason: str
) -> None:
    async def test(served: ServedPipeline) -> None:
        await served.add_worker()
        async with served.offloader() as offload:
            for _ in range(2):
                with pytest.raises(RequestFailed) as caught:
                    await offload(value)
                assert caught.value.error == error
                assert reason in caught.value.reason

    with_pipeline(tmp_path, test, stage)


def test_worker_drops_expired_requests(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        executor = GatedExecutor()
        worker = await served.add_worker(executor=executor)
        async with served.offloader(window=8) as offload:
            first = asyncio.create_task(offload.request(make_content(0.0)))
            await wait_until(lambda: executor.values)
            late = [offload.request(make_content(1.0), deadline_ms=50) for _ in range(2)]
            errors = await asyncio.gather(*late, return_exceptions=True)
            assert [type(error) for error in errors] == [DeadlinePassed, DeadlinePassed]
            await wait_until(lambda: worker.counters["expired"] == 2)
            executor.gate.set()
            await first
            await offload.request(make_content(5.0))
        assert executor.values == [0.0, 5.0]

    with_pipeline(tmp_path, test, stage_table("slow", "double"))


def test_request_without_a_worker_says_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offloader, "WORKER_WAIT_S", 0.1)

    async def test(served: ServedPipeline) -> None:
        async with served.offloader() as offload:
            with pytest.raises(NoWorker, match="sparse stage FILE missing"):
                await offload(np.array(1.0))

    with_pipeline(tmp_path, test, stage_table("missing", "double"))


def test_unreachable_broker_raises_at_once(tmp_path: Path) -> None:
    pipeline = load_pipeline(write_pipeline_file(tmp_path, [stage_table("one", "double")]))

    async def main() -> None:
        with pytest.raises(BrokerUnreachable):
            async with Offloader(pipeline, broker="mqtt://127.0.0.1:9"):
                raise AssertionError("a broker at the discard port")

    asyncio.run(main())


def test_leaving_the_offloader_ends_its_requests(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        executor = GatedExecutor()
        await served.add_worker(executor=executor)
        async with served.offloader() as offload:
            waiting = asyncio.create_task(offload.request(make_content(1.0)))
            await wait_until(lambda: executor.values)
        with pytest.raises(Disconnected):
            await waiting
        executor.gate.set()

    with_pipeline(tmp_path, test, stage_table("slow", "double"))


def test_batches_give_the_results_of_single_requests(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        executor = GatedExecutor()
        worker = await served.add_worker(executor=executor)
        contents = [TensorContent({"values": from_numpy(np.full(rows, float(rows)))}) for rows in (1, 1, 3, 2, 5, 1)]
        async with served.offloader(window=12) as offload:
            first = asyncio.create_task(offload.request(contents[0]))
            await wait_until(lambda: executor.values)
            others = [asyncio.create_task(offload.request(content)) for content in contents[1:]]
            await wait_until(lambda: len(worker._queue) == 5)  # while the first request is executed
            executor.gate.set()
            responses = [await first, *await asyncio.gather(*others)]
        assert [response.result.hops[0].batch for response in responses] == [1, 4, 4, 4, 4, 1]
        for content, response in zip(contents, responses, strict=True):
            assert isinstance(response.result.content, TensorContent)
            before, after = content.tensors["values"], response.result.content.tensors["values"]
            assert after == from_numpy(2 * np.full(before.shape[0], float(before.shape[0])))

    with_pipeline(tmp_path, test, stage_table("rows", "double", max_batch=4))


def test_full_workers_share_the_requests(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        executors = [GatedExecutor(), GatedExecutor()]
        workers = [await served.add_worker(executor=executor) for executor in executors]
        async with served.offloader(window=6) as offload:
            requests = [asyncio.create_task(offload.request(make_content(1.0))) for _ in range(6)]
            await wait_until(lambda: [len(worker._queue) for worker in workers] == [2, 2])
            for executor in executors:
                executor.gate.set()
            responses = await asyncio.gather(*requests)
        served_by = [response.result.hops[0].worker for response in responses]
        assert [served_by.count(worker.worker) for worker in workers] == [3, 3]

    with_pipeline(tmp_path, test, stage_table("slow", "double"))


def test_executor_dispatches_to_another_stage(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        await served.add_all()
        async with served.offloader() as offload:
            large = await offload.request(make_content(200.0))
            small = await offload.request(make_content(5.0))
        assert [hop.stage for hop in large.result.hops] == ["sort", "large"]
        assert [hop.stage for hop in small.result.hops] == ["sort", "small", "large"]
        assert (result_value(large), result_value(small)) == (201.0, 11.0)
        assert isinstance(large.result.content, TensorContent)
        assert large.result.content.metadata["route"] == "large"

    stages = [stage_table("sort", "RoutingExecutor"), stage_table("small", "double"), stage_table("large", "add_one")]
    with_pipeline(tmp_path, test, *stages)


def test_large_request_may_pass_a_worker_twice(tmp_path: Path) -> None:
    """The chunks of both passes differ in their message number only, and are not taken for duplicates."""

    async def test(served: ServedPipeline) -> None:
        await served.add_all()
        async with served.offloader() as offload:
            content = TensorContent({"values": from_numpy(np.zeros(1 << 18))})  # 2 MiB: several chunks
            response = await offload.request(content)
        assert [hop.stage for hop in response.result.hops] == ["there", "back", "there", "back"]

    with_pipeline(tmp_path, test, stage_table("there", "LoopbackExecutor"), stage_table("back", "LoopbackExecutor"))


def test_executor_may_accept_any_bytes(tmp_path: Path) -> None:
    async def test(served: ServedPipeline) -> None:
        worker = await served.add_worker()
        assert worker.presence.record.formats == ()  # unknown: it has its own `prepare`
        async with served.offloader() as offload:
            assert await offload(b"[1, 2, 3]") == {"values": {"bytes": 9}}

    with_pipeline(tmp_path, test, stage_table("raw", "ByteCountExecutor"))
