"""What becomes of a request after a failure: again, after how long, or given back, and as what."""

from __future__ import annotations

import pytest

from brokers.errors import DeadlinePassed, RequestFailed
from brokers.protocol.messages import Failure
from sources.client.pending_request import RETRY_LIMIT, PendingRequest, PoisonRequest

REQUEST = b"r" * 16


def failure(error: str, worker: str, *, retry: bool = True) -> Failure:
    return Failure(request_id=REQUEST, stage="body", worker=worker, error=error, reason="why", retry=retry)


def test_one_that_three_workers_did_not_come_back_from_is_poison() -> None:
    flight = PendingRequest(REQUEST, 0.0, None)
    for number in range(1, RETRY_LIMIT):
        assert flight.retry_delay(failure("WorkerLost", f"w{number}")) == 0
    with pytest.raises(PoisonRequest) as caught:
        flight.retry_delay(failure("NoAnswer", "w3"))
    assert caught.value.workers == ("w1", "w2", "w3")
    assert str(caught.value) == (
        f"request {REQUEST.hex()} failed at stage 'body': PoisonRequest: "
        "3 workers in turn did not come back from it: w1, w2, w3"
    )


def test_one_that_fails_otherwise_in_between_is_no_poison() -> None:
    flight = PendingRequest(REQUEST, 0.0, None)
    flight.retry_delay(failure("WorkerLost", "w1"))
    flight.retry_delay(failure("BadChunk", "w2"))
    with pytest.raises(RequestFailed) as caught:
        flight.retry_delay(failure("WorkerLost", "w3"))
    assert not isinstance(caught.value, PoisonRequest)


def test_what_no_other_worker_could_do_is_given_back_at_once() -> None:
    with pytest.raises(RequestFailed, match="ValueError: why"):
        PendingRequest(REQUEST, 0.0, None).retry_delay(failure("ValueError", "w1", retry=False))


def test_an_exception_of_a_stage_that_is_called_as_being_turned_away_is_one_is_given_back() -> None:
    with pytest.raises(RequestFailed, match="Busy: why"):
        PendingRequest(REQUEST, 0.0, None).retry_delay(failure("Busy", "w1", retry=False))


def test_a_deadline_that_a_worker_saw_pass_first_is_a_deadline_that_passed() -> None:
    with pytest.raises(DeadlinePassed, match="had 50 ms, which passed at stage 'body'"):
        PendingRequest(REQUEST, 0.0, 50.0).retry_delay(failure("DeadlinePassed", "w1", retry=False))
    with pytest.raises(RequestFailed):  # it had none: an exception of a stage that is called so
        PendingRequest(REQUEST, 0.0, None).retry_delay(failure("DeadlinePassed", "w1", retry=False))


def test_being_turned_away_is_no_failure_and_the_wait_grows_to_a_second() -> None:
    flight = PendingRequest(REQUEST, 0.0, None)
    waits = [flight.retry_delay(failure(error, "w")) for error in ("Busy", "Draining") * 10]
    assert waits[:6] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0]
    assert waits[-1] == 1.0
    assert flight.avoid == {"w"}
