"""Training from the sources to the last stage, over an in-memory broker: weights equal those of the unsplit network.

Exactness holds for any cut and schedule, several sources, lost processes and connections, and hostile messages.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from brokers.dispatch.channel import MessageChannel
from brokers.errors import Disconnected, RequestError, SparseError, UsageError, WireError
from brokers.protocol.messages import (
    Activation,
    Failure,
    Gradient,
    Message,
    ReplyTo,
    Result,
    StepMessage,
    StepVerb,
    Task,
    TensorContent,
    new_request_id,
)
from brokers.protocol.safetensors_codec import from_array
from brokers.protocol.training import LABELS_TENSOR, MICRO_BATCH_KEY, SOURCES_LIMIT, MicroBatch, SourceProgress
from sources.datasets.dataset import Dataset
from sources.training import training_loop
from sources.training.two_phase_step import StepFailed
from stages.training.checkpoints import Checkpoint
from tests.support.brokers.channel_ends import MessageRecorder
from tests.support.brokers.in_memory import MemoryTransport
from tests.support.errors import raises_error
from tests.support.training.in_process_parts import assert_bitwise_equal
from tests.support.training.in_process_pipeline import (
    InProcessPipeline,
    InProcessSource,
    run_with_pipeline,
    shorten_intervals,
)
from tests.support.training.striped_images import ExtraClassImages, StripedImages

STEPS = 8  # of a run: 2 epochs of 96 rows in batches of 24
FOREIGN_INBOX = "foreign/inbox"


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_intervals(monkeypatch)


async def assert_weights(pipeline: InProcessPipeline, source: InProcessSource, steps: int = STEPS) -> None:
    """Assert that the weights are those of the unsplit network after so many steps of the source."""
    expected = pipeline.train_unsplit([source.name] * steps, {source.name: source.dataset})
    assert_bitwise_equal(await pipeline.weights(source), expected)


def abort_message(pipeline: InProcessPipeline) -> StepMessage:
    """The message of a source that aborts its step."""
    details = {"reason": "a test"}
    return StepMessage(request_id=new_request_id(), verb="abort", term=pipeline.active_worker(0).term, details=details)


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


# Stale, hostile and duplicate messages --------------------------------------------------------------------------------


async def open_foreign_client(pipeline: InProcessPipeline) -> tuple[MessageChannel, MessageRecorder]:
    channel = MessageChannel(MemoryTransport(pipeline.hub))
    recorder = MessageRecorder()
    await channel.open()
    await channel.subscribe(FOREIGN_INBOX, recorder.on_message, recorder.on_malformed)
    return channel, recorder


def foreign_task(term: int, micro_batch: str = "", **change: Any) -> Task:
    """A task of one row, for a micro-batch with these changes, or with this text in its place."""
    fields = {"step": new_request_id().hex(), "index": 0, "count": 1, "rows": 1, "number": 0, "seed": 0, **change}
    text = micro_batch or MicroBatch(term=term, **fields).to_json()
    tensors = {"input": from_array(StripedImages().train().inputs[:1])}
    content = TensorContent(tensors, {MICRO_BATCH_KEY: text})
    return Task(
        request_id=new_request_id(), content=content, reply_to=ReplyTo(FOREIGN_INBOX), sender_inbox=FOREIGN_INBOX
    )


def step_message(verb: StepVerb, term: int, **details: Any) -> StepMessage:
    return StepMessage(request_id=new_request_id(), verb=verb, term=term, details=details)


def foreign_messages(term: int) -> list[Message]:
    """Messages that no worker may act on."""
    content = TensorContent({})
    verbs: tuple[StepVerb, ...] = ("commit", "quiesce", "restore", "prepared", "abort", "quiesced", "restored")
    messages: list[Message] = [
        Gradient(request_id=new_request_id(), content=content, sender_inbox=FOREIGN_INBOX),
        foreign_task(term - 1),
        *(replace(step_message(verb, term - 1), sender_inbox=FOREIGN_INBOX) for verb in verbs),
        replace(step_message("commit", term), sender_inbox=FOREIGN_INBOX),
        *(step_message("quiesce", term + 1, members=members) for members in (7, ["s0"], None)),
        step_message("restore", term),
        Failure(request_id=new_request_id(), stage="s", worker="w", error="E", reason="r"),
        Result(request_id=new_request_id(), content=content),
    ]
    versions: tuple[Any, ...] = ("x", None, [], -1, 7)
    for version in versions:
        messages.append(step_message("restore", term, version=version, restored_term=0))
        messages.append(step_message("fetch_weights", term, version=version))
    return messages


def test_stale_and_foreign_messages_change_nothing(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        channel, recorder = await open_foreign_client(pipeline)
        source = await pipeline.add_source()
        running = asyncio.create_task(source.training.run())
        await pipeline.wait_for_step(source, 1)
        gradients = [message for _, message in pipeline.messages if isinstance(message, Gradient)][:3]
        for worker in pipeline.workers:
            for gradient in gradients:  # again, and to the wrong workers
                await channel.send(worker.inbox, replace(gradient, sender_inbox=FOREIGN_INBOX))
            for message in foreign_messages(pipeline.workers[0].term):
                await channel.send(worker.inbox, message)
        await running
        assert all(worker.is_running for worker in pipeline.workers)
        await assert_weights(pipeline, source)
        assert pipeline.sources_by_version() == ["source"] * STEPS
        failures = set()
        while not recorder.messages.empty():
            failure = recorder.messages.get_nowait()
            if isinstance(failure, Failure):
                failures.add((failure.error, failure.retry))
        assert failures == {("UnknownForward", False), ("StaleTerm", True), ("BadStep", False)}
        await channel.close()

    run_with_pipeline(tmp_path, test)


def test_task_that_is_not_a_micro_batch_is_refused(tmp_path: Path) -> None:
    valid = MicroBatch(step="a" * 32, term=0, index=0, count=1, rows=1, number=0, seed=0).to_json()
    hostile = ("null", "[]", "{}", valid.replace("a" * 32, "z" * 32), valid.replace('"count":1', '"count":"1"'))

    async def test(pipeline: InProcessPipeline) -> None:
        channel, recorder = await open_foreign_client(pipeline)
        source = await pipeline.add_source()
        for worker in pipeline.workers:
            for text in hostile:
                await channel.send(worker.inbox, foreign_task(0, text))
                failure = await recorder.next_message()
                assert isinstance(failure, Failure)
                assert (failure.error, failure.retry) == ("BadProperty", False)
                assert MICRO_BATCH_KEY in failure.reason
        await source.training.run()
        assert {worker.worker.counters["malformed"] for worker in pipeline.workers} == {len(hostile)}
        await channel.close()

    run_with_pipeline(tmp_path, test, epochs=1)


def test_step_that_is_not_the_next_of_its_source_is_refused(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        channel, recorder = await open_foreign_client(pipeline)
        await pipeline.train()
        head = pipeline.active_worker(0)
        task = replace(foreign_task(head.term, number=5), source="source")
        await channel.send(head.inbox, task)
        failure = await recorder.next_message()
        assert isinstance(failure, Failure)
        assert (failure.error, failure.retry) == ("StaleStep", True)
        assert failure.reason == "the next step of source 'source' is 4 (from 0), not 5"
        assert head.version == 4
        await channel.close()

    run_with_pipeline(tmp_path, test, epochs=1)


def test_duplicate_messages_change_nothing(tmp_path: Path) -> None:
    """Every message to a stage arrives twice, as it may over a bridge that was disconnected."""

    async def test(pipeline: InProcessPipeline) -> None:
        channel, _ = await open_foreign_client(pipeline)
        sends: set[asyncio.Task[None]] = set()
        seen: set[tuple[str, bytes, type[Message], object]] = set()

        def send_again(topic: str, message: Message) -> None:
            key = (topic, message.request_id, type(message), getattr(message, "verb", None))
            if topic.split("/")[-2] == "in" and key not in seen and not isinstance(message, Failure):
                seen.add(key)
                send = asyncio.create_task(channel.send(topic, message))
                sends.add(send)
                send.add_done_callback(sends.discard)

        pipeline.on_message = send_again
        source = await pipeline.train()
        await assert_weights(pipeline, source)
        assert pipeline.sources_by_version() == ["source"] * STEPS
        assert pipeline.saved_activations == 0
        await asyncio.gather(*sends)
        await channel.close()

    run_with_pipeline(tmp_path, test)


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


# Errors that end a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "training", "message"),
    [
        (ExtraClassImages(count=24), {}, r"step 0 failed at stage 's2', worker 'w2-2': BadLabels: label 4 .*4 classes"),
        (StripedImages(), {"lr": 1e38}, r"step [12] failed at stage 's2', .*: NotFinite: .*a lower learning rate"),
    ],
    ids=["labels", "loss"],
)
def test_failed_step_names_its_stage(tmp_path: Path, dataset: Dataset, training: dict[str, Any], message: str) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        with pytest.raises(StepFailed, match=message) as caught:
            await pipeline.train(dataset=dataset)
        assert "\n" not in str(caught.value)
        assert all(worker.is_running for worker in pipeline.workers)
        await pipeline.wait_for("the saved forwards to be discarded", lambda: pipeline.saved_activations == 0)

    run_with_pipeline(tmp_path, test, **training)


def test_weights_that_are_not_finite_are_rolled_back(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        await pipeline.train()

        def break_weights(event: Any) -> None:
            for parameter in pipeline.workers[1].part_trainer._part.parameters():
                parameter.data.fill_(float("inf"))

        pipeline.on_event = break_weights
        other = await pipeline.add_source("other", StripedImages(seed=1))
        with pytest.raises(StepFailed, match=r"step 1 failed at stage 's2', .*: NotFinite: the loss is nan"):
            await other.training.run()
        await pipeline.wait_for("the rollback", lambda: {worker.version for worker in pipeline.workers} == {4})
        await pipeline.wait_for("a term", lambda: other.training.membership.term)
        term = other.training.membership.term
        assert term is not None
        assert "parameter 'second.weight' is not finite" in term.term_reason
        expected = pipeline.train_unsplit(["source"] * 4, {"source": StripedImages()})
        assert_bitwise_equal(await pipeline.weights(other), expected)

    run_with_pipeline(tmp_path, test, epochs=1)


def test_missing_stage_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop, "MEMBERS_WAIT_S", 0.5)

    async def test(pipeline: InProcessPipeline) -> None:
        with raises_error(RequestError, "StagesMissing"):
            await pipeline.train()

    run_with_pipeline(tmp_path, test, 0, 2)


def test_source_of_a_used_name_must_resume(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        await pipeline.train()
        with raises_error(UsageError, "AlreadyTrained"):
            await pipeline.train()
        resumed = await pipeline.train(resume=True)
        assert resumed.events_of_kind("step") == []
        assert resumed.completed_steps == STEPS
        assert len(resumed.events_of_kind("resumed")) == 1
        other = await pipeline.train("another")
        assert len(other.events_of_kind("step")) == STEPS
        assert pipeline.sources_by_version() == ["source"] * STEPS + ["another"] * STEPS

    run_with_pipeline(tmp_path, test)


def test_source_cannot_resume_with_other_settings_or_data(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        await pipeline.train()
        file = pipeline.file
        table = file.training.model_copy(update={"batch": 12, "lr": 0.5})
        pipeline.file = file.model_copy(update={"training": table})
        with raises_error(UsageError, "SettingsChanged", match=r"batch was 24, is 12; lr was 0\.05, is 0\.5"):
            await pipeline.train(resume=True)
        pipeline.file = file
        with raises_error(UsageError, "SettingsChanged", match=r"rows was 96, is 120"):
            await pipeline.train(dataset=StripedImages(count=120), resume=True)
        settings = {"noise": 2, "colours": ["red"]}
        source = file.source.model_copy(update={"settings": settings})
        pipeline.file = file.model_copy(update={"source": source})
        changed = r"""source\.settings was '{}', is '{"colours": \["red"\], "noise": 2}'"""
        with raises_error(UsageError, "SettingsChanged", match=changed):
            await pipeline.train(resume=True)

    run_with_pipeline(tmp_path, test, epochs=1)


def test_source_of_other_stages_cannot_train(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        file = InProcessPipeline(tmp_path, cuts=(4,)).file
        stages = [
            stage.model_copy(update={"name": name}) for stage, name in zip(file.stage, ("s0", "end"), strict=True)
        ]
        pipeline.file = file.model_copy(update={"stage": stages})
        with raises_error(
            RequestError, "CannotTrain", match="its stages are s0, s1, s2, this file has s0, end"
        ) as caught:
            await pipeline.train()
        assert "\n" not in str(caught.value)

    run_with_pipeline(tmp_path, test)


def test_step_that_is_aborted_repeatedly_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_loop, "MAX_CONSECUTIVE_TERMS", 3)

    async def test(pipeline: InProcessPipeline) -> None:
        def refuse(task: Task, micro_batch: MicroBatch) -> None:
            raise WireError("Busy", "the queue is full", retry=True)

        pipeline.workers[1].worker.step_queue.add_task = refuse  # type: ignore[method-assign]
        with raises_error(RequestError, "CannotTrain", match=r"step 0 was aborted 3 times: Busy at stage s1"):
            await pipeline.train()
        terms = [
            message.term
            for _, message in pipeline.messages
            if isinstance(message, StepMessage) and message.verb == "quiesce"
        ]
        assert terms == sorted(terms)
        assert len(set(terms)) == 4  # the first one, and one after each abort

    run_with_pipeline(tmp_path, test)


def test_lost_checkpoint_folder_is_an_error_and_rolls_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_loop, "PROBLEM_WAIT_S", 0.3)

    async def test(pipeline: InProcessPipeline) -> None:
        await pipeline.train()
        await pipeline.replace_worker(1, tmp_path / "elsewhere")
        message = r"stage 's0' has checkpoints of 4 and 8, stage 's1' has none"
        with raises_error(RequestError, "CannotTrain", match=message) as caught:
            await pipeline.train(resume=True)
        assert "\n" not in str(caught.value)
        assert pipeline.workers[0].versions == (4, 8)
        assert pipeline.workers[0].version == 8

    run_with_pipeline(tmp_path, test)


def test_run_resumes_after_a_full_disk(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        checkpoints = pipeline.workers[1].executor.checkpoints
        save = checkpoints.save

        def fail(checkpoint: Any) -> None:
            raise SparseError("CannotCheckpoint", "the disk is full")

        checkpoints.save = fail  # type: ignore[method-assign]
        with pytest.raises(StepFailed, match=r"step 3 failed at stage 's1', worker .*: CannotCheckpoint: .*full"):
            await pipeline.train()
        checkpoints.save = save  # type: ignore[method-assign]
        await pipeline.wait_for("a term", lambda: pipeline.sources[0].training.membership.term)
        source = await pipeline.train(resume=True)
        await assert_weights(pipeline, source)

    run_with_pipeline(tmp_path, test)


def test_number_of_sources_is_limited(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        for worker in pipeline.workers:
            worker.executor.progress = {f"s-{index}": SourceProgress(steps=1) for index in range(SOURCES_LIMIT)}
        with pytest.raises(StepFailed, match=r"TooManySources: 64 sources have trained this pipeline"):
            await pipeline.train()
        assert all(worker.is_running for worker in pipeline.workers)

    run_with_pipeline(tmp_path, test)


# A kill, a freeze or a disconnection at an unfavourable moment --------------------------------------------------------


def test_memory_of_a_rolled_back_term_is_not_a_version(tmp_path: Path) -> None:
    async def test(pipeline: InProcessPipeline) -> None:
        source = await pipeline.train()
        frozen = pipeline.active_worker(1)
        frozen.executor.restored_term -= 1  # the others have rolled back since, and trained up to this number again
        with torch.no_grad():
            for parameter in frozen.part_trainer._part.parameters():
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
