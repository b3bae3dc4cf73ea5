"""The dispatcher: which worker gets the next task, and which tasks are lost with a worker."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.dispatch.dispatcher import ESTIMATE_HALF_LIFE_S, LEASE_S, Dispatcher, LostTask
from brokers.dispatch.presence import WorkerLoad, WorkerRecord
from brokers.protocol.messages import ReplyTo
from tests.support.brokers.presence_records import make_worker_record

A, B, C = (bytes([number]) * 16 for number in range(3))


def make_dispatcher(*records: WorkerRecord, lease_s: float = LEASE_S) -> Dispatcher:
    dispatcher = Dispatcher(lease_s)
    for record in records:
        dispatcher.update(record, 0.0)
    return dispatcher


def send(dispatcher: Dispatcher, worker: str, request: bytes, now_s: float = 0.0, attempt: int = 1) -> LostTask:
    task = LostTask(request, attempt, ReplyTo("back"), "head", worker)
    dispatcher.task_sent(task, now_s)
    return task


def pick(
    dispatcher: Dispatcher, now_s: float, avoid: frozenset[str] = frozenset(), isolate: bytes | None = None
) -> str | None:
    """The id of the worker that is picked."""
    record = dispatcher.pick(now_s, avoid, isolate)
    return record.worker if record else None


def requests(tasks: Iterable[LostTask]) -> set[bytes]:
    return {task.request for task in tasks}


# Choice of a worker -------------------------------------------------------------------------------------------------


def test_no_worker_is_picked_from_an_empty_pool() -> None:
    assert pick(Dispatcher(), 0.0) is None


def test_worker_gets_no_more_than_its_capacity() -> None:
    dispatcher = make_dispatcher(make_worker_record(capacity=2))
    for request in (A, B):
        assert pick(dispatcher, 0.0) == "w"
        send(dispatcher, "w", request)
    assert pick(dispatcher, 0.0) is None
    dispatcher.task_done("w", A)
    assert pick(dispatcher, 0.0) == "w"


def test_duplicate_done_returns_one_credit() -> None:
    dispatcher = make_dispatcher(make_worker_record(capacity=2))
    for request in (A, B):
        send(dispatcher, "w", request)
    for _ in range(2):
        dispatcher.task_done("w", A)
    send(dispatcher, "w", C)
    assert pick(dispatcher, 0.0) is None


def test_worker_that_would_finish_first_is_picked() -> None:
    dispatcher = make_dispatcher(
        make_worker_record("slow", capacity=9, task_ms=40.0), make_worker_record("fast", capacity=9, task_ms=10.0)
    )
    picked = []
    for number in range(5):
        worker = pick(dispatcher, 0.0)
        assert worker is not None
        picked.append(worker)
        send(dispatcher, worker, bytes([number]) * 16)
    # With three tasks the fast worker needs 40 ms for a fourth, as the slow one does for its first: the name decides.
    assert picked == ["fast", "fast", "fast", "fast", "slow"]


def test_workers_without_a_reported_time_take_turns() -> None:
    dispatcher = make_dispatcher(make_worker_record("a", task_ms=0.0), make_worker_record("b", task_ms=0.0))
    send(dispatcher, "a", A)
    assert pick(dispatcher, 0.0) == "b"
    send(dispatcher, "b", B)
    assert pick(dispatcher, 0.0) == "a"


def test_avoided_worker_is_picked_only_without_alternative() -> None:
    dispatcher = make_dispatcher(
        make_worker_record("a", capacity=1), make_worker_record("b", capacity=1, task_ms=999.0)
    )
    assert pick(dispatcher, 0.0, frozenset({"a"})) == "b"
    send(dispatcher, "b", A)
    assert pick(dispatcher, 0.0, frozenset({"a"})) == "a"


@pytest.mark.parametrize("state", ["standby", "draining", "stopped"])
def test_worker_that_is_not_up_gets_no_task_and_keeps_its_own(state: str) -> None:
    dispatcher = make_dispatcher(make_worker_record())
    send(dispatcher, "w", A)
    dispatcher.update(make_worker_record(state=state), 0.0)
    assert pick(dispatcher, 0.0) is None
    assert len(dispatcher) == 0
    assert requests(dispatcher.remove("w")) == {A}


def test_credit_is_free_again_after_the_lease() -> None:
    dispatcher = make_dispatcher(make_worker_record(capacity=1), lease_s=5.0)
    send(dispatcher, "w", A)
    assert pick(dispatcher, 5.0) is None
    assert pick(dispatcher, 5.1) == "w"
    assert dispatcher.remove("w") == []


def test_changed_capacity_counts_from_the_next_record() -> None:
    dispatcher = make_dispatcher(make_worker_record(capacity=1))
    send(dispatcher, "w", A)
    dispatcher.update(make_worker_record(capacity=2), 0.0)
    assert pick(dispatcher, 0.0) == "w"
    send(dispatcher, "w", B)
    assert pick(dispatcher, 0.0) is None


def test_idle_worker_with_a_slow_first_task_is_tried_again() -> None:
    dispatcher = make_dispatcher(
        make_worker_record("cold", task_ms=200.0), make_worker_record("warm", capacity=3, task_ms=50.0)
    )
    send(dispatcher, "warm", A)
    assert pick(dispatcher, 0.0) == "warm"  # 100 ms there, 200 ms at the other
    later_s = 2 * ESTIMATE_HALF_LIFE_S
    send(dispatcher, "warm", A, later_s)  # busy all the time
    assert pick(dispatcher, later_s) == "cold"
    send(dispatcher, "cold", B, later_s)
    dispatcher.task_done("cold", B)
    assert pick(dispatcher, later_s) == "warm"


def test_worker_with_an_overdue_task_gets_no_more() -> None:
    dispatcher = make_dispatcher(
        make_worker_record("hangs", capacity=9, task_ms=10.0), make_worker_record("works", capacity=9, task_ms=30.0)
    )
    send(dispatcher, "hangs", A)
    assert pick(dispatcher, 0.005) == "hangs"
    assert pick(dispatcher, 0.1) == "works"


def test_worker_with_another_model_gets_no_task_while_the_first_is_up() -> None:
    dispatcher = make_dispatcher(make_worker_record("b", capacity=1), make_worker_record("a", fingerprint="other"))
    assert pick(dispatcher, 0.0) == "b"
    send(dispatcher, "b", A)
    assert pick(dispatcher, 0.0) is None
    dispatcher.remove("b")
    assert pick(dispatcher, 0.0) == "a"


# Tasks that are lost ------------------------------------------------------------------------------------------------


def test_removed_worker_returns_its_unfinished_tasks_once() -> None:
    dispatcher = make_dispatcher(make_worker_record(), make_worker_record("other"))
    task = send(dispatcher, "w", A, attempt=2)
    send(dispatcher, "w", B)
    dispatcher.task_done("w", B)
    assert dispatcher.remove("w") == [task]
    assert dispatcher.remove("w") == []
    assert pick(dispatcher, 0.0) == "other"


def test_loss_of_an_earlier_attempts_worker_is_not_reported() -> None:
    dispatcher = make_dispatcher(make_worker_record("w"), make_worker_record("v"))
    send(dispatcher, "w", A)
    later = send(dispatcher, "v", A, attempt=2)
    assert dispatcher.remove("w") == []
    assert dispatcher.remove("v") == [later]


def test_late_done_of_an_earlier_attempt_keeps_the_later_one() -> None:
    dispatcher = make_dispatcher(make_worker_record("w"), make_worker_record("v"))
    send(dispatcher, "w", A)
    later = send(dispatcher, "v", A, attempt=2)
    dispatcher.task_done("w", A)
    assert dispatcher.remove("v") == [later]


def test_unknown_workers_change_nothing() -> None:
    dispatcher = make_dispatcher(make_worker_record(capacity=1))
    send(dispatcher, "unknown", A)
    dispatcher.task_done("unknown", A)
    dispatcher.task_done("w", A)
    assert dispatcher.remove("unknown") == []
    assert pick(dispatcher, 0.0) == "w"


@given(st.lists(st.tuples(st.sampled_from(["send", "done", "lost", "up"]), st.integers(0, 2), st.integers(0, 5))))
def test_no_order_of_events_oversubscribes_a_worker_or_loses_a_task(events: list[tuple[str, int, int]]) -> None:
    dispatcher = Dispatcher()
    assigned: dict[str, set[bytes]] = {}
    for event, worker_number, request_number in events:
        worker, request = f"w{worker_number}", bytes([worker_number, request_number]) * 8
        if event == "up":
            dispatcher.update(make_worker_record(worker, capacity=2), 0.0)
            assigned.setdefault(worker, set())
        elif event == "lost":
            assert requests(dispatcher.remove(worker)) == assigned.pop(worker, set())
        elif event == "done":
            dispatcher.task_done(worker, request)
            assigned.get(worker, set()).discard(request)
        elif picked := pick(dispatcher, 0.0):
            assert len(assigned[picked]) < 2
            request = bytes([int(picked[1:]), request_number]) * 8  # one request is at one worker at a time
            send(dispatcher, picked, request)
            assigned[picked].add(request)
        else:
            assert all(len(held) == 2 for held in assigned.values())


# Isolation ----------------------------------------------------------------------------------------------------------


def test_isolated_request_gets_an_empty_worker_to_itself() -> None:
    dispatcher = make_dispatcher(make_worker_record("a", capacity=3), make_worker_record("b", capacity=3))
    send(dispatcher, "a", A)
    assert pick(dispatcher, 0.0, isolate=B) == "b"
    send(dispatcher, "b", B)
    for _ in range(2):
        assert pick(dispatcher, 0.0) == "a"
        send(dispatcher, "a", C)
    dispatcher.task_done("b", B)
    assert pick(dispatcher, 0.0) == "b"


def test_worker_is_reserved_until_it_is_empty() -> None:
    dispatcher = make_dispatcher(make_worker_record("a", capacity=3))
    send(dispatcher, "a", A)
    assert pick(dispatcher, 0.0, isolate=B) is None
    assert pick(dispatcher, 0.0) is None  # though it has credit for two more
    dispatcher.task_done("a", A)
    assert pick(dispatcher, 0.0) is None
    assert pick(dispatcher, 0.0, isolate=B) == "a"


def test_cancelled_reservation_frees_the_worker() -> None:
    dispatcher = make_dispatcher(make_worker_record("a"))
    pick(dispatcher, 0.0, isolate=B)
    dispatcher.cancel_reservation(B)
    assert pick(dispatcher, 0.0) == "a"


def test_reserved_worker_that_drains_is_replaced() -> None:
    dispatcher = make_dispatcher(make_worker_record("a"), make_worker_record("b"))
    send(dispatcher, "a", A)
    send(dispatcher, "b", C)
    assert pick(dispatcher, 0.0, isolate=B) is None
    dispatcher.update(make_worker_record("a", state="draining"), 0.0)
    dispatcher.task_done("b", C)
    assert pick(dispatcher, 0.0, isolate=B) == "b"


# Gaps ---------------------------------------------------------------------------------------------------------------


def load(*, queue: int = 0, done: int = 0) -> WorkerRecord:
    """The record of a worker with capacity for three tasks."""
    return make_worker_record(capacity=3, load=WorkerLoad(task_ms=10.0, queue=queue, done=done))


def test_credit_is_free_after_a_gap() -> None:
    dispatcher = make_dispatcher(make_worker_record(capacity=1))
    send(dispatcher, "w", A)
    dispatcher.update(make_worker_record(capacity=1), 1.0)
    assert pick(dispatcher, 1.0) is None
    dispatcher.update(make_worker_record(capacity=1), 5.0, gap=True)
    assert pick(dispatcher, 5.0) == "w"


def test_task_sent_before_a_gap_is_lost_with_its_worker() -> None:
    """Otherwise a request that blocks its worker before it kills it would never be blamed."""
    dispatcher = make_dispatcher(make_worker_record())
    assert pick(dispatcher, 0.0, isolate=A) == "w"
    task = send(dispatcher, "w", A)
    dispatcher.update(make_worker_record(), 4.0, gap=True)
    assert dispatcher.remove("w") == [task]


@pytest.mark.parametrize(("done", "is_uncertain"), [(12, True), (13, False)])
def test_task_sent_before_a_gap_is_settled_by_the_done_count(done: int, is_uncertain: bool) -> None:
    """At the gap 10 tasks were done, 2 in the queue and at most 1 being computed."""
    dispatcher = make_dispatcher(make_worker_record(capacity=3))
    send(dispatcher, "w", A)
    dispatcher.update(load(queue=2, done=10), 4.0, gap=True)
    dispatcher.update(load(queue=2, done=done), 5.0)
    assert bool(dispatcher.remove("w")) is is_uncertain


def test_worker_with_repeated_gaps_is_not_given_every_request() -> None:
    dispatcher, sent = make_dispatcher(make_worker_record(capacity=3)), 0
    for number in range(10):
        dispatcher.update(load(queue=max(0, sent - 1)), float(number), gap=True)
        while pick(dispatcher, float(number)):
            send(dispatcher, "w", bytes([sent]) * 16, float(number))
            sent += 1
    assert sent <= 4, "its capacity, and the batch that it may have finished"
