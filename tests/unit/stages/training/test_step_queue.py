"""`StepQueue`: operations in the order of the schedule, each once, for any order of messages."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brokers.errors import WireError
from brokers.protocol.messages import TensorContent
from brokers.protocol.safetensors_codec import from_numpy
from stages.training.step_queue import STEPS_LIMIT, Backward, Forward, ScheduleName, operations
from tests.support.errors import raises_error
from tests.support.training.step_messages import (
    TERM,
    Incoming,
    Step,
    add,
    add_all,
    commit_last_stage_step,
    describe,
    make_queue,
    next_of,
    run,
)


@settings(max_examples=60)
@given(
    data=st.data(),
    schedule=st.sampled_from(["1f1b", "gpipe"]),
    place=st.integers(1, 5).flatmap(lambda stages: st.tuples(st.integers(0, stages - 1), st.just(stages))),
    count=st.integers(1, 6),
    labels_stay=st.booleans(),
)
def test_any_order_of_messages_gives_the_operations_of_the_schedule(
    data: st.DataObject, schedule: ScheduleName, place: tuple[int, int], count: int, labels_stay: bool
) -> None:
    stage, stages = place
    is_last = stage == stages - 1
    queue = make_queue(stage, stages, schedule, awaits_labels=labels_stay and is_last)
    step, stale = Step(count), Step(count, term=TERM - 1)
    pending: list[Incoming] = [("task", index) for index in range(count)]
    pending += [("labels", index) for index in range(count)] if labels_stay and is_last else []
    pending += [] if is_last else [("gradient", index) for index in range(count)]
    sent: list[Incoming] = []
    done: list[tuple[str, int]] = []
    while pending:
        # The next stage sends the gradient of a forward only after that forward.
        possible = [each for each in pending if each[0] != "gradient" or ("forward", each[1]) in done]
        incoming = data.draw(st.sampled_from(possible + sent))
        if incoming in pending:
            pending.remove(incoming)
            sent.append(incoming)
            add(queue, step, incoming)
        else:
            with nullcontext() if incoming[0] != "gradient" else raises_error(WireError, "UnknownForward"):
                add(queue, step, incoming)
        with raises_error(WireError, "StaleTerm"):
            queue.add_task(*stale.task(incoming[1]))
        with raises_error(WireError, "UnknownForward"):
            queue.add_gradient(stale.gradient(incoming[1]))
        done += run(queue)
        assert tuple(done) == operations(schedule, stage, stages, count)[: len(done)]
    assert tuple(done) == operations(schedule, stage, stages, count)
    add(queue, step, ("commit", 0))
    assert list(run(queue)) == [("commit", 1)]
    assert (len(queue), queue.sources) == (0, set())
    assert queue.next_operation() is None


@given(place=st.integers(2, 6).flatmap(lambda stages: st.tuples(st.integers(0, stages - 2), st.just(stages))))
def test_1f1b_waits_for_a_gradient_after_n_forwards(place: tuple[int, int]) -> None:
    stage, stages = place
    queue, step = make_queue(stage, stages), Step(12)
    add_all(queue, step)
    assert list(run(queue)) == [("forward", index) for index in range(stages - stage)]
    assert len(queue) == 12 - (stages - stage)


def test_steps_run_in_the_order_of_their_first_micro_batch() -> None:
    queue = make_queue()
    one, other = Step(2, source="one", number=7), Step(2, source="other", number=3)
    for step, index in ((one, 1), (other, 0), (other, 1), (one, 0)):
        add(queue, step, ("task", index))
    assert queue.sources == {"one", "other"}
    forwards, backwards = [("forward", 0), ("forward", 1)], [("backward", 0), ("backward", 1)]
    for step, version in ((one, 8), (other, 4)):
        assert list(run(queue)) == forwards
        for index in (1, 0):
            add(queue, step, ("gradient", index))
        assert list(run(queue)) == backwards
        add(queue, step, ("commit", 0))
        commit = next_of(queue)
        assert describe(commit) == ("commit", version)
        queue.mark_done(commit)


def test_evaluation_ends_with_its_last_forward() -> None:
    queue, evaluation = make_queue(), Step(3, mode="evaluate")
    for index in (2, 1, 0):
        add(queue, evaluation, ("task", index))
    add(queue, Step(1), ("task", 0))
    assert list(run(queue)) == [("forward", 0), ("forward", 1), ("forward", 2), ("forward", 0)]


def test_only_the_last_operation_makes_a_step_prepared() -> None:
    queue, step = make_queue(stage=1), Step(2)
    add_all(queue, step)
    prepared = []
    while (operation := queue.next_operation()) is not None:
        prepared.append(queue.mark_done(operation))
    assert prepared == [False, False, False, True]


def test_backward_holds_no_tensors_of_its_forward() -> None:
    queue, step = make_queue(stage=1), Step(1)
    add_all(queue, step)
    queue.mark_done(next_of(queue))
    backward = next_of(queue)
    assert isinstance(backward, Backward)
    assert backward.task.request_id == step.requests[0]
    assert backward.task.content.nbytes == 0


# Late messages and duplicates -----------------------------------------------------------------------------------------


def test_gradient_before_its_forward_is_unknown() -> None:
    queue, step = make_queue(), Step(2)
    add(queue, step, ("task", 0))
    with raises_error(WireError, "UnknownForward"):
        queue.add_gradient(step.gradient(0))
    assert list(run(queue)) == [("forward", 0)]
    add(queue, step, ("gradient", 0))


def test_duplicate_gradient_is_unknown() -> None:
    queue, step = make_queue(), Step(1)
    add(queue, step, ("task", 0))
    list(run(queue))
    add(queue, step, ("gradient", 0))
    with raises_error(WireError, "UnknownForward"):  # while the first one waits
        queue.add_gradient(step.gradient(0))
    assert list(run(queue)) == [("backward", 0)]
    with raises_error(WireError, "UnknownForward"):
        queue.add_gradient(step.gradient(0))


def test_gradient_at_the_last_stage_is_unknown() -> None:
    queue, step = make_queue(stage=1), Step(1)
    add(queue, step, ("task", 0))
    queue.mark_done(next_of(queue))
    with raises_error(WireError, "UnknownForward"):
        queue.add_gradient(step.gradient(0))


def test_gradient_of_a_committed_step_is_unknown() -> None:
    queue, step = make_queue(), Step(1)
    incoming: list[Incoming] = [("task", 0), ("gradient", 0), ("commit", 0)]
    for each in incoming:
        add(queue, step, each)
        list(run(queue))
    with raises_error(WireError, "UnknownForward"):
        queue.add_gradient(step.gradient(0))


def test_micro_batch_of_a_committed_step_is_a_duplicate() -> None:
    queue, step = make_queue(stage=1), Step(1)
    commit_last_stage_step(queue, step)
    add(queue, step, ("task", 0))
    assert (queue.next_operation(), len(queue)) == (None, 0)


def test_micro_batch_of_a_finished_evaluation_is_a_duplicate() -> None:
    queue, step = make_queue(), Step(2, mode="evaluate")
    add_all(queue, step)
    list(run(queue))
    add(queue, step, ("task", 1))
    assert (queue.next_operation(), len(queue)) == (None, 0)


def test_duplicate_micro_batches_are_not_run() -> None:
    queue, step = make_queue(), Step(2)
    for index in (0, 0):
        add(queue, step, ("task", index))
    list(run(queue))
    add(queue, step, ("task", 0))
    assert (queue.next_operation(), len(queue)) == (None, 0)


# Inconsistent steps, and limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("count", 5), ("rows", 7), ("number", 1), ("mode", "evaluate")])
def test_micro_batch_that_does_not_fit_its_step_is_refused(name: str, value: Any) -> None:
    queue, step = make_queue(), Step(4)
    add(queue, step, ("task", 0))
    with raises_error(WireError, "BadStep", match=f"{name} of micro-batch 1 is {value}"):
        queue.add_task(*step.task(1, **{name: value}))
    assert list(run(queue)) == [("forward", 0)]


def test_number_of_steps_is_limited() -> None:
    queue = make_queue()
    for _ in range(STEPS_LIMIT):
        add(queue, Step(1), ("task", 0))
    with raises_error(WireError, "Busy", match=f"{STEPS_LIMIT} steps") as caught:
        add(queue, Step(1), ("task", 0))
    assert caught.value.retry
    assert len(queue) == STEPS_LIMIT


def test_number_of_bytes_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.training.step_queue.STEPS_LIMIT_BYTES", 1000)
    queue, content = make_queue(), TensorContent({"cut": from_numpy(np.zeros(600, np.uint8))})
    task, micro_batch = Step(1).task(0)
    queue.add_task(replace(task, content=content), micro_batch)
    task, micro_batch = Step(1).task(0)
    with raises_error(WireError, "Busy", match="1 steps"):
        queue.add_task(replace(task, content=content), micro_batch)


# Labels that stay -----------------------------------------------------------------------------------------------------


def test_forward_waits_for_labels_of_a_separate_message() -> None:
    queue, step = make_queue(stage=1, awaits_labels=True), Step(2)
    add(queue, step, ("labels", 1))
    add(queue, step, ("task", 0))
    assert queue.next_operation() is None
    add(queue, step, ("labels", 0))
    operation = next_of(queue)
    assert isinstance(operation, Forward)
    assert operation.labels is not None
    assert describe(operation) == ("forward", 0)


def test_labels_of_an_ended_term_are_discarded() -> None:
    queue, step = make_queue(stage=1, awaits_labels=True), Step(2)
    add(queue, step, ("labels", 0))
    queue.begin_term(TERM + 1)
    queue.add_task(*step.task(0, term=TERM + 1))
    assert queue.next_operation() is None
    with raises_error(WireError, "StaleTerm"):
        add(queue, step, ("labels", 1))


def test_duplicate_labels_leave_nothing_behind() -> None:
    queue, step = make_queue(stage=1, awaits_labels=True), Step(1)
    incoming: list[Incoming] = [("labels", 0), ("task", 0), ("labels", 0)]
    for each in incoming:
        add(queue, step, each)
    list(run(queue))
    add(queue, step, ("labels", 0))
    add(queue, step, ("commit", 0))
    list(run(queue))
    assert not queue._labels
