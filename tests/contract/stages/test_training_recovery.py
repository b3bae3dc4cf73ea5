"""Training over an in-memory broker: a lost worker, source or connection at any moment changes no weight."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from brokers.errors import Disconnected
from brokers.protocol.messages import (
    Gradient,
    Message,
    StepMessage,
    Task,
)
from stages.training.checkpoints import Checkpoint
from tests.support.training.in_process_pipeline import (
    STEPS,
    InProcessPipeline,
    abort_message,
    assert_weights,
    run_with_pipeline,
)

# Lost workers and connections -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_killed_worker_is_replaced(tmp_path: Path, stage: int) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        source = await pipeline.add_source()
        running = asyncio.create_task(source.training.run())
        for step in (2, 6, 9):
            await pipeline.wait_for_step(source, step)
            await pipeline.replace_worker(stage)
        await running
        assert len(source.events_of_kind("rolled_back")) >= 3
        await assert_weights(pipeline, source, steps=12)
        assert pipeline.saved_activations == 0

    run_with_pipeline(tmp_path, test, epochs=3)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_standby_takes_over_from_a_killed_worker(tmp_path: Path, stage: int) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        await pipeline.add_worker(stage, "zz-standby")
        source = await pipeline.add_source()
        running = asyncio.create_task(source.training.run())
        await pipeline.wait_for_step(source, 5)
        active = pipeline.active_worker(stage)
        assert active.name != "zz-standby"
        pipeline.hub.kill_client(active.transport)
        await running
        assert pipeline.members[f"s{stage}"] == "zz-standby"
        await assert_weights(pipeline, source)
        assert len(source.events_of_kind("rolled_back")) == 1

    run_with_pipeline(tmp_path, test)


def test_standby_does_not_train(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        await pipeline.add_worker(1, "a-standby")  # the first by name, but not by time
        source = await pipeline.train()
        versions = [worker.version for worker in pipeline.workers if worker.stage.name == "s1"]
        assert sorted(versions, key=str) == [0, STEPS]
        await assert_weights(pipeline, source)

    run_with_pipeline(tmp_path, test)


def test_draining_worker_saves_its_version(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        source = await pipeline.add_source()
        running = asyncio.create_task(source.training.run())
        await pipeline.wait_for_step(source, 2)
        leaving = pipeline.active_worker(1)
        await leaving.drain()
        assert leaving.version in leaving.versions
        await pipeline.add_worker(1, "successor")
        await running
        await assert_weights(pipeline, source, steps=12)

    run_with_pipeline(tmp_path, test, epochs=3)


def test_broker_restart_loses_no_step(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        source = await pipeline.add_source()
        running = asyncio.create_task(source.training.run())
        await pipeline.wait_for_step(source, 2)
        pipeline.hub.stop()
        await asyncio.sleep(0.2)
        pipeline.hub.start()
        await running
        await assert_weights(pipeline, source, steps=12)

    run_with_pipeline(tmp_path, test, epochs=3)


def test_aborted_step_leaves_no_saved_forwards(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        pending: list[int] = []

        def record_status(topic: str, message: Message) -> None:
            if isinstance(message, StepMessage) and message.verb == "quiesced":
                pending.append(message.details["status"]["pending_forwards"])

        pipeline.on_message = record_status
        source = await pipeline.add_source()
        running = asyncio.create_task(source.training.run())
        for step in (1, 3, 5):
            await pipeline.wait_for_step(source, step)
            await pipeline.wait_for_messages(4)
            await source.channel.send(pipeline.active_worker(0).inbox, abort_message(pipeline))
        await running
        assert len(pending) >= 3 * 4
        assert set(pending) == {0}
        await assert_weights(pipeline, source)

    run_with_pipeline(tmp_path, test)


def test_weights_are_fetched_after_a_disconnection(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        source = await pipeline.train()
        pipeline.hub.stop()
        await asyncio.sleep(0.2)
        pipeline.hub.start()
        await pipeline.wait_for("the disconnection", lambda: source.training.step_runner._connection_lost)
        await assert_weights(pipeline, source)

    run_with_pipeline(tmp_path, test)


# A kill, a freeze or a disconnection at an unfavourable moment --------------------------------------------------------


def test_memory_of_a_rolled_back_term_is_not_a_version(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        source = await pipeline.train()
        frozen = pipeline.active_worker(1)
        frozen.executor.restored_term -= 1  # the others have rolled back since, and trained up to this number again
        with torch.no_grad():
            for parameter in frozen.part_trainer._module.parameters():
                parameter.add_(1.0)
        term = frozen.term
        await pipeline.replace_worker(2)

        def is_next_term() -> bool:
            status = source.training.membership.term
            return status is not None and status.term > term

        await pipeline.wait_for("the next term", is_next_term)
        await assert_weights(pipeline, source)

    run_with_pipeline(tmp_path, test)


@pytest.mark.parametrize("stage", [0, 1])
def test_worker_on_standby_saves_no_version(tmp_path: Path, stage: int) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        await pipeline.train()
        former = pipeline.active_worker(stage)
        former.part_trainer.version = 9  # of a step that the others have rolled back
        former.worker.stand_by(former.term + 1)
        await former.drain()
        assert former.versions == (4, 8)

    run_with_pipeline(tmp_path, test)


@pytest.mark.parametrize("kind", ["task", "commit"])
def test_source_retries_a_step_that_a_worker_on_standby_refuses(
    tmp_path: Path, kind: Literal["task", "commit"], caplog: pytest.LogCaptureFixture
) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        source = await pipeline.add_source()
        send = source.channel.send
        former = pipeline.workers[0]

        async def send_too_late(topic: str, message: Message) -> None:
            is_commit = isinstance(message, StepMessage) and message.verb == "commit" and topic == former.inbox
            is_late = is_commit if kind == "commit" else isinstance(message, Task)
            if is_late and source.completed_steps == 2 and not source.events_of_kind("rolled_back"):
                former.worker.stand_by(former.term)
                await pipeline.wait_for("the standby", lambda: former.version is None)
            await send(topic, message)

        source.channel.send = send_too_late  # type: ignore[method-assign]
        await source.training.run()
        assert len(source.events_of_kind("rolled_back")) == 1
        await assert_weights(pipeline, source)
        assert "failed in a step" not in caplog.text

    run_with_pipeline(tmp_path, test)


def test_source_that_is_killed_between_two_commits_of_its_last_step_can_resume(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        first = await pipeline.add_source()
        send = first.channel.send

        async def send_one_commit(topic: str, message: Message) -> None:
            await send(topic, message)
            if isinstance(message, StepMessage) and message.verb == "commit" and first.completed_steps == STEPS - 1:
                await pipeline.wait_for("a commit", lambda: any(each.version == STEPS for each in pipeline.workers))
                await asyncio.sleep(0.2)
                pipeline.hub.kill_client(first.transport)

        first.channel.send = send_one_commit  # type: ignore[method-assign]
        with pytest.raises(Disconnected):
            await first.training.run()
        await first.transport.close()
        await asyncio.sleep(0.5)  # until the version of the first stage is in its record
        second = await pipeline.train(resume=True)
        assert second.completed_steps == STEPS
        await assert_weights(pipeline, second)

    run_with_pipeline(tmp_path, test)


def test_last_step_of_a_stopped_run_is_in_a_checkpoint(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        source = await pipeline.add_source()

        def stop_in_third_step(topic: str, message: Message) -> None:
            if isinstance(message, Gradient) and source.completed_steps == 2:
                source.training.stop_requested.set()

        pipeline.on_message = stop_in_third_step
        await source.training.run()
        assert source.completed_steps == 3
        assert {worker.versions for worker in pipeline.workers} == {(3,)}

    run_with_pipeline(tmp_path, test)


def test_worker_that_cannot_report_ends(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        def fail() -> None:
            raise RuntimeError("a bug")

        worker = pipeline.workers.pop()
        worker.worker._tick = fail  # type: ignore[method-assign]
        await pipeline.wait_for("the end of the worker", lambda: not worker.is_running)
        with pytest.raises(RuntimeError, match="a bug"):
            await worker.close()
        await worker.worker.stop()

    run_with_pipeline(tmp_path, test)


def test_rolled_back_checkpoint_of_a_frozen_worker_is_overwritten(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        def write_late(event: Any) -> None:
            if event["event"] == "step" and event["step"] == 2:
                worker = pipeline.active_worker(1)
                tensors = {name: tensor + 1 for name, tensor in worker.part_trainer.checkpoint_tensors(2).items()}
                worker.executor.checkpoints.save(Checkpoint(4, tensors, worker.executor.progress))

        pipeline.on_event = write_late
        source = await pipeline.add_source()
        running = asyncio.create_task(source.training.run())
        await pipeline.wait_for_step(source, 5)
        await pipeline.replace_worker(1)
        await running
        await assert_weights(pipeline, source)

    run_with_pipeline(tmp_path, test)
