"""The Python way in, through real brokers to real workers: what comes back, and what each failure raises."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.errors import BrokerUnreachable, DeadlinePassed, Disconnected, NoWorker, RequestFailed
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_numpy, to_numpy
from brokers.server.local_broker import LocalBroker
from sources.client.offloader import Offloader
from tests.support.brokers.presence import wait_for_workers
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, process_sandbox

# The pipelines of this file, each a stage or two, all served at once.
PIPELINES = {
    "chain": [stage_table("double", "double"), stage_table("add", "add_one")],
    "reject_negative": [stage_table("reject_negative", "reject_negative")],
    "raise_by_value": [stage_table("raise_by_value", "raise_by_value")],
    "return_non_dict": [stage_table("return_non_dict", "return_non_dict")],
    "slow": [stage_table("slow", "SleepExecutor", settings={"seconds": 0.4})],
    "rows": [stage_table("rows", "BatchableExecutor", max_batch=4, max_wait_ms=50)],
    "sorted": [stage_table("sort", "RoutingExecutor"), stage_table("small", "double"), stage_table("large", "add_one")],
    "bytes": [stage_table("raw", "ByteCountExecutor")],
}
# Two workers on one stage, started by hand below.
TEAM = [stage_table("slow", "SleepExecutor", settings={"seconds": 0.05})]


@pytest.fixture(scope="module", name="served")
def _served(broker: LocalBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Pipeline]]:
    """All pipelines with their workers, through a broker of each kind."""
    folder = tmp_path_factory.mktemp("served")
    with process_sandbox(folder) as sandbox:
        found = {
            name: load_pipeline(write_pipeline_file(folder, stages, name=name)) for name, stages in PIPELINES.items()
        }
        found["team"] = load_pipeline(write_pipeline_file(folder, TEAM, name="team"))
        for pipeline in found.values():
            for each in pipeline.stage:
                sandbox.start_sparse("stage", pipeline.path, each.name, "--broker", broker.address)
        sandbox.start_sparse("stage", found["team"].path, "slow", "--broker", broker.address)
        wait_for_workers(
            broker.address, lambda workers: len(workers) == sum(len(each.stage) for each in found.values()) + 1
        )
        yield found


def ask(pipeline: Pipeline, broker: LocalBroker, *values: object, window: int | None = None) -> list[object]:
    """The results of these values, all asked for at once; an error stands where it was raised."""

    async def gather() -> list[object]:
        async with Offloader(pipeline, broker=broker.address, window=window) as offload:
            return list(await asyncio.gather(*(offload(value) for value in values), return_exceptions=True))

    return asyncio.run(gather())


def test_an_array_gives_an_array_and_a_dict_gives_a_dict(served: dict[str, Pipeline], broker: LocalBroker) -> None:
    array, table = ask(served["chain"], broker, np.arange(6.0).reshape(2, 3), {"values": np.array([1, 2], np.float32)})
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, 2 * np.arange(6.0).reshape(2, 3) + 1)
    assert isinstance(table, dict)
    assert list(table) == ["values"]
    assert table["values"].dtype == np.float32
    np.testing.assert_array_equal(table["values"], [3, 5])


def test_many_requests_at_once_each_get_their_own_answer(served: dict[str, Pipeline], broker: LocalBroker) -> None:
    numbers = [float(number) for number in range(200)]
    answers = ask(served["chain"], broker, *(np.array(number) for number in numbers), window=20)
    assert [float(answer) for answer in answers] == [2 * number + 1 for number in numbers]  # type: ignore[arg-type]


def test_readings_as_json_reach_a_stage_of_numbers(served: dict[str, Pipeline], broker: LocalBroker) -> None:
    (found,) = ask(served["chain"], broker, b'{"values": [1, 2]}')
    assert found == {"values": {"values": [3.0, 5.0]}}


def test_a_request_that_fails_says_which_stage_and_worker_and_why(
    served: dict[str, Pipeline], broker: LocalBroker
) -> None:
    good, bad = ask(served["reject_negative"], broker, np.array(1.0), np.array(-3.0))
    assert float(good) == 1.0  # type: ignore[arg-type]
    assert isinstance(bad, RequestFailed)
    assert (bad.stage, bad.error, bad.reason) == ("reject_negative", "ArithmeticError", "-3.0 is below zero")
    assert bad.worker


def test_whatever_a_stage_raises_is_told_in_one_line_at_once_and_the_worker_lives(
    served: dict[str, Pipeline], broker: LocalBroker
) -> None:
    found = ask(served["raise_by_value"], broker, *(np.array(float(number)) for number in (1, 2, 3, 4, 5)))
    told = [(each.error, each.reason) for each in found[:4] if isinstance(each, RequestFailed)]
    assert len(told) == 4, found
    assert told[0] == ("Speechless", "its message could not be formatted: AttributeError")
    assert told[1][0] == "ValueError"
    assert told[1][1].startswith("first second xxx")
    assert told[1][1].endswith("... (100013 characters)")
    assert told[2:] == [("SystemExit", "enough"), ("Busy", "the sensor is in use")]
    assert float(found[4]) == 5.0  # type: ignore[arg-type]


def test_a_stage_that_returns_no_dict_fails_its_request_and_lives(
    served: dict[str, Pipeline], broker: LocalBroker
) -> None:
    for _ in range(2):
        (found,) = ask(served["return_non_dict"], broker, np.array(1.0))
        assert isinstance(found, RequestFailed)
        assert found.error == "TypeError"
        assert "forgets must return a dict" in found.reason


def test_a_stage_is_told_which_tensors_it_lacks(served: dict[str, Pipeline], broker: LocalBroker) -> None:
    (found,) = ask(served["chain"], broker, {"other": np.array(1.0)})
    assert isinstance(found, RequestFailed)
    assert found.error == "BadPayload"
    assert "['values'] missing from ['other']" in found.reason


def test_a_deadline_that_passes_is_an_error_of_its_own(served: dict[str, Pipeline], broker: LocalBroker) -> None:
    async def late() -> None:
        async with Offloader(served["slow"], broker=broker.address) as offload:
            with pytest.raises(DeadlinePassed) as caught:
                await offload({"values": np.array(1.0)}, deadline_ms=100)
            assert caught.value.deadline_ms == 100
            assert float((await offload({"values": np.array(2.0)}, deadline_ms=60_000))["values"]) == 2.0

    asyncio.run(late())


def test_a_worker_drops_what_is_past_its_deadline(served: dict[str, Pipeline], broker: LocalBroker) -> None:
    """Three wait behind one that takes 0.4 s: the worker must not spend 1.2 s on what nobody waits for any more."""

    async def crowd() -> list[object]:
        async with Offloader(served["slow"], broker=broker.address, window=8) as offload:
            first = asyncio.create_task(offload({"values": np.array(0.0)}))
            await asyncio.sleep(0.1)
            late = [offload({"values": np.array(1.0)}, deadline_ms=150) for _ in range(2)]
            found = await asyncio.gather(*late, return_exceptions=True)
            await first
            begun = asyncio.get_running_loop().time()
            answer = await offload.request(TensorContent({"values": from_numpy(np.array(5.0))}))
            took_s = asyncio.get_running_loop().time() - begun
            return [*found, took_s - answer.result.hops[0].compute_ms / 1000]

    first, second, waited_s = asyncio.run(crowd())
    assert isinstance(first, DeadlinePassed)
    assert isinstance(second, DeadlinePassed)
    assert isinstance(waited_s, float)
    assert waited_s < 0.35


def test_without_a_worker_a_request_says_how_to_start_one(
    broker: LocalBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sources.client.offloader.WORKER_WAIT_S", 0.3)
    nobody = load_pipeline(write_pipeline_file(tmp_path, [stage_table("nobody", "double")], name="nobody"))
    (found,) = ask(nobody, broker, np.array(1.0))
    assert isinstance(found, NoWorker)
    assert "sparse stage FILE nobody" in str(found)


def test_without_a_broker_the_offloader_says_so_at_once(tmp_path: Path) -> None:
    pipeline = load_pipeline(write_pipeline_file(tmp_path, [stage_table("one", "double")]))

    async def enter() -> None:
        async with Offloader(pipeline, broker="mqtt://127.0.0.1:9"):
            raise AssertionError("there is no broker at the discard port")

    with pytest.raises(BrokerUnreachable):
        asyncio.run(enter())


def test_leaving_the_offloader_ends_what_still_waits(served: dict[str, Pipeline], broker: LocalBroker) -> None:
    async def leave() -> object:
        async with Offloader(served["slow"], broker=broker.address) as offload:
            waiting = asyncio.create_task(offload({"values": np.array(1.0)}))
            await asyncio.sleep(0.15)
        return (await asyncio.gather(waiting, return_exceptions=True))[0]

    assert isinstance(asyncio.run(leave()), Disconnected)


def test_batches_give_what_single_requests_give_and_are_batches(
    served: dict[str, Pipeline], broker: LocalBroker
) -> None:
    async def rows() -> list[tuple[np.ndarray[Any, Any], int]]:
        async with Offloader(served["rows"], broker=broker.address, window=12) as offload:
            content = [TensorContent({"rows": from_numpy(np.full((1, 3), float(index)))}) for index in range(24)]
            answers = await asyncio.gather(*(offload.request(each) for each in content))
        found = []
        for answer in answers:
            assert isinstance(answer.result.content, TensorContent)
            tensors = {name: to_numpy(tensor) for name, tensor in answer.result.content.tensors.items()}
            assert tensors["rows"].shape == (1, 3)
            assert tensors["batch"].tolist() == [answer.result.hops[0].batch]
            found.append((tensors["rows"], answer.result.hops[0].batch))
        return found

    answers = asyncio.run(rows())
    np.testing.assert_array_equal([answer[0, 0] for answer, _ in answers], 2.0 * np.arange(24))
    sizes = Counter(size for _, size in answers)
    assert max(sizes) == 4, sizes
    assert sizes[4] >= 12, sizes


def test_rows_of_different_numbers_are_batched_and_split_again(
    served: dict[str, Pipeline], broker: LocalBroker
) -> None:
    counts = [1, 3, 2, 5, 1]
    answers = ask(served["rows"], broker, *({"rows": np.full((count, 3), float(count))} for count in counts), window=8)
    for count, answer in zip(counts, answers, strict=True):
        assert isinstance(answer, dict)
        np.testing.assert_array_equal(answer["rows"], np.full((count, 3), 2.0 * count))


def test_two_workers_of_a_stage_share_its_work(served: dict[str, Pipeline], broker: LocalBroker) -> None:
    async def share() -> Counter[str]:
        async with Offloader(served["team"], broker=broker.address, window=6) as offload:
            content = TensorContent({"values": from_numpy(np.array(1.0))})
            answers = await asyncio.gather(*(offload.request(content) for _ in range(24)))
        return Counter(answer.result.hops[0].worker for answer in answers)

    shares = asyncio.run(share())
    assert len(shares) == 2, shares
    assert min(shares.values()) >= 8, shares


def test_an_executor_chooses_another_stage_by_the_nodes_dispatcher(
    served: dict[str, Pipeline], broker: LocalBroker
) -> None:
    async def both() -> list[tuple[float, list[str], str]]:
        async with Offloader(served["sorted"], broker=broker.address) as offload:
            contents = [TensorContent({"values": from_numpy(np.array(value))}) for value in (200.0, 5.0)]
            found = []
            for answer in await asyncio.gather(*(offload.request(content) for content in contents)):
                assert isinstance(answer.result.content, TensorContent)
                value = float(to_numpy(answer.result.content.tensors["values"]))
                way = answer.result.content.metadata.get("way", "")
                found.append((value, [hop.stage for hop in answer.result.hops], way))
            return found

    large, small = asyncio.run(both())
    assert large == (201.0, ["sort", "large"], "detour")
    assert small == (11.0, ["sort", "small", "large"], "")


def test_an_executor_may_take_bytes_that_are_no_arrays(served: dict[str, Pipeline], broker: LocalBroker) -> None:
    found = ask(served["bytes"], broker, *[b"[1, 2, 3]"] * 3)
    assert found == [{"values": {"bytes": 9}}] * 3


def test_the_record_of_a_worker_says_what_it_takes_where_it_knows(
    served: dict[str, Pipeline], broker: LocalBroker
) -> None:
    workers = wait_for_workers(broker.address, lambda seen: {"double", "raw"} <= {each.stage for each in seen.values()})
    found = {each.stage: each.formats for each in workers.values()}
    assert found["double"] == ("application/x-safetensors", "application/json")
    assert found["raw"] == ()  # its author's own `prepare`


def test_a_stage_whose_executor_cannot_start_says_why_and_stops_nothing(
    sandbox: ProcessSandbox, embedded_broker: LocalBroker
) -> None:
    path = write_pipeline_file(sandbox.folder, [stage_table("bad", "FailingStartExecutor")])
    said = sandbox.start_sparse("stage", path, "bad", "--broker", embedded_broker.address).wait()
    assert said.returncode == 1
    assert said.stderr == "sparse: the file is not there\n"
    sandbox.assert_nothing_left()
