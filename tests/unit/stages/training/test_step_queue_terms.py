"""`StepQueue`: terms of the coordinator, and commits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest

from brokers.errors import WireError
from brokers.protocol.messages import StepMessage
from stages.training.step_queue import StepQueue
from tests.support.errors import raises_error
from tests.support.training.step_messages import (
    TERM,
    Step,
    add,
    add_all,
    describe,
    make_queue,
    next_of,
    run,
)

# Terms ----------------------------------------------------------------------------------------------------------------


def test_new_term_discards_all_steps() -> None:
    queue, step, waiting = make_queue(), Step(2), Step(2)
    add_all(queue, step)
    add_all(queue, waiting)
    list(run(queue))
    queue.begin_term(TERM + 1)
    assert (queue.term, len(queue), queue.has_uncommitted_work) == (TERM + 1, 0, False)
    assert queue.next_operation() is None
    with raises_error(WireError, "UnknownForward"):
        queue.add_gradient(step.gradient(0))
    with raises_error(WireError, "StaleTerm") as caught:
        queue.add_task(*waiting.task(1))
    assert caught.value.fields == {"expected_term": TERM + 1, "actual_term": TERM}


def test_standby_refuses_tasks_and_commits_until_the_next_term() -> None:
    queue, begun, later = make_queue(), Step(1), Step(1)
    add(queue, begun, ("task", 0))
    queue.stand_by(TERM)
    assert (queue.term, len(queue), queue.has_uncommitted_work, queue.next_operation()) == (TERM, 0, False, None)
    with raises_error(WireError, "WorkerOnStandby") as caught:
        queue.add_task(*later.task(0))
    assert caught.value.retry
    with raises_error(WireError, "WorkerOnStandby"):
        queue.add_commit(begun.commit())
    queue.begin_term(TERM + 1)
    add(queue, Step(1, term=TERM + 1), ("task", 0))
    assert queue.next_operation() is not None


def test_worker_stands_by_before_its_first_term() -> None:
    with raises_error(WireError, "WorkerOnStandby"):
        StepQueue("1f1b", 0, 2).add_task(*Step(1, term=0).task(0))


@pytest.mark.parametrize("term", [TERM - 1, TERM + 1])
def test_message_of_another_term_is_refused(term: int) -> None:
    queue, step = make_queue(), Step(1)
    with raises_error(WireError, "StaleTerm") as caught:
        queue.add_task(*step.task(0, term=term))
    assert caught.value.retry
    with raises_error(WireError, "StaleTerm"):
        queue.add_commit(step.commit(term=term))
    assert queue.next_operation() is None


@pytest.mark.parametrize(
    ("verb", "term", "is_standby", "code"),
    [
        ("quiesce", TERM - 1, False, "StaleTerm"),
        ("quiesce", TERM + 1, True, None),
        ("restore", TERM, True, "WorkerOnStandby"),
        ("restore", TERM, False, None),
    ],
)
def test_commands_of_the_coordinator_are_checked(
    verb: Literal["quiesce", "restore"], term: int, is_standby: bool, code: str | None
) -> None:
    queue = make_queue()
    if is_standby:
        queue.stand_by(TERM)
    command = StepMessage(request_id=bytes(16), verb=verb, term=term)
    if code is None:
        queue.check_command(command)
    else:
        with raises_error(WireError, code):
            queue.check_command(command)


@pytest.mark.parametrize("kind", ["forward", "backward", "commit"])
@pytest.mark.parametrize("has_next_step", [False, True])
def test_operation_of_an_ended_term_changes_nothing(kind: str, has_next_step: bool) -> None:
    queue, step = make_queue(stage=1), Step(1)
    add(queue, step, ("task", 0))
    while (operation := queue.next_operation()) is not None and describe(operation)[0] != kind:
        queue.mark_done(operation)
    if kind == "commit":
        add(queue, step, ("commit", 0))
        operation = next_of(queue)
    assert operation is not None
    queue.begin_term(TERM + 1)
    if has_next_step:
        add(queue, Step(1, term=TERM + 1), ("task", 0))
    assert not queue.mark_done(operation)
    queue.mark_failed(operation)
    assert list(run(queue)) == ([("forward", 0), ("backward", 0)] if has_next_step else [])


def test_failed_step_blocks_the_queue_until_the_term_ends() -> None:
    queue, step, other = make_queue(stage=1), Step(2), Step(1)
    add_all(queue, step)
    add_all(queue, other)
    queue.mark_failed(next_of(queue))
    assert queue.next_operation() is None
    assert not queue.has_uncommitted_work
    with raises_error(WireError, "BadStep"):
        queue.add_commit(step.commit())
    queue.begin_term(TERM + 1)
    assert queue.next_operation() is None


# Commits --------------------------------------------------------------------------------------------------------------


def test_step_that_is_not_prepared_cannot_be_committed() -> None:
    queue, step = make_queue(), Step(1)
    with raises_error(WireError, "BadStep"):
        queue.add_commit(step.commit())
    add(queue, step, ("task", 0))
    list(run(queue))
    with raises_error(WireError, "BadStep"):
        queue.add_commit(step.commit())
    add(queue, step, ("gradient", 0))
    list(run(queue))
    add(queue, step, ("commit", 0))
    assert list(run(queue)) == [("commit", 1)]


@pytest.mark.parametrize(
    "change",
    [
        {"source": "another"}, {"source": None}, {"lr": None}, {"lr": "0.1"}, {"lr": float("nan")}, {"lr": True},
        {"settings": {"batch": [4]}}, {"settings": 7}, {"settings": {"it": "x" * 700}},
        {"settings": {str(index): 0 for index in range(33)}},
    ],
    ids=str,
)  # fmt: skip
def test_commit_with_bad_details_is_refused(change: dict[str, Any]) -> None:
    queue, step = make_queue(stage=1), Step(1)
    add(queue, step, ("task", 0))
    list(run(queue))
    valid = step.commit()
    with raises_error(WireError, "BadStep", match=f"^{next(iter(change))} of a commit must"):
        queue.add_commit(replace(valid, details={**valid.details, **change}))
    assert queue.next_operation() is None
    queue.add_commit(valid)
    assert list(run(queue)) == [("commit", 1)]


@pytest.mark.parametrize("source", ["", "a/b", "a" * 65])
def test_source_with_an_invalid_name_cannot_commit(source: str) -> None:
    queue, step = make_queue(stage=1), Step(1, source=source)
    add(queue, step, ("task", 0))
    list(run(queue))
    with raises_error(WireError, "BadStep", match="source of a commit"):
        queue.add_commit(step.commit())


def test_duplicate_commit_is_done_once() -> None:
    queue, step = make_queue(stage=1), Step(1)
    add(queue, step, ("task", 0))
    list(run(queue))
    add(queue, step, ("commit", 0))
    add(queue, step, ("commit", 0))
    assert list(run(queue)) == [("commit", 1)]
    with raises_error(WireError, "BadStep"):
        queue.add_commit(step.commit())
