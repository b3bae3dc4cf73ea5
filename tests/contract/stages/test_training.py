"""Training over an in-memory broker: weights equal the unsplit network's for any cut, schedule, number of sources."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from brokers.protocol.messages import (
    Activation,
    Message,
    Task,
    TensorContent,
)
from brokers.protocol.training import LABELS_TENSOR
from sources.datasets.dataset import Dataset
from tests.support.training.in_process_parts import assert_bitwise_equal
from tests.support.training.in_process_pipeline import (
    STEPS,
    InProcessPipeline,
    assert_weights,
    run_with_pipeline,
)
from tests.support.training.striped_images import StripedImages

# Equality with the unsplit network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("cuts", [(), (5,), (4, 9), (1, 3, 6, 8)], ids=len)
def test_run_equals_the_unsplit_network(tmp_path: Path, cuts: tuple[int, ...], schedule: str) -> None:
    saved: list[int] = []

    async def test(pipeline: InProcessPipeline) -> None:
        pipeline.on_event = lambda event: saved.append(pipeline.saved_activations)
        source = await pipeline.train()
        assert source.completed_steps == STEPS
        assert [event["version"] for event in source.events_of_kind("step")] == list(range(1, STEPS + 1))
        await assert_weights(pipeline, source)
        assert pipeline.sources_by_version() == ["source"] * STEPS
        assert all(worker.worker.counters == {} for worker in pipeline.workers)

    run_with_pipeline(tmp_path, test, cuts=cuts, schedule=schedule)
    assert saved == [0] * STEPS


def test_batches_need_not_divide_evenly(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        source = await pipeline.train(dataset=StripedImages(count=31))
        assert [event["rows"] for event in source.events_of_kind("step")] == [24, 7, 24, 7]
        await assert_weights(pipeline, source, steps=4)

    run_with_pipeline(tmp_path, test, micro_batches=5)


def stages_that_receive_labels(pipeline: InProcessPipeline) -> set[str]:
    return {
        topic.split("/")[3]
        for topic, message in pipeline.messages
        if isinstance(message, Task)
        and isinstance(message.content, TensorContent)
        and LABELS_TENSOR in message.content.tensors
    }


@pytest.mark.parametrize("cuts", [(), (5,), (4, 9)], ids=len)
def test_labels_that_stay_are_sent_to_the_last_stage_only(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        source = await pipeline.train()
        assert stages_that_receive_labels(pipeline) == {f"s{len(cuts)}"}
        assert source.events_of_kind("evaluation")
        await assert_weights(pipeline, source)

    run_with_pipeline(tmp_path, test, cuts=cuts, labels="stay", evaluate_every=1)


def test_labels_that_travel_pass_every_stage(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        await pipeline.train()
        assert stages_that_receive_labels(pipeline) == {"s0", "s1", "s2"}

    run_with_pipeline(tmp_path, test, epochs=1)


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        source = await pipeline.train()
        evaluations = source.events_of_kind("evaluation")
        assert [event["step"] for event in evaluations] == [4, 8]
        assert {event["rows"] for event in evaluations} == {32}
        await assert_weights(pipeline, source)

    run_with_pipeline(tmp_path, test, evaluate_every=1)


# Several sources ------------------------------------------------------------------------------------------------------


def test_steps_of_two_sources_are_serial(tmp_path: Path) -> None:
    datasets: dict[str, Dataset] = {"one": StripedImages(seed=1), "other": StripedImages(seed=2)}

    async def test(pipeline: InProcessPipeline) -> None:
        sources = [await pipeline.add_source(name, dataset) for name, dataset in datasets.items()]
        await asyncio.gather(*(source.training.run() for source in sources))
        order = pipeline.sources_by_version()
        assert [order.count(name) for name in datasets] == [STEPS, STEPS]
        assert order not in (sorted(order), sorted(order, reverse=True))  # they took turns
        assert pipeline.active_worker(0).version == 2 * STEPS
        for source in sources:
            version = source.events_of_kind("step")[-1]["version"]
            expected = pipeline.train_unsplit(order[:version], datasets)
            assert_bitwise_equal(await pipeline.weights(source), expected)

    run_with_pipeline(tmp_path, test)


def test_source_gets_the_weights_of_its_last_step_while_another_trains(tmp_path: Path) -> None:
    datasets: dict[str, Dataset] = {"one": StripedImages(seed=1, count=48), "other": StripedImages(seed=2, count=960)}

    async def test(pipeline: InProcessPipeline) -> None:
        short, long = [await pipeline.add_source(name, dataset) for name, dataset in datasets.items()]
        running = asyncio.create_task(long.training.run())
        await short.training.run()
        version = short.events_of_kind("step")[-1]["version"]
        await pipeline.wait_for("later steps", lambda: (pipeline.active_worker(0).version or 0) > version + 2)
        weights = await pipeline.weights(short)  # from a checkpoint
        assert not running.done()
        assert_bitwise_equal(weights, pipeline.train_unsplit(pipeline.sources_by_version()[:version], datasets))
        short.training._version = 1  # which has been deleted: it gets the newest, of one version at all stages
        weights = await pipeline.weights(short)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        version = int(weights["norm.num_batches_tracked"]) // 3
        assert version > 4
        assert_bitwise_equal(weights, pipeline.train_unsplit(pipeline.sources_by_version()[:version], datasets))

    run_with_pipeline(tmp_path, test, checkpoint_every=20)


def test_source_that_dies_in_its_step_does_not_block_another(tmp_path: Path) -> None:
    datasets: dict[str, Dataset] = {"one": StripedImages(seed=1), "other": StripedImages(seed=2)}
    killed: list[str] = []

    async def test(pipeline: InProcessPipeline) -> None:
        one, other = [await pipeline.add_source(name, dataset) for name, dataset in datasets.items()]
        dying = asyncio.create_task(one.training.run())

        def kill_in_third_step(topic: str, message: Message) -> None:
            if one.completed_steps >= 2 and isinstance(message, Activation) and message.source == "one" and not killed:
                killed.append(one.name)
                pipeline.hub.kill_client(one.transport)

        pipeline.on_message = kill_in_third_step
        await other.training.run()
        assert killed
        order = pipeline.sources_by_version()
        assert order.count("other") == STEPS
        assert 2 <= order.count("one") < STEPS
        assert pipeline.saved_activations == 0
        assert_bitwise_equal(await pipeline.weights(other), pipeline.train_unsplit(order, datasets))
        assert any("source one was lost" in event["why"] for event in other.events_of_kind("rolled_back"))
        await one.transport.close()
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)

    run_with_pipeline(tmp_path, test)


def test_killed_source_resumes_at_the_version_of_the_pipeline(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        first = await pipeline.add_source()
        running = asyncio.create_task(first.training.run())
        await pipeline.wait_for_step(first, 3)
        pipeline.hub.kill_client(first.transport)
        await first.transport.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        second = await pipeline.train(resume=True)  # at once: the record of the pipeline may be a step old
        assert second.completed_steps == STEPS
        await assert_weights(pipeline, second)
        assert pipeline.sources_by_version() == ["source"] * STEPS

    run_with_pipeline(tmp_path, test)
