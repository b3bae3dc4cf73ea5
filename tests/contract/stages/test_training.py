"""A pipeline that trains, from its sources to its last stage, over one hub: whatever happens, the weights are right."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from brokers.errors import Disconnected, RequestError, SparseError, UsageError, WireError
from brokers.protocol.messages import (
    Activation,
    Failure,
    Gradient,
    Message,
    ReplyTo,
    Result,
    StepMessage,
    Task,
    TensorContent,
    new_request_id,
)
from brokers.protocol.safetensors_codec import from_array
from brokers.protocol.training import LABELS_TENSOR, MICRO_BATCH_KEY, SOURCES_LIMIT, MicroBatch, SourceProgress
from sources.datasets.dataset import Dataset
from sources.training import training_loop as training_module
from sources.training.two_phase_step import StepFailed
from stages.training.checkpoints import Checkpoint
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.channel_ends import MessageRecorder
from tests.support.errors import raises_error
from tests.support.training.in_process_parts import assert_bitwise_equal
from tests.support.training.in_process_pipeline import (
    InProcessPipeline,
    InProcessSource,
    InProcessWorker,
    kill_client,
    shorten_intervals,
)
from tests.support.training.striped_images import ExtraClassImages, StripedImages

STEPS = 8  # of a whole run: 2 epochs of 96 rows in batches of 24
Lesson = Callable[[InProcessPipeline], Awaitable[None]]


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_intervals(monkeypatch)


def lesson(folder: Path, test: Lesson, *stages: int, **training: Any) -> InProcessPipeline:
    """Run a test in a classroom whose stages all have a worker."""
    room = InProcessPipeline(folder, **training)

    async def whole() -> None:
        await room.start(*stages)
        try:
            await test(room)
        finally:
            await room.close()

    run_async(whole())
    return room


# Equal to the plain loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("cuts", [(), (5,), (4, 9), (1, 3, 6, 8)], ids=len)
def test_a_run_ends_with_the_weights_of_the_plain_loop(tmp_path: Path, cuts: tuple[int, ...], schedule: str) -> None:
    async def test(room: InProcessPipeline) -> None:
        room.on_event = lambda event: saved.append(room.saved_activations)
        pupil = await room.train()
        assert pupil.training.completed_steps == STEPS
        assert [event["version"] for event in pupil.events_of_kind("step")] == list(range(1, STEPS + 1))
        expected = room.train_unsplit(["pupil"] * STEPS, {"pupil": StripedImages()})
        assert_bitwise_equal(await room.weights(pupil), expected)
        assert room.sources_by_version() == ["pupil"] * STEPS
        assert all(worker.trainer.counters == {} for worker in room.workers)

    saved: list[int] = []
    lesson(tmp_path, test, cuts=cuts, schedule=schedule)
    assert saved == [0] * STEPS


def test_a_batch_that_does_not_divide_is_learned_as_it_is(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        pupil = await room.train(dataset=StripedImages(count=31))
        assert [event["rows"] for event in pupil.events_of_kind("step")] == [24, 7, 24, 7]
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * 4, {"it": StripedImages(count=31)}))

    lesson(tmp_path, test, micro_batches=5)


@pytest.mark.parametrize("cuts", [(), (5,), (4, 9)], ids=len)
def test_labels_that_stay_go_to_the_last_stage_and_nowhere_else(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    def seen(topic: str, message: Message) -> None:
        content = getattr(message, "content", None)
        if isinstance(content, TensorContent) and LABELS_TENSOR in content.tensors:
            readers.add(topic.rpartition("/")[0])

    async def test(room: InProcessPipeline) -> None:
        room.on_message = seen
        pupil = await room.train()
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))
        assert pupil.events_of_kind("evaluation")

    readers: set[str] = set()
    lesson(tmp_path, test, cuts=cuts, labels="stay", evaluate_every=1)
    assert readers == {f"sparse/local/lesson/s{len(cuts)}/in"}


def test_labels_that_travel_pass_every_stage(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        await room.train()
        topics = {
            topic.split("/")[3]
            for topic, message in room.messages
            if isinstance(message, Task)
            and isinstance(message.content, TensorContent)
            and LABELS_TENSOR in message.content.tensors
        }
        assert topics == {"s0", "s1", "s2"}

    lesson(tmp_path, test, epochs=1)


def test_an_evaluation_changes_nothing(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        pupil = await room.train()
        evaluations = pupil.events_of_kind("evaluation")
        assert [event["step"] for event in evaluations] == [4, 8]
        assert {event["rows"] for event in evaluations} == {32}
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))

    lesson(tmp_path, test, evaluate_every=1)


# Many sources ---------------------------------------------------------------------------------------------------------


def test_two_sources_at_once_give_one_of_the_serial_orders(tmp_path: Path) -> None:
    datasets: dict[str, Dataset] = {"one": StripedImages(seed=1), "other": StripedImages(seed=2)}

    async def test(room: InProcessPipeline) -> None:
        pupils = [await room.add_source(name, dataset) for name, dataset in datasets.items()]
        await asyncio.gather(*(pupil.training.run() for pupil in pupils))
        order = room.sources_by_version()
        assert len(order) == 2 * STEPS
        assert [order.count(name) for name in datasets] == [STEPS, STEPS]
        assert order not in (sorted(order), sorted(order, reverse=True))  # they have taken turns
        assert room.active_worker(0).part_trainer.version == 2 * STEPS
        for pupil in pupils:
            version = pupil.events_of_kind("step")[-1]["version"]
            assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(order[:version], datasets))

    lesson(tmp_path, test)


def test_who_ends_first_gets_the_weights_of_its_last_step_while_another_goes_on(tmp_path: Path) -> None:
    datasets: dict[str, Dataset] = {"one": StripedImages(seed=1, count=48), "other": StripedImages(seed=2, count=960)}

    async def test(room: InProcessPipeline) -> None:
        short, long = [await room.add_source(name, dataset) for name, dataset in datasets.items()]
        running = asyncio.create_task(long.training.run())
        await short.training.run()
        version = short.events_of_kind("step")[-1]["version"]
        await room.wait_for(
            "more steps of the other", lambda: (room.active_worker(0).part_trainer.version or 0) > version + 2
        )
        found = await room.weights(short)  # of a version that was: from disk
        assert not running.done()
        assert_bitwise_equal(found, room.train_unsplit(room.sources_by_version()[:version], datasets))
        short.training._version = 1  # which is on no disk any more: what there is now, then, but all of one version
        found = await room.weights(short)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        version = int(found["norm.num_batches_tracked"]) // 3
        assert version > 4
        assert_bitwise_equal(found, room.train_unsplit(room.sources_by_version()[:version], datasets))

    lesson(tmp_path, test, checkpoint_every=20)


def test_a_source_that_dies_in_the_middle_of_a_step_holds_up_nobody(tmp_path: Path) -> None:
    datasets: dict[str, Dataset] = {"one": StripedImages(seed=1), "other": StripedImages(seed=2)}

    async def test(room: InProcessPipeline) -> None:
        one, other = [await room.add_source(name, dataset) for name, dataset in datasets.items()]
        dying = asyncio.create_task(one.training.run())

        def at_its_third_step(topic: str, message: Message) -> None:
            if (
                one.training.completed_steps >= 2
                and isinstance(message, Activation)
                and message.source == "one"
                and not dead
            ):
                dead.append(one.name)
                kill_client(room.hub, one.transport)

        room.on_message = at_its_third_step
        await other.training.run()
        assert dead
        order = room.sources_by_version()
        assert order.count("other") == STEPS
        assert 2 <= order.count("one") < STEPS
        assert room.saved_activations == 0
        assert_bitwise_equal(await room.weights(other), room.train_unsplit(order, datasets))
        assert any("one" in event["why"] for event in other.events_of_kind("rolled_back"))
        await one.transport.close()
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)

    dead: list[str] = []
    lesson(tmp_path, test)


def test_a_source_that_was_killed_goes_on_from_where_the_pipeline_is(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        first = await room.add_source()
        running = asyncio.create_task(first.training.run())
        await room.wait_for("two steps", lambda: first.training.completed_steps >= 3)
        kill_client(room.hub, first.transport)
        await first.transport.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        second = await room.train(resume=True)  # at once: the record of the pipeline may be a step behind
        assert second.training.completed_steps == STEPS
        assert_bitwise_equal(await room.weights(second), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))
        assert room.sources_by_version() == ["pupil"] * STEPS

    lesson(tmp_path, test)


# Late, twice, to the wrong worker -------------------------------------------------------------------------------------


async def stranger(room: InProcessPipeline) -> tuple[Any, MessageRecorder]:
    """Somebody who says what nobody asked for."""
    from brokers.dispatch.channel import MessageChannel
    from brokers.mqtt.in_memory import MemoryTransport

    line, ear = MessageChannel(MemoryTransport(room.hub)), MessageRecorder()
    await line.open()
    await line.subscribe("stranger/inbox", ear.on_message, ear.on_malformed)
    return line, ear


def foreign(term: int, **change: Any) -> Task:
    fields = {"step": new_request_id().hex(), "index": 0, "count": 1, "rows": 1, "number": 0, "seed": 0, **change}
    micro = MicroBatch(term=term, **fields)
    body = TensorContent({"input": from_array(StripedImages().train().inputs[:1])}, {MICRO_BATCH_KEY: micro.to_json()})
    return Task(
        request_id=new_request_id(), content=body, reply_to=ReplyTo("stranger/inbox"), sender_inbox="stranger/inbox"
    )


def test_what_is_stale_or_foreign_changes_no_weight_and_is_told_by_its_own_error(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        line, ear = await stranger(room)
        gradients: list[tuple[str, Gradient]] = []
        room.on_message = lambda topic, message: (
            gradients.append((topic, message)) if isinstance(message, Gradient) else None
        )
        pupil = await room.add_source()
        running = asyncio.create_task(pupil.training.run())
        await room.wait_for("a step", lambda: pupil.training.completed_steps >= 1)
        inboxes = [worker.trainer.inbox for worker in room.workers]
        term = room.workers[0].trainer.step_queue.term
        nothing = TensorContent({})
        for inbox in inboxes:
            for topic, gradient in gradients[:3]:  # of former steps: to the right worker again, and to the wrong ones
                assert topic in inboxes
                late = Gradient(request_id=gradient.request_id, content=gradient.content, sender_inbox="stranger/inbox")
                await line.send(inbox, late)
            await line.send(
                inbox, Gradient(request_id=new_request_id(), content=nothing, sender_inbox="stranger/inbox")
            )
            await line.send(inbox, foreign(term - 1))
            for verb in ("commit", "quiesce", "restore", "prepared", "abort", "quiesced", "restored"):
                word = StepMessage(request_id=new_request_id(), verb=verb, term=term - 1, sender_inbox="stranger/inbox")
                await line.send(inbox, word)
            await line.send(
                inbox, StepMessage(request_id=new_request_id(), verb="commit", term=term, sender_inbox="stranger/inbox")
            )
            for crew in (7, ["s0"], None):
                word = StepMessage(
                    request_id=new_request_id(), verb="quiesce", term=term + 1, details={"members": crew}
                )
                await line.send(inbox, word)
            version: Any
            for version in ("x", None, [], -1, 7):
                details = {"version": version, "restored_term": 0}
                word = StepMessage(request_id=new_request_id(), verb="restore", term=term, details=details)
                await line.send(inbox, word)
                word = StepMessage(
                    request_id=new_request_id(), verb="fetch_weights", term=term, details={"version": version}
                )
                await line.send(inbox, word)
            await line.send(inbox, StepMessage(request_id=new_request_id(), verb="restore", term=term))
            await line.send(inbox, Failure(request_id=new_request_id(), stage="s", worker="w", error="E", reason="r"))
            await line.send(inbox, Result(request_id=new_request_id(), content=nothing))
        await running
        assert all(worker.is_running for worker in room.workers)
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))
        assert room.sources_by_version() == ["pupil"] * STEPS
        told = set()
        while not ear.messages.empty():
            failure = ear.messages.get_nowait()
            if isinstance(failure, Failure):
                told.add((failure.error, failure.retry))
        assert told == {("UnknownForward", False), ("StaleTerm", True), ("BadStep", False)}
        await line.close()

    lesson(tmp_path, test)


WHOLE = MicroBatch(step="a" * 32, term=0, index=0, count=1, rows=1, number=0, seed=0).to_json()
HOSTILE_MICROS = ("", "null", "[]", "{}", WHOLE.replace("a" * 32, "z" * 32), WHOLE.replace('"count":1', '"count":"1"'))


@pytest.mark.parametrize("text", HOSTILE_MICROS)
def test_a_task_that_is_no_micro_batch_is_refused_and_the_worker_lives(tmp_path: Path, text: str) -> None:
    async def test(room: InProcessPipeline) -> None:
        line, ear = await stranger(room)
        pupil = await room.add_source()
        task = foreign(0)
        sent = Task(
            request_id=task.request_id,
            content=TensorContent(
                task.content.tensors if isinstance(task.content, TensorContent) else {}, {MICRO_BATCH_KEY: text}
            ),
            reply_to=task.reply_to,
            sender_inbox=task.sender_inbox,
        )
        for worker in room.workers:
            await line.send(worker.trainer.inbox, sent)
            failure = await ear.next_message()
            assert isinstance(failure, Failure)
            assert failure.error == "BadProperty"
            assert MICRO_BATCH_KEY in failure.reason
        await pupil.training.run()
        assert all(worker.trainer.counters["malformed"] == 1 for worker in room.workers)
        await line.close()

    lesson(tmp_path, test, epochs=1)


@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_step_that_is_not_the_next_one_of_its_source_is_refused_and_may_be_tried_again(
    tmp_path: Path, number: int
) -> None:
    async def test(room: InProcessPipeline) -> None:
        line, ear = await stranger(room)
        await room.train()
        head = room.active_worker(0)
        late = foreign(head.trainer.step_queue.term, number=number)
        task = Task(
            request_id=late.request_id,
            content=late.content,
            reply_to=late.reply_to,
            sender_inbox=late.sender_inbox,
            source="pupil",
        )
        await line.send(head.trainer.inbox, task)
        failure = await ear.next_message()
        assert isinstance(failure, Failure)
        assert (failure.error, failure.retry) == ("StaleStep", True)
        assert failure.reason == f"the next step of source 'pupil' is 4 (from 0), not {number}"
        assert head.part_trainer.version == 4
        await line.close()

    lesson(tmp_path, test, epochs=1)


def test_messages_that_come_twice_change_nothing(tmp_path: Path) -> None:
    """Each message of a stage comes to it a second time, as a bridge may do that lost its connection."""

    async def test(room: InProcessPipeline) -> None:
        line, _ = await stranger(room)
        tasks: set[asyncio.Task[None]] = set()
        seen: set[tuple[str, bytes, type[Message], object]] = set()

        def again(topic: str, message: Message) -> None:
            key = (topic, message.request_id, type(message), getattr(message, "verb", None))
            if topic.split("/")[-2] == "in" and key not in seen and not isinstance(message, Failure):
                seen.add(key)
                task = asyncio.create_task(line.send(topic, message))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

        room.on_message = again
        pupil = await room.train()
        assert pupil.training.completed_steps == STEPS
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))
        assert room.sources_by_version() == ["pupil"] * STEPS
        assert room.saved_activations == 0
        await asyncio.gather(*tasks)
        await line.close()

    lesson(tmp_path, test)


# Workers that die -----------------------------------------------------------------------------------------------------


async def replace(room: InProcessPipeline, stage: int) -> InProcessWorker:
    """Kill the worker that trains a stage, and start another where its checkpoints are."""
    dead = room.active_worker(stage)
    dead.kill()
    await dead.close()
    room.workers.remove(dead)
    return await room.add_worker(stage, name=f"new{stage}-{len(room.messages)}")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_worker_that_dies_is_replaced_and_the_result_is_that_of_the_undisturbed_run(
    tmp_path: Path, stage: int
) -> None:
    async def test(room: InProcessPipeline) -> None:
        pupil = await room.add_source()
        running = asyncio.create_task(pupil.training.run())
        for step in (2, 6, 9):
            await room.wait_for_step(pupil, step)
            await replace(room, stage)
        await running
        assert pupil.training.completed_steps == 12
        assert len(pupil.events_of_kind("rolled_back")) >= 3
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * 12, {"it": StripedImages()}))
        assert room.saved_activations == 0

    lesson(tmp_path, test, epochs=3)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_standby_takes_over_at_once(tmp_path: Path, stage: int) -> None:
    async def test(room: InProcessPipeline) -> None:
        await room.add_worker(stage, name="zz-standby")
        pupil = await room.add_source()
        running = asyncio.create_task(pupil.training.run())
        await room.wait_for("a step", lambda: pupil.training.completed_steps >= 5)
        first = room.active_worker(stage)
        assert first.trainer.worker != "zz-standby"
        first.kill()
        await running
        assert room.members[f"s{stage}"] == "zz-standby"
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))
        (back,) = pupil.events_of_kind("rolled_back")
        assert back["waited_ms"] < 5000

    lesson(tmp_path, test)


def test_a_standby_never_trains_while_another_does(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        spare = await room.add_worker(1, name="a-standby")  # the first by name, and yet a newcomer
        first = room.workers[1]
        pupil = await room.train()
        others = {worker.trainer.worker: worker.part_trainer.version for worker in (spare, first)}
        assert sorted(others.values()) == [0, STEPS]  # type: ignore[type-var]
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))

    lesson(tmp_path, test)


def test_a_worker_that_drains_leaves_its_version_behind(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        pupil = await room.add_source()
        running = asyncio.create_task(pupil.training.run())
        await room.wait_for("a step", lambda: pupil.training.completed_steps >= 2)
        leaving = room.active_worker(1)
        await leaving.drain()
        assert leaving.part_trainer.version in leaving.trainer.executor.checkpoints.versions
        await room.add_worker(1, name="successor")
        await running
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * 12, {"it": StripedImages()}))

    lesson(tmp_path, test, epochs=3)


def test_a_hub_that_restarts_costs_no_step(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        pupil = await room.add_source()
        running = asyncio.create_task(pupil.training.run())
        await room.wait_for("a step", lambda: pupil.training.completed_steps >= 2)
        room.hub.stop()
        await asyncio.sleep(0.2)
        room.hub.start()
        await running
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * 12, {"it": StripedImages()}))

    lesson(tmp_path, test, epochs=3)


def test_saved_forwards_are_none_after_every_abort(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        saved: list[int] = []

        def restored(topic: str, message: Message) -> None:
            if isinstance(message, StepMessage) and message.verb == "quiesced":
                saved.append(message.details["status"]["pending_forwards"])

        room.on_message = restored
        pupil = await room.add_source()
        running = asyncio.create_task(pupil.training.run())
        for step in (1, 3, 5):
            await room.wait_for_step(pupil, step)
            await room.wait_for_messages()
            await give_up(room, pupil)
        await running
        assert len(saved) >= 3 * 4
        assert set(saved) == {0}
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))

    lesson(tmp_path, test)


async def give_up(room: InProcessPipeline, pupil: InProcessSource) -> None:
    """Have the source give up its step, as it does when it hears nothing."""
    crew = pupil.training.membership.term
    assert crew is not None
    word = StepMessage(request_id=new_request_id(), verb="abort", term=crew.term, details={"why": "a test"})
    await pupil.channel.send(pupil.training.membership.coordinator_inbox(crew), word)


# What ends a run ------------------------------------------------------------------------------------------------------


def fails(
    folder: Path, error: type[Exception], match: str, dataset: Dataset | None = None, **training: Any
) -> InProcessPipeline:
    async def test(room: InProcessPipeline) -> None:
        with pytest.raises(error, match=match) as caught:
            await room.train(dataset=dataset)
        assert "\n" not in str(caught.value)
        assert all(worker.is_running for worker in room.workers)
        await room.wait_for("saved forwards to be let go of", lambda: room.saved_activations == 0)

    return lesson(folder, test, **training)


def test_labels_out_of_range_are_told_with_the_stage_and_the_step(tmp_path: Path) -> None:
    match = r"step 0 failed at stage 's2', worker 'w2-2': BadLabels: label 4 .* the network has 4 classes"
    fails(tmp_path, StepFailed, match, ExtraClassImages(count=24))


def test_a_loss_that_is_no_number_is_told_with_the_stage_the_step_and_what_to_try(tmp_path: Path) -> None:
    match = r"step [12] failed at stage 's2', .*: NotFinite: .*try a lower learning rate"
    fails(tmp_path, StepFailed, match, lr=1e38)


def test_weights_that_are_no_numbers_any_more_are_in_no_checkpoint_and_all_go_back_to_the_last_one(
    tmp_path: Path,
) -> None:
    async def test(room: InProcessPipeline) -> None:
        await room.train()

        def burst(event: Any) -> None:
            for parameter in room.workers[1].part_trainer._part.parameters():
                parameter.data.fill_(float("inf"))

        room.on_event = burst
        other = await room.add_source("other", StripedImages(seed=1))
        with pytest.raises(StepFailed, match=r"step 1 failed at stage 's2', .*: NotFinite: the loss is nan"):
            await other.training.run()
        await room.wait_for("the way back", lambda: [each.part_trainer.version for each in room.workers] == [4, 4, 4])
        await room.wait_for("a crew", lambda: other.training.membership.term)
        crew = other.training.membership.term
        assert crew is not None
        assert "parameter 'second.weight' is not finite" in crew.term_reason
        assert_bitwise_equal(await room.weights(other), room.train_unsplit(["it"] * 4, {"it": StripedImages()}))

    lesson(tmp_path, test, epochs=1)


def test_nobody_trains_is_told_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "MEMBERS_WAIT_S", 0.5)

    async def test(room: InProcessPipeline) -> None:
        with raises_error(
            RequestError, "StagesMissing", match=r"not all up within 0\.5 s: `sparse status` shows which are"
        ):
            await room.train()

    lesson(tmp_path, test, 0, 2)


def test_a_second_run_of_the_same_name_goes_on_only_where_it_is_told_to(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        await room.train()
        with raises_error(UsageError, "AlreadyTrained", match=r"'pupil' has trained \d steps .* --resume"):
            await room.train()
        again = await room.train(resume=True)
        assert again.events_of_kind("step") == []
        assert again.training.completed_steps == STEPS
        assert len(again.events_of_kind("resumed")) == 1
        other = await room.train("another")  # with another name it has done nothing yet
        assert len(other.events_of_kind("step")) == STEPS
        assert room.sources_by_version() == ["pupil"] * STEPS + ["another"] * STEPS

    lesson(tmp_path, test)


def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        await room.train()
        before = room.pipeline
        change = {"batch": 12, "lr": 0.5}
        table = before.training.model_copy(update=change)
        room.pipeline = before.model_copy(update={"training": table})
        with raises_error(UsageError, "SettingsChanged", match=r"batch was 24, is 12; lr was 0\.05, is 0\.5"):
            await room.train(resume=True)

    lesson(tmp_path, test)


def test_a_step_that_is_given_up_again_and_again_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "MAX_CONSECUTIVE_TERMS", 3)

    async def test(room: InProcessPipeline) -> None:
        def refuse(task: Task, micro_batch: MicroBatch) -> None:
            raise WireError("Busy", "the queue is full", retry=True)

        room.workers[1].trainer.step_queue.add_task = refuse  # type: ignore[method-assign]
        with raises_error(RequestError, "CannotTrain", match=r"step 0 was aborted 3 times: Busy at stage s1"):
            await room.train()
        assert len({event["version"] for event in room.sources[0].events}) <= 1
        halts = [
            message for _, message in room.messages if isinstance(message, StepMessage) and message.verb == "quiesce"
        ]
        terms = [word.term for word in halts]
        assert terms == sorted(terms)
        assert len(set(terms)) == 4  # the beginning, and one for each time that it was given up

    lesson(tmp_path, test)


def test_a_lost_folder_of_checkpoints_is_told_and_nothing_is_rolled_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_module, "PROBLEM_WAIT_S", 0.3)

    async def test(room: InProcessPipeline) -> None:
        await room.train()
        dead = room.active_worker(1)
        dead.kill()
        await dead.close()
        room.workers.remove(dead)
        await room.add_worker(1, name="lost", folder=tmp_path / "elsewhere")
        with raises_error(
            RequestError, "CannotTrain", match=r"stage 's0' has checkpoints of 4 and 8, stage 's1' has none"
        ) as caught:
            await room.train(resume=True)
        assert "\n" not in str(caught.value)
        assert room.workers[0].trainer.executor.checkpoints.versions == (4, 8)
        assert room.workers[0].part_trainer.version == 8

    lesson(tmp_path, test)


def test_a_full_disk_is_told_and_the_run_goes_on_from_the_last_version_when_there_is_room(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        checkpoints = room.workers[1].trainer.executor.checkpoints
        save = checkpoints.save

        def full(checkpoint: Any) -> None:
            raise SparseError("CannotCheckpoint", "cannot write a/b: the disk is full")

        checkpoints.save = full  # type: ignore[method-assign]
        with pytest.raises(StepFailed, match=r"step 3 failed at stage 's1', worker .*: CannotCheckpoint: .*full"):
            await room.train()
        checkpoints.save = save  # type: ignore[method-assign]
        await room.wait_for("a crew", lambda: room.sources[0].training.membership.term)
        pupil = await room.train(resume=True)
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))

    lesson(tmp_path, test)


def test_one_source_more_than_a_record_can_name_is_told_and_the_workers_live(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        others = {f"source-{index}": SourceProgress(steps=1) for index in range(SOURCES_LIMIT)}
        for worker in room.workers:
            worker.trainer.executor.progress = others
        with pytest.raises(StepFailed, match=r"TooManySources: 64 sources have trained this pipeline"):
            await room.train()
        assert all(worker.is_running for worker in room.workers)

    lesson(tmp_path, test)


# A kill, a freeze or a break at an unlucky moment ---------------------------------------------------------------------


def test_memory_of_a_term_that_was_given_up_is_not_taken_for_the_version_of_the_same_number(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        pupil = await room.train()
        frozen = room.active_worker(1)
        frozen.trainer.executor.restored_term -= (
            1  # the others have been told since, and have done other steps up to this
        )
        with torch.no_grad():
            for parameter in frozen.part_trainer._part.parameters():
                parameter.add_(1.0)
        term = frozen.trainer.step_queue.term
        await replace(room, 2)
        await room.wait_for("another term", lambda: (crew := pupil.training.membership.term) and crew.term > term)
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))

    lesson(tmp_path, test)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_worker_in_whose_place_another_trains_leaves_no_version_behind(tmp_path: Path, stage: int) -> None:
    async def test(room: InProcessPipeline) -> None:
        await room.train()
        former = room.active_worker(stage)
        former.part_trainer.version = 9  # of a step that the others have given up
        former.trainer.stand_by(former.trainer.step_queue.term + 1)
        await former.drain()
        assert former.trainer.executor.checkpoints.versions == (4, 8)

    lesson(tmp_path, test)


@pytest.mark.parametrize("verb", ["task", "commit"])
def test_a_source_that_has_not_heard_that_a_worker_stands_by_tries_its_step_again(
    tmp_path: Path, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(room: InProcessPipeline) -> None:
        pupil = await room.add_source()
        send, left = pupil.channel.send, [room.workers[0]]

        async def send_too_late(topic: str, message: Message) -> None:
            is_last = (
                isinstance(message, StepMessage) and message.verb == "commit" and topic == room.workers[0].trainer.inbox
            )
            if (
                left
                and pupil.training.completed_steps == 2
                and (is_last if verb == "commit" else isinstance(message, Task))
            ):
                former = left.pop()
                former.trainer.stand_by(former.trainer.step_queue.term)
                await room.wait_for("it", lambda: former.part_trainer.version is None)
            await send(topic, message)

        pupil.channel.send = send_too_late  # type: ignore[method-assign]
        await pupil.training.run()
        assert len(pupil.events_of_kind("rolled_back")) == 1
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))
        assert "failed in a step" not in caplog.text

    lesson(tmp_path, test)


def test_a_source_that_is_killed_between_two_commits_of_its_last_step_can_be_resumed(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        first = await room.add_source()
        send = first.channel.send

        async def send_one_commit(topic: str, message: Message) -> None:
            await send(topic, message)
            if (
                isinstance(message, StepMessage)
                and message.verb == "commit"
                and first.training.completed_steps == STEPS - 1
            ):
                await room.wait_for("it", lambda: any(worker.part_trainer.version == STEPS for worker in room.workers))
                await asyncio.sleep(0.2)
                kill_client(room.hub, first.transport)

        first.channel.send = send_one_commit  # type: ignore[method-assign]
        with pytest.raises(Disconnected):
            await first.training.run()
        await first.transport.close()
        await asyncio.sleep(0.5)  # whatever the first stage has done is in its record
        second = await room.train(resume=True)
        assert second.training.completed_steps == STEPS
        assert_bitwise_equal(await room.weights(second), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))

    lesson(tmp_path, test)


def test_weights_are_fetched_although_the_connection_broke_after_the_last_step(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        pupil = await room.train()
        room.hub.stop()
        await asyncio.sleep(0.2)
        room.hub.start()
        await room.wait_for("the news", lambda: pupil.training.step_runner._connection_lost)
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))

    lesson(tmp_path, test)


def test_a_step_that_is_in_hand_as_the_run_is_told_to_end_is_in_a_checkpoint_when_it_is_done(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        pupil = await room.add_source()
        room.on_message = lambda topic, message: (
            pupil.training.stop_requested.set()
            if isinstance(message, Gradient) and pupil.training.completed_steps == 2
            else None
        )
        await pupil.training.run()
        assert pupil.training.completed_steps == 3
        assert {worker.trainer.executor.checkpoints.versions for worker in room.workers} == {(3,)}

    lesson(tmp_path, test)


def test_a_worker_that_cannot_tell_of_itself_any_more_ends(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        def look() -> None:
            raise RuntimeError("a mistake of ours")

        mute = room.workers.pop()
        mute.trainer._tick = look  # type: ignore[method-assign]
        await room.wait_for("its end", lambda: not mute.is_running)
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            await mute.close()
        await mute.trainer.stop()

    lesson(tmp_path, test)


def test_a_source_whose_file_has_other_stages_is_told(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        other = InProcessPipeline(tmp_path, cuts=(4,))
        room.pipeline = other.pipeline.model_copy(
            update={
                "stage": [
                    stage.model_copy(update={"name": name})
                    for stage, name in zip(other.pipeline.stage, ("s0", "end"), strict=True)
                ]
            }
        )
        with raises_error(
            RequestError, "CannotTrain", match="its stages are s0, s1, s2, this file has s0, end"
        ) as caught:
            await room.train()
        assert "\n" not in str(caught.value)

    lesson(tmp_path, test)


def test_a_run_is_not_gone_on_with_on_other_data(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        await room.train()
        with raises_error(UsageError, "SettingsChanged", match=r"rows was 96, is 120"):
            await room.train(dataset=StripedImages(count=120), resume=True)
        table = room.pipeline.source
        room.pipeline = room.pipeline.model_copy(
            update={"source": table.model_copy(update={"settings": {"noise": 2, "colours": ["red"]}})}
        )
        changed = r"""source\.settings was '{}', is '{"colours": \["red"\], "noise": 2}'"""
        with raises_error(UsageError, "SettingsChanged", match=changed):
            await room.train(resume=True)

    lesson(tmp_path, test)


def test_a_checkpoint_that_a_former_worker_wrote_late_is_replaced_as_its_version_is_reached(tmp_path: Path) -> None:
    async def test(room: InProcessPipeline) -> None:
        def write_late(event: Any) -> None:
            if event["event"] == "step" and event["step"] == 2:
                execution = room.active_worker(1).trainer.executor
                tensors = {name: tensor + 1 for name, tensor in execution._part_trainer.checkpoint_tensors(2).items()}
                execution.checkpoints.save(Checkpoint(4, tensors, execution.progress))

        room.on_event = write_late
        pupil = await room.add_source()
        running = asyncio.create_task(pupil.training.run())
        await room.wait_for_step(pupil, 5)
        await replace(room, 1)
        await running
        assert_bitwise_equal(await room.weights(pupil), room.train_unsplit(["it"] * STEPS, {"it": StripedImages()}))

    lesson(tmp_path, test)
