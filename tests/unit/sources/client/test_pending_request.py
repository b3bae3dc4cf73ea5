"""Retries of a request: which failures are retried, after which delay, and what it ends with."""

from __future__ import annotations

import pytest

from brokers.errors import DeadlinePassed, RequestFailed
from brokers.protocol.messages import JSON, BinaryContent, Failure
from sources.client.pending_request import RETRY_LIMIT, PendingRequest, PoisonRequest

REQUEST = b"r" * 16


def failure(error: str, worker: str, *, retry: bool = True) -> Failure:
    return Failure(request_id=REQUEST, stage="body", worker=worker, error=error, reason="why", retry=retry)


def make_request(deadline_ms: float | None = None) -> PendingRequest:
    return PendingRequest(BinaryContent(JSON, b"1"), "door", deadline_ms, request_id=REQUEST)


def test_request_that_loses_three_workers_is_poison() -> None:
    request = make_request()
    for number in range(1, RETRY_LIMIT):
        assert request.retry_delay(failure("WorkerLost", f"w{number}")) == 0
    with pytest.raises(PoisonRequest) as caught:
        request.retry_delay(failure("NoAnswer", "w3"))
    assert caught.value.workers == ("w1", "w2", "w3")
    assert (caught.value.code, caught.value.error, caught.value.stage) == ("PoisonRequest", "PoisonRequest", "body")
    assert "3 workers in turn did not answer it: w1, w2, w3" in str(caught.value)


def test_request_with_another_failure_in_between_is_not_poison() -> None:
    request = make_request()
    request.retry_delay(failure("WorkerLost", "w1"))
    request.retry_delay(failure("BadChunk", "w2"))
    with pytest.raises(RequestFailed) as caught:
        request.retry_delay(failure("WorkerLost", "w3"))
    assert not isinstance(caught.value, PoisonRequest)


@pytest.mark.parametrize("error", ["ValueError", "Busy"])  # an executor may raise an exception called Busy
def test_permanent_failure_is_raised_at_once(error: str) -> None:
    with pytest.raises(RequestFailed) as caught:
        make_request().retry_delay(failure(error, "w1", retry=False))
    assert (caught.value.error, caught.value.reason, caught.value.worker) == (error, "why", "w1")


def test_deadline_that_passed_at_a_worker_is_raised_as_deadline() -> None:
    passed = failure("DeadlinePassed", "w1", retry=False)
    with pytest.raises(DeadlinePassed) as caught:
        make_request(50.0).retry_delay(passed)
    assert (caught.value.deadline_ms, caught.value.fields["where"]) == (50.0, "stage 'body'")
    with pytest.raises(RequestFailed):  # without a deadline it is an exception of that name
        make_request().retry_delay(passed)


def test_task_has_the_time_that_is_left() -> None:
    for deadline_ms in (None, 300_000.0):  # longer than a request without a deadline waits for a worker
        request = make_request(deadline_ms)
        request.started_s -= 10.0
        request.start_attempt()
        left_ms = None if deadline_ms is None else pytest.approx(deadline_ms - 10_000, abs=5_000)
        assert request.make_task("inbox").deadline_ms == left_ms


def test_refusals_back_off_and_do_not_count_as_failures() -> None:
    request = make_request()
    delays_s = [request.retry_delay(failure(error, "w")) for error in ("Busy", "Draining") * 10]
    assert delays_s[:6] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0]
    assert delays_s[-1] == 1.0
    assert request.avoid == {"w"}
