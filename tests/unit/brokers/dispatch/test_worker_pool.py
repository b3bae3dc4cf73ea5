"""Which worker gets what: the one that is done first among those with room; and what those that are gone had."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brokers.dispatch.presence import WorkerLoad, WorkerRecord
from brokers.dispatch.worker_pool import (
    ESTIMATE_HALF_LIFE_S,
    LEASE_S,
    PRESENCE_GAP_S,
    PRESENCE_TIMEOUT_S,
    WORKERS_LIMIT,
    Dispatcher,
)
from brokers.errors import BadPayload, WireError
from tests.support.errors import raises_error

A, B, C = (bytes([number]) * 16 for number in range(3))


def make_worker_record(
    worker: str = "w", *, capacity: int = 2, task_ms: float = 10.0, pid: int = 1, **fields: Any
) -> WorkerRecord:
    return WorkerRecord(
        worker=worker, stage="head", pipeline="street", site="local", node="n", pid=pid, device="cpu", fingerprint="f",
        capacity=capacity, load=WorkerLoad(task_ms=task_ms), **fields,
    )  # fmt: skip


def loaded(*, queue: int = 0, done: int = 0) -> WorkerRecord:
    """A worker with room for three, and what it says of itself."""
    return make_worker_record(capacity=3).model_copy(update={"load": WorkerLoad(task_ms=10.0, queue=queue, done=done)})


def workers(*births: WorkerRecord) -> Dispatcher:
    dispatcher = Dispatcher()
    for each in births:
        assert dispatcher.update(each, 0.0) == set()
    return dispatcher


# Picking ------------------------------------------------------------------------------------------------------------


def test_nobody_is_picked_where_nobody_is() -> None:
    assert Dispatcher().pick(0.0) is None


def test_a_worker_gets_no_more_than_its_capacity_until_it_is_done() -> None:
    dispatcher = workers(make_worker_record(capacity=2))
    for request in (A, B):
        assert dispatcher.pick(0.0) == "w"
        dispatcher.task_sent("w", request, 0.0)
    assert dispatcher.pick(0.0) is None
    dispatcher.task_done("w", A)
    assert dispatcher.pick(0.0) == "w"


def test_the_same_word_twice_frees_one_place_only() -> None:
    dispatcher = workers(make_worker_record(capacity=2))
    for request in (A, B):
        dispatcher.task_sent("w", request, 0.0)
    for _ in range(2):
        dispatcher.task_done("w", A)
    dispatcher.task_sent("w", C, 0.0)
    assert dispatcher.pick(0.0) is None


def test_the_worker_that_would_be_done_first_is_picked() -> None:
    dispatcher = workers(
        make_worker_record("slow", capacity=9, task_ms=40.0), make_worker_record("fast", capacity=9, task_ms=10.0)
    )
    picked = []
    for number in range(5):
        worker = dispatcher.pick(0.0)
        assert worker is not None
        picked.append(worker)
        dispatcher.task_sent(worker, bytes([number]) * 16, 0.0)
    # After three tasks the fast one needs 40 ms for a fourth, as the slow one does for its first: the name decides.
    assert picked == ["fast", "fast", "fast", "fast", "slow"]


def test_workers_that_have_not_reported_a_time_are_dealt_in_turn() -> None:
    dispatcher = workers(make_worker_record("a", task_ms=0.0), make_worker_record("b", task_ms=0.0))
    dispatcher.task_sent("a", A, 0.0)
    assert dispatcher.pick(0.0) == "b"
    dispatcher.task_sent("b", B, 0.0)
    assert dispatcher.pick(0.0) == "a"


def test_one_to_be_avoided_is_picked_only_where_there_is_no_choice() -> None:
    dispatcher = workers(make_worker_record("a", capacity=1), make_worker_record("b", capacity=1, task_ms=999.0))
    assert dispatcher.pick(0.0, frozenset({"a"})) == "b"
    dispatcher.task_sent("b", A, 0.0)
    assert dispatcher.pick(0.0, frozenset({"a"})) == "a"


@pytest.mark.parametrize("state", ["draining", "stopped"])
def test_a_worker_that_leaves_gets_nothing_and_keeps_what_it_has(state: str) -> None:
    dispatcher = workers(make_worker_record())
    dispatcher.task_sent("w", A, 0.0)
    assert dispatcher.update(make_worker_record(state=state), 0.0) == set()
    assert dispatcher.pick(0.0) is None
    assert len(dispatcher) == 0
    assert dispatcher.remove("w") == {A}


def test_room_that_nobody_gave_back_is_free_after_a_lease() -> None:
    dispatcher = workers(make_worker_record(capacity=1))
    dispatcher.task_sent("w", A, 0.0)
    assert dispatcher.pick(LEASE_S) is None
    assert dispatcher.pick(LEASE_S + 0.1) == "w"


# Births and deaths --------------------------------------------------------------------------------------------------


def test_a_report_of_load_loses_nothing_and_counts_from_then_on() -> None:
    dispatcher = workers(make_worker_record(capacity=1))
    dispatcher.task_sent("w", A, 0.0)
    assert dispatcher.update(make_worker_record(capacity=2), 0.0) == set()
    assert dispatcher.pick(0.0) == "w"
    dispatcher.task_sent("w", B, 0.0)
    assert dispatcher.pick(0.0) is None


def test_a_worker_that_dies_gives_back_what_it_had_once() -> None:
    dispatcher = workers(make_worker_record(), make_worker_record("other"))
    dispatcher.task_sent("w", A, 0.0)
    dispatcher.task_sent("w", B, 0.0)
    dispatcher.task_done("w", B)
    assert dispatcher.remove("w") == {A}
    assert dispatcher.remove("w") == set()
    assert dispatcher.pick(0.0) == "other"


def test_a_worker_that_was_born_again_has_lost_what_it_had() -> None:
    dispatcher = workers(make_worker_record(pid=1))
    dispatcher.task_sent("w", A, 0.0)
    assert dispatcher.update(make_worker_record(pid=2), 0.0) == {A}
    dispatcher.task_sent("w", B, 0.0)
    assert dispatcher.update(make_worker_record(pid=2, instance="another container"), 0.0) == {B}
    assert dispatcher.remove("w") == set()


def test_a_worker_that_is_not_heard_of_for_long_is_silent_until_it_is() -> None:
    dispatcher = workers(make_worker_record("a"), make_worker_record("b"))
    dispatcher.update(make_worker_record("b"), PRESENCE_TIMEOUT_S)
    assert dispatcher.timed_out(PRESENCE_TIMEOUT_S) == []
    assert dispatcher.timed_out(PRESENCE_TIMEOUT_S + 0.1) == ["a"]
    dispatcher.update(make_worker_record("a"), PRESENCE_TIMEOUT_S + 0.2)
    assert dispatcher.timed_out(PRESENCE_TIMEOUT_S + 0.3) == []


def test_a_connection_that_breaks_leaves_nobody_and_nothing_in_anybodys_hands() -> None:
    dispatcher = workers(make_worker_record("a", capacity=1), make_worker_record("b", capacity=1))
    dispatcher.task_sent("a", A, 0.0)
    dispatcher.task_sent("b", B, 0.0)
    assert dispatcher.reset() == {A, B}
    assert dispatcher.pick(0.0) is None
    dispatcher.update(make_worker_record("a", capacity=1), 0.0)
    assert dispatcher.pick(0.0) == "a"


def test_words_about_strangers_change_nothing() -> None:
    dispatcher = workers(make_worker_record(capacity=1))
    dispatcher.task_sent("stranger", A, 0.0)
    dispatcher.task_done("stranger", A)
    dispatcher.task_done("w", A)
    assert dispatcher.remove("stranger") == set()
    assert dispatcher.pick(0.0) == "w"


@given(st.lists(st.tuples(st.sampled_from(["send", "done", "die", "born"]), st.integers(0, 2), st.integers(0, 5))))
def test_no_order_of_words_oversubscribes_a_worker_or_loses_a_request(events: list[tuple[str, int, int]]) -> None:
    dispatcher = Dispatcher()
    in_hand: dict[str, set[bytes]] = {}
    for event, number, id_number in events:
        worker, request = f"w{number}", bytes([id_number]) * 16
        if event == "born":
            dispatcher.update(make_worker_record(worker, capacity=2), 0.0)
            in_hand.setdefault(worker, set())
        elif event == "die":
            assert dispatcher.remove(worker) == in_hand.pop(worker, set())
        elif event == "done":
            dispatcher.task_done(worker, request)
            in_hand.get(worker, set()).discard(request)
        elif picked := dispatcher.pick(0.0):
            assert len(in_hand[picked]) < 2
            dispatcher.task_sent(picked, request, 0.0)
            in_hand[picked].add(request)
        else:
            assert all(len(requests) == 2 for requests in in_hand.values())


# The record ---------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was() -> None:
    found = make_worker_record("w.1_-Z")
    assert WorkerRecord.from_bytes(found.to_bytes()) == found


def test_fields_of_a_later_version_are_read_over() -> None:
    record = json.loads(make_worker_record().to_bytes())
    record["gpu_memory"] = 5
    record["load"]["watts"] = None
    assert WorkerRecord.from_bytes(json.dumps(record).encode()) == make_worker_record()


BAD_NAMES = [{"worker": "a/b"}, {"worker": "#"}, {"worker": ""}, {"worker": "a\n"}, {"stage": "+"}, {"pipeline": "ü"}]
BAD_TYPES = [{"worker": 5}, {"capacity": 0}, {"capacity": "many"}, {"state": "asleep"}, {"pid": None}, {"load": 5}]
BAD_LOADS = [{"task_ms": -1}, {"busy": 2}, {"task_ms": float("nan")}, {"rate": float("inf")}, {"queue": 0.5}]


@pytest.mark.parametrize("change", BAD_NAMES + BAD_TYPES + [{"load": load} for load in BAD_LOADS], ids=str)
def test_a_record_that_is_none_is_refused_with_the_field(change: dict[str, Any]) -> None:
    record = json.dumps({**json.loads(make_worker_record().to_bytes()), **change}).encode()
    with pytest.raises(BadPayload, match=f"not a presence record: {next(iter(change))}"):
        WorkerRecord.from_bytes(record)


@pytest.mark.parametrize("field", ["worker", "stage", "pipeline", "site", "node", "pid", "device", "capacity"])
def test_a_record_with_a_field_missing_is_refused(field: str) -> None:
    record = json.loads(make_worker_record().to_bytes())
    del record[field]
    with pytest.raises(BadPayload, match=f"{field}: Field required"):
        WorkerRecord.from_bytes(json.dumps(record).encode())


def test_a_worker_of_another_version_is_told_from_garbage() -> None:
    with raises_error(WireError, "VersionMismatch", match="'2'"):
        WorkerRecord.from_bytes(make_worker_record(version="2").to_bytes())


@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_but_a_wire_error(payload: bytes) -> None:
    for candidate in (payload, b"{" + payload, b"[" * 100_000):
        with pytest.raises(WireError):
            WorkerRecord.from_bytes(candidate)


def test_a_worker_whose_first_task_was_slow_is_tried_again_after_a_while() -> None:
    """Its time changes only when it gets something to do."""
    dispatcher = workers(
        make_worker_record("cold", task_ms=200.0), make_worker_record("warm", capacity=3, task_ms=50.0)
    )
    dispatcher.task_sent("warm", A, 0.0)
    assert dispatcher.pick(0.0) == "warm"  # 100 ms there, 200 here
    dispatcher.task_sent("warm", A, 2 * ESTIMATE_HALF_LIFE_S)  # it has been at work all the while
    assert dispatcher.pick(2 * ESTIMATE_HALF_LIFE_S) == "cold"
    dispatcher.task_sent("cold", B, 2 * ESTIMATE_HALF_LIFE_S)
    dispatcher.task_done("cold", B)
    assert dispatcher.pick(2 * ESTIMATE_HALF_LIFE_S) == "warm"


def test_a_worker_that_has_had_something_for_long_gets_nothing_more_while_another_is_sooner_done() -> None:
    dispatcher = workers(
        make_worker_record("hangs", capacity=9, task_ms=10.0), make_worker_record("works", capacity=9, task_ms=30.0)
    )
    dispatcher.task_sent("hangs", A, 0.0)
    assert dispatcher.pick(0.005) == "hangs"
    assert dispatcher.pick(0.1) == "works"


# Alone --------------------------------------------------------------------------------------------------------------


def test_a_request_that_must_be_alone_gets_a_worker_that_has_nothing_else_and_nothing_else_comes_to_it() -> None:
    dispatcher = workers(make_worker_record("a", capacity=3), make_worker_record("b", capacity=3))
    dispatcher.task_sent("a", A, 0.0)
    assert dispatcher.pick(0.0, isolate=B) == "b"
    dispatcher.task_sent("b", B, 0.0)
    for _ in range(2):
        assert dispatcher.pick(0.0) == "a"
        dispatcher.task_sent("a", C, 0.0)
    dispatcher.task_done("b", B)
    assert dispatcher.pick(0.0) == "b"


def test_a_worker_is_kept_free_for_it_until_it_is_empty() -> None:
    dispatcher = workers(make_worker_record("a", capacity=3))
    dispatcher.task_sent("a", A, 0.0)
    assert dispatcher.pick(0.0, isolate=B) is None
    assert dispatcher.pick(0.0) is None  # though it has room for two more
    dispatcher.task_done("a", A)
    assert dispatcher.pick(0.0) is None
    assert dispatcher.pick(0.0, isolate=B) == "a"


def test_a_worker_kept_for_a_request_that_does_not_come_is_free_again() -> None:
    dispatcher = workers(make_worker_record("a"))
    dispatcher.pick(0.0, isolate=B)
    dispatcher.cancel_reservation(B)
    assert dispatcher.pick(0.0) == "a"


def test_one_that_is_kept_and_leaves_is_no_longer_waited_for() -> None:
    dispatcher = workers(make_worker_record("a"), make_worker_record("b"))
    dispatcher.task_sent("a", A, 0.0)
    dispatcher.task_sent("b", A, 0.0)
    assert dispatcher.pick(0.0, isolate=B) is None
    dispatcher.update(make_worker_record("a", state="draining"), 0.0)
    dispatcher.task_done("b", A)
    assert dispatcher.pick(0.0, isolate=B) == "b"


# Strangers ----------------------------------------------------------------------------------------------------------


def test_a_worker_with_another_model_gets_nothing_while_the_one_that_was_first_is_up() -> None:
    dispatcher = workers(
        make_worker_record("b", capacity=1),
        WorkerRecord(**{**make_worker_record("a").model_dump(), "fingerprint": "other"}),
    )
    assert dispatcher.pick(0.0) == "b"
    dispatcher.task_sent("b", A, 0.0)
    assert dispatcher.pick(0.0) is None
    dispatcher.remove("b")
    assert dispatcher.pick(0.0) == "a"


def test_invented_workers_cost_no_memory_without_end() -> None:
    dispatcher = Dispatcher()
    for number in range(WORKERS_LIMIT + 10):
        dispatcher.update(make_worker_record(f"w{number}"), 0.0)
    assert len(dispatcher) == WORKERS_LIMIT


def test_a_lease_of_ones_own_is_kept_to() -> None:
    dispatcher = Dispatcher(lease_s=5.0)
    dispatcher.update(make_worker_record(capacity=1), 0.0)
    dispatcher.task_sent("w", A, 0.0)
    assert dispatcher.pick(5.0) is None
    assert dispatcher.is_assigned("w", A)
    assert dispatcher.pick(5.1) == "w"
    assert not dispatcher.is_assigned("w", A)


# Records that are lost on their way ---------------------------------------------------------------------------------


def test_a_worker_that_is_heard_again_after_a_gap_may_have_done_what_it_had() -> None:
    dispatcher = workers(make_worker_record(capacity=1))
    dispatcher.task_sent("w", A, 0.5)
    assert not dispatcher.has_gap(make_worker_record(capacity=1), 1.0)
    dispatcher.update(make_worker_record(capacity=1), 1.0)
    assert dispatcher.pick(1.0) is None
    assert dispatcher.has_gap(make_worker_record(capacity=1), 1.0 + PRESENCE_GAP_S + 0.1)
    assert dispatcher.update(make_worker_record(capacity=1), 1.0 + PRESENCE_GAP_S + 0.1) == set(), (
        "it is the same life: nothing is lost for sure"
    )
    assert dispatcher.pick(5.0) == "w"


def test_what_a_worker_may_have_had_before_a_gap_is_told_when_it_dies() -> None:
    dispatcher = workers(make_worker_record())
    assert dispatcher.pick(0.0, isolate=A) == "w"
    dispatcher.task_sent("w", A, 0.5)
    dispatcher.update(make_worker_record(), 1.0 + PRESENCE_GAP_S)
    assert dispatcher.is_assigned("w", A)
    assert dispatcher.remove("w") == {A}, "else a request that chokes its worker before it kills it is never blamed"


def test_what_a_worker_had_before_a_gap_is_forgotten_when_it_has_done_all_of_then() -> None:
    dispatcher = workers(make_worker_record(capacity=3))
    dispatcher.task_sent("w", A, 0.5)
    dispatcher.update(loaded(queue=2, done=10), 1.0 + PRESENCE_GAP_S)
    for done, held in ((12, True), (13, False)):
        dispatcher.update(loaded(queue=2, done=done), 2.0 + PRESENCE_GAP_S)
        assert dispatcher.is_assigned("w", A) is held


def test_a_worker_that_comes_through_late_again_and_again_is_not_given_all_there_is() -> None:
    dispatcher, given = workers(make_worker_record(capacity=3)), 0
    for number in range(10):
        now_s = number * (PRESENCE_GAP_S + 1)
        dispatcher.update(loaded(queue=max(0, given - 1)), now_s)
        while dispatcher.pick(now_s):
            dispatcher.task_sent("w", bytes([given]) * 16, now_s)
            given += 1
    assert given <= 4, "its capacity, and the batch that it may be done with"


def test_nobody_misses_records_of_a_worker_that_is_not_known() -> None:
    assert not Dispatcher().has_gap(make_worker_record(), 100.0)


def test_a_worker_that_had_lost_its_broker_may_have_done_what_it_had_however_soon_it_is_back() -> None:
    dispatcher = workers(make_worker_record(capacity=1))
    dispatcher.task_sent("w", A, 0.5)
    back = make_worker_record(capacity=1, reconnects=1)
    assert dispatcher.has_gap(back, 1.0)
    assert dispatcher.update(back, 1.0) == set()
    assert dispatcher.pick(1.0) == "w"
    assert not dispatcher.has_gap(back, 2.0)


def test_another_life_of_a_worker_has_missed_nothing() -> None:
    dispatcher = workers(make_worker_record(pid=1, reconnects=3))
    assert not dispatcher.has_gap(make_worker_record(pid=2), 1.0)
