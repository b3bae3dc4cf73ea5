"""A pipeline that trains, from its sources to its last stage, over one hub: whatever happens, the weights are right."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from brokers.errors import Disconnected
from brokers.protocol.messages import (
    Activation,
    Body,
    Failure,
    Gradient,
    Message,
    ReplyTo,
    Result,
    Step,
    Task,
    new_request_id,
)
from brokers.protocol.safetensors_codec import from_array
from brokers.protocol.training import LABELS, MICRO, SOURCES_LIMIT, MicroBatch, Progress
from sources.datasets.dataset import Dataset
from sources.training import training_loop as training_module
from sources.training.errors import CannotTrain, NobodyTrains, OtherSettings, StepFailed, TrainedAlready
from stages.training.checkpoints import Version
from tests.support.brokers.broker_kinds import run
from tests.support.brokers.channel_ends import Ear
from tests.support.training.in_process_parts import assert_same_bits
from tests.support.training.in_process_pipeline import Classroom, Pupil, Worker, hurry, kill
from tests.support.training.striped_images import Stripes, TooManyClasses

STEPS = 8  # of a whole run: 2 epochs of 96 rows in batches of 24
Lesson = Callable[[Classroom], Awaitable[None]]


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def lesson(folder: Path, test: Lesson, *stages: int, **training: Any) -> Classroom:
    """Run a test in a classroom whose stages all have a worker."""
    room = Classroom(folder, **training)

    async def whole() -> None:
        await room.open(*stages)
        try:
            await test(room)
        finally:
            await room.close()

    run(whole())
    return room


# Equal to the plain loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("cuts", [(), (5,), (4, 9), (1, 3, 6, 8)], ids=len)
def test_a_run_ends_with_the_weights_of_the_plain_loop(tmp_path: Path, cuts: tuple[int, ...], schedule: str) -> None:
    async def test(room: Classroom) -> None:
        room.on_event = lambda event: saved.append(room.saved)
        pupil = await room.learn()
        assert pupil.training.done == STEPS
        assert [event["version"] for event in pupil.of("step")] == list(range(1, STEPS + 1))
        expected = room.plainly(["pupil"] * STEPS, {"pupil": Stripes()})
        assert_same_bits(await room.weights(pupil), expected)
        assert room.order() == ["pupil"] * STEPS
        assert all(worker.trainer.counters == {} for worker in room.workers)

    saved: list[int] = []
    lesson(tmp_path, test, cuts=cuts, schedule=schedule)
    assert saved == [0] * STEPS


def test_a_batch_that_does_not_divide_is_learned_as_it_is(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        pupil = await room.learn(dataset=Stripes(count=31))
        assert [event["rows"] for event in pupil.of("step")] == [24, 7, 24, 7]
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * 4, {"it": Stripes(count=31)}))

    lesson(tmp_path, test, micro_batches=5)


@pytest.mark.parametrize("cuts", [(), (5,), (4, 9)], ids=len)
def test_labels_that_stay_go_to_the_last_stage_and_nowhere_else(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    def seen(topic: str, message: Message) -> None:
        content = getattr(message, "content", None)
        if isinstance(content, Body) and LABELS in content.tensors:
            readers.add(topic.rpartition("/")[0])

    async def test(room: Classroom) -> None:
        room.on_message = seen
        pupil = await room.learn()
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * STEPS, {"it": Stripes()}))
        assert pupil.of("evaluation")

    readers: set[str] = set()
    lesson(tmp_path, test, cuts=cuts, labels="stay", evaluate_every=1)
    assert readers == {f"sparse/local/lesson/s{len(cuts)}/in"}


def test_labels_that_travel_pass_every_stage(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        await room.learn()
        topics = {
            topic.split("/")[3]
            for topic, message in room.heard
            if isinstance(message, Task) and isinstance(message.content, Body) and LABELS in message.content.tensors
        }
        assert topics == {"s0", "s1", "s2"}

    lesson(tmp_path, test, epochs=1)


def test_an_evaluation_changes_nothing(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        pupil = await room.learn()
        evaluations = pupil.of("evaluation")
        assert [event["step"] for event in evaluations] == [4, 8]
        assert {event["rows"] for event in evaluations} == {32}
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * STEPS, {"it": Stripes()}))

    lesson(tmp_path, test, evaluate_every=1)


# Many sources ---------------------------------------------------------------------------------------------------------


def test_two_sources_at_once_give_one_of_the_serial_orders(tmp_path: Path) -> None:
    datasets: dict[str, Dataset] = {"one": Stripes(seed=1), "other": Stripes(seed=2)}

    async def test(room: Classroom) -> None:
        pupils = [await room.pupil(name, dataset) for name, dataset in datasets.items()]
        await asyncio.gather(*(pupil.training.run() for pupil in pupils))
        order = room.order()
        assert len(order) == 2 * STEPS
        assert [order.count(name) for name in datasets] == [STEPS, STEPS]
        assert order not in (sorted(order), sorted(order, reverse=True))  # they have taken turns
        assert room.active(0).learner.version == 2 * STEPS
        for pupil in pupils:
            version = pupil.of("step")[-1]["version"]
            assert_same_bits(await room.weights(pupil), room.plainly(order[:version], datasets))

    lesson(tmp_path, test)


def test_who_ends_first_gets_the_weights_of_its_last_step_while_another_goes_on(tmp_path: Path) -> None:
    datasets: dict[str, Dataset] = {"one": Stripes(seed=1, count=48), "other": Stripes(seed=2, count=960)}

    async def test(room: Classroom) -> None:
        short, long = [await room.pupil(name, dataset) for name, dataset in datasets.items()]
        running = asyncio.create_task(long.training.run())
        await short.training.run()
        version = short.of("step")[-1]["version"]
        await room.until("more steps of the other", lambda: (room.active(0).learner.version or 0) > version + 2)
        found = await room.weights(short)  # of a version that was: from disk
        assert not running.done()
        assert_same_bits(found, room.plainly(room.order()[:version], datasets))
        short.training._version = 1  # which is on no disk any more: what there is now, then, but all of one version
        found = await room.weights(short)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        version = int(found["norm.num_batches_tracked"]) // 3
        assert version > 4
        assert_same_bits(found, room.plainly(room.order()[:version], datasets))

    lesson(tmp_path, test, checkpoint_every=20)


def test_a_source_that_dies_in_the_middle_of_a_step_holds_up_nobody(tmp_path: Path) -> None:
    datasets: dict[str, Dataset] = {"one": Stripes(seed=1), "other": Stripes(seed=2)}

    async def test(room: Classroom) -> None:
        one, other = [await room.pupil(name, dataset) for name, dataset in datasets.items()]
        dying = asyncio.create_task(one.training.run())

        def at_its_third_step(topic: str, message: Message) -> None:
            if one.training.done >= 2 and isinstance(message, Activation) and message.source == "one" and not dead:
                dead.append(one.name)
                kill(room.hub, one.transport)

        room.on_message = at_its_third_step
        await other.training.run()
        assert dead
        order = room.order()
        assert order.count("other") == STEPS
        assert 2 <= order.count("one") < STEPS
        assert room.saved == 0
        assert_same_bits(await room.weights(other), room.plainly(order, datasets))
        assert any("one" in event["why"] for event in other.of("rolled_back"))
        await one.transport.close()
        dying.cancel()
        await asyncio.gather(dying, return_exceptions=True)

    dead: list[str] = []
    lesson(tmp_path, test)


def test_a_source_that_was_killed_goes_on_from_where_the_pipeline_is(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        first = await room.pupil()
        running = asyncio.create_task(first.training.run())
        await room.until("two steps", lambda: first.training.done >= 3)
        kill(room.hub, first.transport)
        await first.transport.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        second = await room.learn(resume=True)  # at once: the record of the pipeline may be a step behind
        assert second.training.done == STEPS
        assert_same_bits(await room.weights(second), room.plainly(["it"] * STEPS, {"it": Stripes()}))
        assert room.order() == ["pupil"] * STEPS

    lesson(tmp_path, test)


# Late, twice, to the wrong worker -------------------------------------------------------------------------------------


async def stranger(room: Classroom) -> tuple[Any, Ear]:
    """Somebody who says what nobody asked for."""
    from brokers.dispatch.channel import Line
    from brokers.mqtt.in_memory import MemoryTransport

    line, ear = Line(MemoryTransport(room.hub)), Ear()
    await line.open()
    await line.listen("stranger/inbox", ear.heard, ear.garbage)
    return line, ear


def foreign(term: int, **change: Any) -> Task:
    fields = {"step": new_request_id().hex(), "index": 0, "count": 1, "rows": 1, "number": 0, "seed": 0, **change}
    micro = MicroBatch(term=term, **fields)
    body = Body({"input": from_array(Stripes().train().pictures[:1])}, {MICRO: micro.to_text()})
    return Task(request=new_request_id(), content=body, reply=ReplyTo("stranger/inbox"), sender="stranger/inbox")


def test_what_is_stale_or_foreign_changes_no_weight_and_is_told_by_its_own_error(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        line, ear = await stranger(room)
        gradients: list[tuple[str, Gradient]] = []
        room.on_message = lambda topic, message: (
            gradients.append((topic, message)) if isinstance(message, Gradient) else None
        )
        pupil = await room.pupil()
        running = asyncio.create_task(pupil.training.run())
        await room.until("a step", lambda: pupil.training.done >= 1)
        inboxes = [worker.trainer.inbox for worker in room.workers]
        term = room.workers[0].trainer.steps.term
        nothing = Body({})
        for inbox in inboxes:
            for topic, gradient in gradients[:3]:  # of former steps: to the right worker again, and to the wrong ones
                assert topic in inboxes
                late = Gradient(request=gradient.request, content=gradient.content, sender="stranger/inbox")
                await line.send(inbox, late)
            await line.send(inbox, Gradient(request=new_request_id(), content=nothing, sender="stranger/inbox"))
            await line.send(inbox, foreign(term - 1))
            for verb in ("commit", "halt", "restore", "prepared", "abandon", "halted", "restored"):
                word = Step(request=new_request_id(), verb=verb, term=term - 1, sender="stranger/inbox")
                await line.send(inbox, word)
            await line.send(inbox, Step(request=new_request_id(), verb="commit", term=term, sender="stranger/inbox"))
            for crew in (7, ["s0"], None):
                word = Step(request=new_request_id(), verb="halt", term=term + 1, details={"crew": crew})
                await line.send(inbox, word)
            version: Any
            for version in ("x", None, [], -1, 7):
                details = {"version": version, "since": 0}
                word = Step(request=new_request_id(), verb="restore", term=term, details=details)
                await line.send(inbox, word)
                word = Step(request=new_request_id(), verb="collect", term=term, details={"version": version})
                await line.send(inbox, word)
            await line.send(inbox, Step(request=new_request_id(), verb="restore", term=term))
            await line.send(inbox, Failure(request=new_request_id(), stage="s", worker="w", error="E", reason="r"))
            await line.send(inbox, Result(request=new_request_id(), content=nothing))
        await running
        assert all(worker.is_running for worker in room.workers)
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * STEPS, {"it": Stripes()}))
        assert room.order() == ["pupil"] * STEPS
        told = set()
        while not ear.messages.empty():
            failure = ear.messages.get_nowait()
            if isinstance(failure, Failure):
                told.add((failure.error, failure.retry))
        assert told == {("UnknownForward", False), ("StaleTerm", True), ("BadStep", False)}
        await line.close()

    lesson(tmp_path, test)


WHOLE = MicroBatch(step="a" * 32, term=0, index=0, count=1, rows=1, number=0, seed=0).to_text()
HOSTILE_MICROS = ("", "null", "[]", "{}", WHOLE.replace("a" * 32, "z" * 32), WHOLE.replace('"count":1', '"count":"1"'))


@pytest.mark.parametrize("text", HOSTILE_MICROS)
def test_a_task_that_is_no_micro_batch_is_refused_and_the_worker_lives(tmp_path: Path, text: str) -> None:
    async def test(room: Classroom) -> None:
        line, ear = await stranger(room)
        pupil = await room.pupil()
        task = foreign(0)
        sent = Task(
            request=task.request,
            content=Body(task.content.tensors if isinstance(task.content, Body) else {}, {MICRO: text}),
            reply=task.reply,
            sender=task.sender,
        )
        for worker in room.workers:
            await line.send(worker.trainer.inbox, sent)
            failure = await ear.message()
            assert isinstance(failure, Failure)
            assert failure.error == "BadProperty"
            assert MICRO in failure.reason
        await pupil.training.run()
        assert all(worker.trainer.counters["refused"] == 1 for worker in room.workers)
        await line.close()

    lesson(tmp_path, test, epochs=1)


@pytest.mark.parametrize("number", [0, 3, 5])
def test_a_step_that_is_not_the_next_one_of_its_source_is_refused_and_may_be_tried_again(
    tmp_path: Path, number: int
) -> None:
    async def test(room: Classroom) -> None:
        line, ear = await stranger(room)
        await room.learn()
        head = room.active(0)
        late = foreign(head.trainer.steps.term, number=number)
        task = Task(request=late.request, content=late.content, reply=late.reply, sender=late.sender, source="pupil")
        await line.send(head.trainer.inbox, task)
        failure = await ear.message()
        assert isinstance(failure, Failure)
        assert (failure.error, failure.retry) == ("StaleStep", True)
        assert failure.reason == f"the next step of source 'pupil' is 4 (from 0), not {number}"
        assert head.learner.version == 4
        await line.close()

    lesson(tmp_path, test, epochs=1)


def test_messages_that_come_twice_change_nothing(tmp_path: Path) -> None:
    """Each message of a stage comes to it a second time, as a bridge may do that lost its connection."""

    async def test(room: Classroom) -> None:
        line, _ = await stranger(room)
        tasks: set[asyncio.Task[None]] = set()
        seen: set[tuple[str, bytes, type[Message], object]] = set()

        def again(topic: str, message: Message) -> None:
            key = (topic, message.request, type(message), getattr(message, "verb", None))
            if topic.split("/")[-2] == "in" and key not in seen and not isinstance(message, Failure):
                seen.add(key)
                task = asyncio.create_task(line.send(topic, message))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

        room.on_message = again
        pupil = await room.learn()
        assert pupil.training.done == STEPS
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * STEPS, {"it": Stripes()}))
        assert room.order() == ["pupil"] * STEPS
        assert room.saved == 0
        await asyncio.gather(*tasks)
        await line.close()

    lesson(tmp_path, test)


# Workers that die -----------------------------------------------------------------------------------------------------


async def replace(room: Classroom, stage: int) -> Worker:
    """Kill the worker that trains a stage, and start another where its checkpoints are."""
    dead = room.active(stage)
    dead.die()
    await dead.end()
    room.workers.remove(dead)
    return await room.add(stage, name=f"new{stage}-{len(room.heard)}")


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_worker_that_dies_is_replaced_and_the_result_is_that_of_the_undisturbed_run(
    tmp_path: Path, stage: int
) -> None:
    async def test(room: Classroom) -> None:
        pupil = await room.pupil()
        running = asyncio.create_task(pupil.training.run())
        for step in (2, 6, 9):
            await room.until_step(pupil, step)
            await replace(room, stage)
        await running
        assert pupil.training.done == 12
        assert len(pupil.of("rolled_back")) >= 3
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * 12, {"it": Stripes()}))
        assert room.saved == 0

    lesson(tmp_path, test, epochs=3)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_standby_takes_over_at_once(tmp_path: Path, stage: int) -> None:
    async def test(room: Classroom) -> None:
        await room.add(stage, name="zz-standby")
        pupil = await room.pupil()
        running = asyncio.create_task(pupil.training.run())
        await room.until("a step", lambda: pupil.training.done >= 5)
        first = room.active(stage)
        assert first.trainer.worker != "zz-standby"
        first.die()
        await running
        assert room.crew[f"s{stage}"] == "zz-standby"
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * STEPS, {"it": Stripes()}))
        (back,) = pupil.of("rolled_back")
        assert back["waited_ms"] < 5000

    lesson(tmp_path, test)


def test_a_standby_never_trains_while_another_does(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        spare = await room.add(1, name="a-standby")  # the first by name, and yet a newcomer
        first = room.workers[1]
        pupil = await room.learn()
        others = {worker.trainer.worker: worker.learner.version for worker in (spare, first)}
        assert sorted(others.values()) == [0, STEPS]  # type: ignore[type-var]
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * STEPS, {"it": Stripes()}))

    lesson(tmp_path, test)


def test_a_worker_that_drains_leaves_its_version_behind(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        pupil = await room.pupil()
        running = asyncio.create_task(pupil.training.run())
        await room.until("a step", lambda: pupil.training.done >= 2)
        leaving = room.active(1)
        await leaving.drain()
        assert leaving.learner.version in leaving.trainer._execution._checkpoints.versions
        await room.add(1, name="successor")
        await running
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * 12, {"it": Stripes()}))

    lesson(tmp_path, test, epochs=3)


def test_a_hub_that_restarts_costs_no_step(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        pupil = await room.pupil()
        running = asyncio.create_task(pupil.training.run())
        await room.until("a step", lambda: pupil.training.done >= 2)
        room.hub.stop()
        await asyncio.sleep(0.2)
        room.hub.start()
        await running
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * 12, {"it": Stripes()}))

    lesson(tmp_path, test, epochs=3)


def test_saved_forwards_are_none_after_every_abort(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        saved: list[int] = []

        def restored(topic: str, message: Message) -> None:
            if isinstance(message, Step) and message.verb == "halted":
                saved.append(message.details["standing"]["saved"])

        room.on_message = restored
        pupil = await room.pupil()
        running = asyncio.create_task(pupil.training.run())
        for step in (1, 3, 5):
            await room.until_step(pupil, step)
            await room.until_something_is_said()
            await give_up(room, pupil)
        await running
        assert len(saved) >= 3 * 4
        assert set(saved) == {0}
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * STEPS, {"it": Stripes()}))

    lesson(tmp_path, test)


async def give_up(room: Classroom, pupil: Pupil) -> None:
    """Have the source give up its step, as it does when it hears nothing."""
    crew = pupil.training.watch.crew
    assert crew is not None
    word = Step(request=new_request_id(), verb="abandon", term=crew.term, details={"why": "a test"})
    await pupil.line.send(pupil.training.watch.conductor_inbox(crew), word)


# What ends a run ------------------------------------------------------------------------------------------------------


def fails(
    folder: Path, error: type[Exception], match: str, dataset: Dataset | None = None, **training: Any
) -> Classroom:
    async def test(room: Classroom) -> None:
        with pytest.raises(error, match=match) as caught:
            await room.learn(dataset=dataset)
        assert "\n" not in str(caught.value)
        assert all(worker.is_running for worker in room.workers)
        await room.until("saved forwards to be let go of", lambda: room.saved == 0)

    return lesson(folder, test, **training)


def test_labels_out_of_range_are_told_with_the_stage_and_the_step(tmp_path: Path) -> None:
    match = r"step 0 failed at stage 's2', worker 'w2-2': BadLabels: label 4 .* the network has 4 classes"
    fails(tmp_path, StepFailed, match, TooManyClasses(count=24))


def test_a_loss_that_is_no_number_is_told_with_the_stage_the_step_and_what_to_try(tmp_path: Path) -> None:
    match = r"step [12] failed at stage 's2', .*: NotFinite: .*try a lower learning rate"
    fails(tmp_path, StepFailed, match, lr=1e38)


def test_weights_that_are_no_numbers_any_more_are_in_no_checkpoint_and_all_go_back_to_the_last_one(
    tmp_path: Path,
) -> None:
    async def test(room: Classroom) -> None:
        await room.learn()

        def burst(event: Any) -> None:
            for parameter in room.workers[1].learner._part.parameters():
                parameter.data.fill_(float("inf"))

        room.on_event = burst
        other = await room.pupil("other", Stripes(seed=1))
        with pytest.raises(StepFailed, match=r"step 1 failed at stage 's2', .*: NotFinite: the loss is nan"):
            await other.training.run()
        await room.until("the way back", lambda: [each.learner.version for each in room.workers] == [4, 4, 4])
        await room.until("a crew", lambda: other.training.watch.crew)
        crew = other.training.watch.crew
        assert crew is not None
        assert "parameter 'second.weight' is not finite" in crew.why
        assert_same_bits(await room.weights(other), room.plainly(["it"] * 4, {"it": Stripes()}))

    lesson(tmp_path, test, epochs=1)


def test_nobody_trains_is_told_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "CREW_WAIT_S", 0.5)

    async def test(room: Classroom) -> None:
        with pytest.raises(NobodyTrains, match=r"not all up within 0\.5 s: `sparse status` says who is"):
            await room.learn()

    lesson(tmp_path, test, 0, 2)


def test_a_second_run_of_the_same_name_goes_on_only_where_it_is_told_to(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        await room.learn()
        with pytest.raises(TrainedAlready, match=r"'pupil' has trained \d steps .* --resume"):
            await room.learn()
        again = await room.learn(resume=True)
        assert again.of("step") == []
        assert again.training.done == STEPS
        assert len(again.of("resumed")) == 1
        other = await room.learn("another")  # with another name it has done nothing yet
        assert len(other.of("step")) == STEPS
        assert room.order() == ["pupil"] * STEPS + ["another"] * STEPS

    lesson(tmp_path, test)


def test_a_run_with_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        await room.learn()
        before = room.pipeline
        change = {"batch": 12, "lr": 0.5}
        table = before.training.model_copy(update=change)
        room.pipeline = before.model_copy(update={"training": table})
        with pytest.raises(OtherSettings, match=r"batch was 24, is 12; lr was 0\.05, is 0\.5"):
            await room.learn(resume=True)

    lesson(tmp_path, test)


def test_a_step_that_is_given_up_again_and_again_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "TERMS_LIMIT", 3)

    async def test(room: Classroom) -> None:
        room.workers[1].trainer.steps.take_task = lambda task, micro: "no room"  # type: ignore[method-assign]
        with pytest.raises(CannotTrain, match=r"step 0 was given up 3 times: Busy at stage s1"):
            await room.learn()
        assert len({event["version"] for event in room.pupils[0].events}) <= 1
        halts = [message for _, message in room.heard if isinstance(message, Step) and message.verb == "halt"]
        terms = [word.term for word in halts]
        assert terms == sorted(terms)
        assert len(set(terms)) == 4  # the beginning, and one for each time that it was given up

    lesson(tmp_path, test)


def test_a_lost_folder_of_checkpoints_is_told_and_nothing_is_rolled_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_module, "PROBLEM_WAIT_S", 0.3)

    async def test(room: Classroom) -> None:
        await room.learn()
        dead = room.active(1)
        dead.die()
        await dead.end()
        room.workers.remove(dead)
        await room.add(1, name="lost", folder=tmp_path / "elsewhere")
        with pytest.raises(CannotTrain, match=r"stage 's0' has checkpoints of 4 and 8, stage 's1' has none") as caught:
            await room.learn(resume=True)
        assert "\n" not in str(caught.value)
        assert room.workers[0].trainer._execution._checkpoints.versions == (4, 8)
        assert room.workers[0].learner.version == 8

    lesson(tmp_path, test)


def test_a_full_disk_is_told_and_the_run_goes_on_from_the_last_version_when_there_is_room(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        from stages.training.errors import CannotCheckpoint

        checkpoints = room.workers[1].trainer._execution._checkpoints
        save = checkpoints.save

        def full(version: Any) -> None:
            raise CannotCheckpoint("a/b", "the disk is full")

        checkpoints.save = full  # type: ignore[method-assign]
        with pytest.raises(StepFailed, match=r"step 3 failed at stage 's1', worker .*: CannotCheckpoint: .*whole"):
            await room.learn()
        checkpoints.save = save  # type: ignore[method-assign]
        await room.until("a crew", lambda: room.pupils[0].training.watch.crew)
        pupil = await room.learn(resume=True)
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * STEPS, {"it": Stripes()}))

    lesson(tmp_path, test)


def test_one_source_more_than_a_record_can_name_is_told_and_the_workers_live(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        others = {f"source-{index}": Progress(steps=1) for index in range(SOURCES_LIMIT)}
        for worker in room.workers:
            worker.trainer._execution._progress = others
        with pytest.raises(StepFailed, match=r"TooManySources: 64 sources have trained this pipeline"):
            await room.learn()
        assert all(worker.is_running for worker in room.workers)

    lesson(tmp_path, test)


# A kill, a freeze or a break at an unlucky moment ---------------------------------------------------------------------


def test_memory_of_a_term_that_was_given_up_is_not_taken_for_the_version_of_the_same_number(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        pupil = await room.learn()
        frozen = room.active(1)
        frozen.trainer._execution._since -= 1  # the others have been told since, and have done other steps up to this
        with torch.no_grad():
            for parameter in frozen.learner._part.parameters():
                parameter.add_(1.0)
        term = frozen.trainer.steps.term
        await replace(room, 2)
        await room.until("another term", lambda: (crew := pupil.training.watch.crew) and crew.term > term)
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * STEPS, {"it": Stripes()}))

    lesson(tmp_path, test)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_worker_in_whose_place_another_trains_leaves_no_version_behind(tmp_path: Path, stage: int) -> None:
    async def test(room: Classroom) -> None:
        await room.learn()
        former = room.active(stage)
        former.learner.version = 9  # of a step that the others have given up
        former.trainer.stand_by(former.trainer.steps.term + 1)
        await former.drain()
        assert former.trainer._execution._checkpoints.versions == (4, 8)

    lesson(tmp_path, test)


@pytest.mark.parametrize("verb", ["task", "commit"])
def test_a_source_that_has_not_heard_that_a_worker_stands_by_tries_its_step_again(
    tmp_path: Path, verb: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(room: Classroom) -> None:
        pupil = await room.pupil()
        send, left = pupil.line.send, [room.workers[0]]

        async def send_too_late(topic: str, message: Message) -> None:
            is_last = isinstance(message, Step) and message.verb == "commit" and topic == room.workers[0].trainer.inbox
            if left and pupil.training.done == 2 and (is_last if verb == "commit" else isinstance(message, Task)):
                former = left.pop()
                former.trainer.stand_by(former.trainer.steps.term)
                await room.until("it", lambda: former.learner.version is None)
            await send(topic, message)

        pupil.line.send = send_too_late  # type: ignore[method-assign]
        await pupil.training.run()
        assert len(pupil.of("rolled_back")) == 1
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * STEPS, {"it": Stripes()}))
        assert "failed in a step" not in caplog.text

    lesson(tmp_path, test)


def test_a_source_that_is_killed_between_two_commits_of_its_last_step_can_be_resumed(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        first = await room.pupil()
        send = first.line.send

        async def send_one_commit(topic: str, message: Message) -> None:
            await send(topic, message)
            if isinstance(message, Step) and message.verb == "commit" and first.training.done == STEPS - 1:
                await room.until("it", lambda: any(worker.learner.version == STEPS for worker in room.workers))
                await asyncio.sleep(0.2)
                kill(room.hub, first.transport)

        first.line.send = send_one_commit  # type: ignore[method-assign]
        with pytest.raises(Disconnected):
            await first.training.run()
        await first.transport.close()
        await asyncio.sleep(0.5)  # whatever the first stage has done is in its record
        second = await room.learn(resume=True)
        assert second.training.done == STEPS
        assert_same_bits(await room.weights(second), room.plainly(["it"] * STEPS, {"it": Stripes()}))

    lesson(tmp_path, test)


def test_weights_are_fetched_although_the_connection_broke_after_the_last_step(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        pupil = await room.learn()
        room.hub.stop()
        await asyncio.sleep(0.2)
        room.hub.start()
        await room.until("the news", lambda: pupil.training.stepper._broken)
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * STEPS, {"it": Stripes()}))

    lesson(tmp_path, test)


def test_a_step_that_is_in_hand_as_the_run_is_told_to_end_is_in_a_checkpoint_when_it_is_done(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        pupil = await room.pupil()
        room.on_message = lambda topic, message: (
            pupil.training.leave.set() if isinstance(message, Gradient) and pupil.training.done == 2 else None
        )
        await pupil.training.run()
        assert pupil.training.done == 3
        assert {worker.trainer._execution._checkpoints.versions for worker in room.workers} == {(3,)}

    lesson(tmp_path, test)


def test_a_worker_that_cannot_tell_of_itself_any_more_ends(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        def look() -> None:
            raise RuntimeError("a mistake of ours")

        mute = room.workers.pop()
        mute.trainer.role.look = look  # type: ignore[method-assign]
        await room.until("its end", lambda: not mute.is_running)
        with pytest.raises(RuntimeError, match="a mistake of ours"):
            await mute.end()
        await mute.trainer.stop()

    lesson(tmp_path, test)


def test_a_source_whose_file_has_other_stages_is_told(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        other = Classroom(tmp_path, cuts=(4,))
        room.pipeline = other.pipeline.model_copy(
            update={
                "stage": [
                    stage.model_copy(update={"name": name})
                    for stage, name in zip(other.pipeline.stage, ("s0", "end"), strict=True)
                ]
            }
        )
        with pytest.raises(CannotTrain, match="its stages are s0, s1, s2, this file has s0, end") as caught:
            await room.learn()
        assert "\n" not in str(caught.value)

    lesson(tmp_path, test)


def test_a_run_is_not_gone_on_with_on_other_data(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        await room.learn()
        with pytest.raises(OtherSettings, match=r"rows was 96, is 120"):
            await room.learn(dataset=Stripes(count=120), resume=True)
        table = room.pipeline.source
        room.pipeline = room.pipeline.model_copy(
            update={"source": table.model_copy(update={"settings": {"noise": 2, "colours": ["red"]}})}
        )
        with pytest.raises(
            OtherSettings, match=r"""source\.settings was '{}', is '{"colours": \["red"\], "noise": 2}'"""
        ):
            await room.learn(resume=True)

    lesson(tmp_path, test)


def test_a_checkpoint_that_a_former_worker_wrote_late_is_replaced_as_its_version_is_reached(tmp_path: Path) -> None:
    async def test(room: Classroom) -> None:
        def write_late(event: Any) -> None:
            if event["event"] == "step" and event["step"] == 2:
                execution = room.active(1).trainer._execution
                tensors = {name: tensor + 1 for name, tensor in execution._learner.tensors(2).items()}
                execution._checkpoints.save(Version(4, tensors, execution._progress))

        room.on_event = write_late
        pupil = await room.pupil()
        running = asyncio.create_task(pupil.training.run())
        await room.until_step(pupil, 5)
        await replace(room, 1)
        await running
        assert_same_bits(await room.weights(pupil), room.plainly(["it"] * STEPS, {"it": Stripes()}))

    lesson(tmp_path, test)
