"""What a stage does next: operations in the order of the schedule, each once, whatever comes and whenever it comes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brokers.errors import WireError
from brokers.protocol.messages import Activation, Gradient, ReplyTo, StepMessage, StepVerb, Task, TensorContent
from brokers.protocol.safetensors_codec import from_numpy
from brokers.protocol.training import LABELS_TENSOR, MICRO_BATCH_KEY, MicroBatch, StepMode
from stages.training.errors import BadStep, StaleTerm, UnknownForward, WorkerOnStandby
from stages.training.schedule import ScheduleName, operations
from stages.training.step_queue import STEPS_LIMIT, Backward, Commit, Forward, StepOperation, StepQueue

TERM = 5
Came = tuple[Literal["task", "labels", "gradient", "commit"], int]


class Lesson:
    """One step of one source, and all messages about it that a stage may get."""

    def __init__(
        self, count: int = 4, *, term: int = TERM, number: int = 0, mode: StepMode = "train", source: str = "digits"
    ) -> None:
        self.id = random.randbytes(16)
        self.count, self.source = count, source
        self.requests = [random.randbytes(16) for _ in range(count)]
        self.micros = [
            MicroBatch(
                step=self.id.hex(), term=term, index=index, count=count, rows=count, number=number, seed=0, mode=mode
            )
            for index in range(count)
        ]

    def task(self, index: int, *, labels_only: bool = False, **change: Any) -> tuple[Task, MicroBatch]:
        micro = replace(self.micros[index], **change)
        name = LABELS_TENSOR if labels_only else "cut"
        body = TensorContent({name: from_numpy(np.zeros((1, 2), np.float32))}, {MICRO_BATCH_KEY: micro.to_json()})
        request, source = self.requests[index], self.source
        made = Activation(
            request_id=request, content=body, reply_to=ReplyTo("source"), sender_inbox="before", source=source
        )
        return made, micro

    def gradient(self, index: int) -> Gradient:
        return Gradient(request_id=self.requests[index], content=TensorContent({}), sender_inbox="after")

    def commit(self, **change: Any) -> StepMessage:
        verb: StepVerb = "commit"
        details = {"source": self.source, "lr": 0.05, "settings": {"batch": 4}}
        word = StepMessage(
            request_id=self.id, verb=verb, term=self.micros[0].term, sender_inbox="source", details=details
        )
        return replace(word, **change)


def steps(stage: int = 0, stages: int = 2, schedule: ScheduleName = "1f1b", **options: Any) -> StepQueue:
    made = StepQueue(schedule, stage, stages, **options)
    made.begin_term(TERM)
    return made


def give(made: StepQueue, lesson: Lesson, came: Came) -> str | None:
    kind, index = came
    match kind:
        case "task" | "labels":
            return made.add_task(*lesson.task(index, labels_only=kind == "labels"))
        case "gradient":
            made.add_gradient(lesson.gradient(index))
        case "commit":
            made.add_commit(lesson.commit())
    return None


def done_now(made: StepQueue) -> Iterator[StepOperation]:
    """Do all that can be done."""
    while (work := made.next_operation()) is not None:
        made.mark_done(work)
        yield work


def told(work: StepOperation) -> tuple[str, int]:
    match work:
        case Forward(micro_batch=micro):
            return "forward", micro.index
        case Backward(micro_batch=micro):
            return "backward", micro.index
        case Commit(number=number):
            return "commit", number


def is_possible(lesson: Lesson, came: Came, done: list[tuple[str, int]], last: bool) -> bool:
    """Whether the world can send this now: nobody has a gradient of a forward that was not done."""
    kind, index = came
    return kind != "gradient" or (not last and ("forward", index) in done)


@settings(max_examples=150)
@given(
    data=st.data(),
    schedule=st.sampled_from(["1f1b", "gpipe"]),
    place=st.integers(1, 5).flatmap(lambda stages: st.tuples(st.integers(0, stages - 1), st.just(stages))),
    count=st.integers(1, 6),
    stays=st.booleans(),
)
def test_whatever_the_order_of_messages_operations_are_done_in_that_of_the_schedule_and_each_once(
    data: st.DataObject, schedule: ScheduleName, place: tuple[int, int], count: int, stays: bool
) -> None:
    stage, stages = place
    last = stage == stages - 1
    made = steps(stage, stages, schedule, awaits_labels=stays and last)
    lesson, stale = Lesson(count), Lesson(count, term=TERM - 1)
    left: list[Came] = [("task", index) for index in range(count)]
    left += [("labels", index) for index in range(count)] if stays and last else []
    left += [] if last else [("gradient", index) for index in range(count)]
    sent: list[Came] = []
    done: list[tuple[str, int]] = []
    while left:
        possible = [each for each in left if is_possible(lesson, each, done, last)]
        came = data.draw(st.sampled_from(possible + sent))
        if came in left:
            left.remove(came)
            sent.append(came)
            assert give(made, lesson, came) is None
        else:  # it comes once more
            try:
                give(made, lesson, came)
            except UnknownForward:
                assert came[0] == "gradient"
        with pytest.raises(StaleTerm):
            made.add_task(*stale.task(came[1]))
        with pytest.raises(UnknownForward):
            made.add_gradient(stale.gradient(came[1]))
        done += [told(work) for work in done_now(made)]
        assert tuple(done) == operations(schedule, stage, stages, count)[: len(done)]
    assert tuple(done) == operations(schedule, stage, stages, count)
    give(made, lesson, ("commit", 0))
    assert [told(work) for work in done_now(made)] == [("commit", 0)]
    assert (len(made), made.current_source, made.sources) == (0, "", set())
    assert made.next_operation() is None


@given(place=st.integers(2, 6).flatmap(lambda stages: st.tuples(st.integers(0, stages - 2), st.just(stages))))
def test_1f1b_waits_for_a_gradient_when_n_forwards_are_in_hand(place: tuple[int, int]) -> None:
    stage, stages = place
    made, lesson = steps(stage, stages), Lesson(12)
    for index in range(12):
        give(made, lesson, ("task", index))
    assert [told(work) for work in done_now(made)] == [("forward", index) for index in range(stages - stage)]
    assert len(made) == 12 - (stages - stage)


def test_steps_are_done_one_after_the_other_in_the_order_in_which_their_first_micro_batch_came() -> None:
    made = steps()
    one, other = Lesson(2, source="one", number=7), Lesson(2, source="other", number=3)
    for lesson, index in ((one, 1), (other, 0), (other, 1), (one, 0)):
        give(made, lesson, ("task", index))
    assert made.sources == {"one", "other"}
    found = []
    for lesson in (one, other):
        assert made.current_source == lesson.source
        found += [(lesson.source, *told(work)) for work in done_now(made)]
        for index in (1, 0):
            give(made, lesson, ("gradient", index))
        found += [(lesson.source, *told(work)) for work in done_now(made)]
        assert made.next_operation() is None
        give(made, lesson, ("commit", 0))
        commit = made.next_operation()
        assert isinstance(commit, Commit)
        made.mark_done(commit)
        found.append((lesson.source, *told(commit)))
    operations = [("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1)]
    assert found == [
        *(("one", *each) for each in operations), ("one", "commit", 7),
        *(("other", *each) for each in operations), ("other", "commit", 3),
    ]  # fmt: skip


def test_an_evaluation_ends_with_its_last_forward() -> None:
    made, lesson, next_one = steps(), Lesson(3, mode="evaluate"), Lesson(1)
    for index in (2, 1, 0):
        give(made, lesson, ("task", index))
    give(made, next_one, ("task", 0))
    assert [told(work) for work in done_now(made)] == [("forward", 0), ("forward", 1), ("forward", 2), ("forward", 0)]


def test_a_step_is_prepared_by_its_last_operation_and_by_no_other() -> None:
    made, lesson = steps(stage=1, stages=2), Lesson(2)
    for index in range(2):
        give(made, lesson, ("task", index))
    prepared = []
    while (work := made.next_operation()) is not None:
        prepared.append(made.mark_done(work))
    assert prepared == [False, False, False, True]


# What comes late, twice, or to the wrong worker -----------------------------------------------------------------------


def test_a_gradient_before_its_forward_is_done_is_unknown() -> None:
    made, lesson = steps(), Lesson(2)
    give(made, lesson, ("task", 0))
    with pytest.raises(UnknownForward):
        made.add_gradient(lesson.gradient(0))
    assert [told(work) for work in done_now(made)] == [("forward", 0)]
    give(made, lesson, ("gradient", 0))


def test_a_gradient_that_comes_twice_is_used_once() -> None:
    made, lesson = steps(), Lesson(1)
    give(made, lesson, ("task", 0))
    list(done_now(made))
    give(made, lesson, ("gradient", 0))
    with pytest.raises(UnknownForward):  # it waits for its turn
        made.add_gradient(lesson.gradient(0))
    assert [told(work) for work in done_now(made)] == [("backward", 0)]
    with pytest.raises(UnknownForward):  # its turn is over
        made.add_gradient(lesson.gradient(0))


def test_a_gradient_at_the_last_stage_is_unknown_for_it_has_the_loss_itself() -> None:
    made, lesson = steps(stage=1, stages=2), Lesson(1)
    give(made, lesson, ("task", 0))
    work = made.next_operation()
    assert work is not None
    made.mark_done(work)
    with pytest.raises(UnknownForward):
        made.add_gradient(lesson.gradient(0))


def test_a_gradient_of_a_step_that_is_a_version_is_unknown() -> None:
    made, lesson = steps(), Lesson(1)
    for came in (("task", 0), ("gradient", 0), ("commit", 0)):
        give(made, lesson, came)
        list(done_now(made))
    with pytest.raises(UnknownForward):
        made.add_gradient(lesson.gradient(0))


def test_a_micro_batch_that_comes_again_after_its_step_is_a_version_begins_no_second_step() -> None:
    made, lesson = steps(stage=1, stages=2), Lesson(1)
    give(made, lesson, ("task", 0))
    list(done_now(made))
    give(made, lesson, ("commit", 0))
    list(done_now(made))
    give(made, lesson, ("task", 0))
    assert made.next_operation() is None
    assert len(made) == 0
    assert made.duplicates == 1


def test_an_evaluation_that_comes_again_is_done_no_second_time() -> None:
    made, lesson = steps(), Lesson(2, mode="evaluate")
    for index in (0, 1):
        give(made, lesson, ("task", index))
    list(done_now(made))
    give(made, lesson, ("task", 1))
    assert made.next_operation() is None
    assert len(made) == 0


def test_a_twin_is_counted_and_not_done() -> None:
    made, lesson = steps(), Lesson(2)
    for index in (0, 0):
        give(made, lesson, ("task", index))
    list(done_now(made))
    give(made, lesson, ("task", 0))
    assert (made.duplicates, made.next_operation(), len(made)) == (2, None, 0)


# Terms ----------------------------------------------------------------------------------------------------------------


def test_a_new_term_lets_go_of_everything() -> None:
    made, lesson, waiting = steps(), Lesson(2), Lesson(2)
    for each in (lesson, waiting):
        for index in range(2):
            give(made, each, ("task", index))
    list(done_now(made))
    made.begin_term(TERM + 1)
    assert (made.term, len(made), made.has_uncommitted_work, made.current_source, made.next_operation()) == (
        TERM + 1,
        0,
        False,
        "",
        None,
    )
    with pytest.raises(UnknownForward):
        made.add_gradient(lesson.gradient(0))
    with pytest.raises(StaleTerm, match=f"it is of term {TERM}, this worker is in term {TERM + 1}"):
        made.add_task(*waiting.task(1))


def test_who_stands_by_takes_nothing_of_the_term_in_which_another_trains_and_its_source_may_try_again() -> None:
    made, begun, later = steps(), Lesson(1), Lesson(1)
    give(made, begun, ("task", 0))
    made.stand_by(TERM)
    assert (made.term, len(made), made.has_uncommitted_work, made.next_operation()) == (TERM, 0, False, None)
    with pytest.raises(WorkerOnStandby, match=f"stands by in term {TERM}") as task:
        made.add_task(*later.task(0))
    with pytest.raises(WorkerOnStandby):
        made.add_commit(begun.commit())
    assert isinstance(task.value, WireError)
    assert task.value.retry
    made.begin_term(TERM + 1)
    assert give(made, Lesson(1, term=TERM + 1), ("task", 0)) is None
    assert made.next_operation() is not None


def test_who_was_in_no_term_yet_takes_nothing() -> None:
    with pytest.raises(WorkerOnStandby):
        StepQueue("1f1b", 0, 2).add_task(*Lesson(1, term=0).task(0))


@pytest.mark.parametrize("term", [TERM - 1, TERM + 1])
def test_a_message_of_another_term_is_stale_and_may_be_tried_again(term: int) -> None:
    made, lesson = steps(), Lesson(1)
    with pytest.raises(StaleTerm) as task:
        made.add_task(*lesson.task(0, term=term))
    with pytest.raises(StaleTerm):
        made.add_commit(lesson.commit(term=term))
    assert isinstance(task.value, WireError)
    assert task.value.retry
    assert made.next_operation() is None


@pytest.mark.parametrize("kind", ["forward", "backward", "commit"])
@pytest.mark.parametrize("another", [False, True], ids=["nothing", "another step"])
def test_what_is_done_when_its_term_is_over_counts_for_nothing(kind: str, another: bool) -> None:
    made, lesson, other = steps(stage=1, stages=2), Lesson(1), Lesson(1, term=TERM + 1)
    give(made, lesson, ("task", 0))
    while (work := made.next_operation()) is not None and told(work)[0] != kind:
        made.mark_done(work)
    if kind == "commit":
        give(made, lesson, ("commit", 0))
        work = made.next_operation()
    assert work is not None
    made.begin_term(TERM + 1)
    if another:
        give(made, other, ("task", 0))
    assert not made.mark_done(work)
    made.mark_failed(work)
    assert [told(each) for each in done_now(made)] == ([("forward", 0), ("backward", 0)] if another else [])


def test_a_step_that_failed_stays_until_the_term_ends_and_holds_up_those_behind_it() -> None:
    made, lesson, other = steps(stage=1, stages=2), Lesson(2), Lesson(1)
    for each, index in ((lesson, 0), (lesson, 1), (other, 0)):
        give(made, each, ("task", index))
    work = made.next_operation()
    assert work is not None
    made.mark_failed(work)
    assert made.next_operation() is None
    assert not made.has_uncommitted_work
    with pytest.raises(BadStep):
        made.add_commit(lesson.commit())
    made.begin_term(TERM + 1)
    assert made.next_operation() is None


# Commits --------------------------------------------------------------------------------------------------------------


def test_a_step_that_is_not_prepared_cannot_be_committed() -> None:
    made, lesson = steps(), Lesson(1)
    with pytest.raises(BadStep, match="not prepared"):
        made.add_commit(lesson.commit())
    give(made, lesson, ("task", 0))
    list(done_now(made))
    with pytest.raises(BadStep, match="not prepared"):
        made.add_commit(lesson.commit())
    give(made, lesson, ("gradient", 0))
    list(done_now(made))
    give(made, lesson, ("commit", 0))
    assert [told(work) for work in done_now(made)] == [("commit", 0)]


@pytest.mark.parametrize(
    "change",
    [
        {"source": "another"}, {"source": None}, {"lr": None}, {"lr": "0.1"}, {"lr": float("nan")}, {"lr": True},
        {"settings": {"batch": [4]}}, {"settings": 7}, {"settings": {"it": "x" * 700}},
        {"settings": {str(index): 0 for index in range(33)}},
    ],
    ids=str,
)  # fmt: skip
def test_a_commit_that_could_not_be_accounted_for_is_refused_before_a_weight_changes(change: dict[str, Any]) -> None:
    made, lesson = steps(stage=1, stages=2), Lesson(1)
    give(made, lesson, ("task", 0))
    list(done_now(made))
    good = lesson.commit()
    with pytest.raises(BadStep, match=f"says {next(iter(change))} "):
        made.add_commit(replace(good, details={**good.details, **change}))
    assert made.next_operation() is None
    made.add_commit(good)
    assert [told(work) for work in done_now(made)] == [("commit", 0)]


@pytest.mark.parametrize("source", ["", "a/b", "a" * 65])
def test_a_step_of_a_source_that_has_no_name_for_a_record_is_never_committed(source: str) -> None:
    made, lesson = steps(stage=1, stages=2), Lesson(1, source=source)
    give(made, lesson, ("task", 0))
    list(done_now(made))
    with pytest.raises(BadStep, match="says source "):
        made.add_commit(lesson.commit())


def test_a_commit_that_comes_twice_is_done_once() -> None:
    made, lesson = steps(stage=1, stages=2), Lesson(1)
    give(made, lesson, ("task", 0))
    list(done_now(made))
    give(made, lesson, ("commit", 0))
    give(made, lesson, ("commit", 0))
    assert [told(work) for work in done_now(made)] == [("commit", 0)]
    with pytest.raises(BadStep):
        made.add_commit(lesson.commit())


# What does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("count", 5), ("rows", 7), ("number", 1), ("mode", "evaluate")])
def test_a_micro_batch_that_does_not_fit_its_step_is_refused(name: str, value: Any) -> None:
    made, lesson = steps(), Lesson(4)
    give(made, lesson, ("task", 0))
    with pytest.raises(BadStep, match=f"micro-batch 1 says {name} {value}"):
        made.add_task(*lesson.task(1, **{name: value}))
    assert [told(work) for work in done_now(made)] == [("forward", 0)]


def test_there_is_room_for_so_many_steps_and_then_the_sender_is_told() -> None:
    made = steps()
    for _ in range(STEPS_LIMIT):
        assert give(made, Lesson(1), ("task", 0)) is None
    assert give(made, Lesson(1), ("task", 0)) == f"{STEPS_LIMIT} steps wait already"
    assert len(made) == STEPS_LIMIT


def test_there_is_room_for_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    made, huge = steps(), TensorContent({"cut": from_numpy(np.zeros(600, np.uint8))})
    monkeypatch.setattr("stages.training.step_queue.STEPS_LIMIT_BYTES", 1000)
    task, micro = Lesson(1).task(0)
    assert made.add_task(replace(task, content=huge), micro) is None
    task, micro = Lesson(1).task(0)
    assert made.add_task(replace(task, content=huge), micro) == "1 steps wait already"


# Labels that stay -----------------------------------------------------------------------------------------------------


def test_a_forward_waits_for_its_labels_where_they_come_by_themselves() -> None:
    made, lesson = steps(stage=1, stages=2, awaits_labels=True), Lesson(2)
    give(made, lesson, ("labels", 1))
    give(made, lesson, ("task", 0))
    assert made.next_operation() is None
    give(made, lesson, ("labels", 0))
    work = made.next_operation()
    assert isinstance(work, Forward)
    assert work.labels is not None
    assert told(work) == ("forward", 0)


def test_labels_of_a_step_that_was_given_up_are_let_go_of() -> None:
    made, lesson = steps(stage=1, stages=2, awaits_labels=True), Lesson(2)
    give(made, lesson, ("labels", 0))
    made.begin_term(TERM + 1)
    made.add_task(*lesson.task(0, term=TERM + 1))
    assert made.next_operation() is None
    with pytest.raises(StaleTerm):
        give(made, lesson, ("labels", 1))


def test_labels_that_come_twice_leave_nothing_behind() -> None:
    made, lesson = steps(stage=1, stages=2, awaits_labels=True), Lesson(1)
    for came in ("labels", "task", "labels"):
        give(made, lesson, (came, 0))
    list(done_now(made))
    give(made, lesson, ("labels", 0))
    give(made, lesson, ("commit", 0))
    list(done_now(made))
    assert not made._labels
