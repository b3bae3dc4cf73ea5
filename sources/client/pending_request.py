"""The requests of a source, each from its first attempt to its result, and the table that matches responses to them."""

import asyncio
import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field

from brokers.dispatch.dispatcher import LostTask
from brokers.dispatch.presence import OTHER_REASON, REASON_LIMIT
from brokers.errors import DeadlinePassed, Disconnected, RequestFailed, WireError, error_code
from brokers.process.backoff import Backoff
from brokers.protocol.messages import (
    Content,
    Failure,
    Message,
    Priority,
    ReplyTo,
    Result,
    Task,
    check_priority,
    new_request_id,
)
from brokers.protocol.traceparent import TraceContext, start_span
from brokers.protocol.transport import Properties
from brokers.telemetry.client import EventClient

# Retryable failures after which a request is given up.
RETRY_LIMIT = 3
# Refusals: the worker did not attempt the task, so they do not count as failures; retries back off instead.
_REFUSED = frozenset({"Busy", "Draining"})
_REFUSED_FIRST_DELAY_S = 0.05
_REFUSED_LONGEST_DELAY_S = 1.0
# Failures in which the worker never answered: three of these make a poison request.
_UNANSWERED = frozenset({"WorkerLost", "NoAnswer"})
# After a worker of a later stage was lost, a request that takes much longer than recent ones is sent again: the worker
# that would have reported it lost may be lost too. The timeout is the slowest recent latency times the factor.
OVERDUE_MIN_S = 2.0
OVERDUE_FACTOR = 3.0
_RECENT_LATENCIES = 100
_REASON_CHARACTERS = 64


class PoisonRequest(RequestFailed):
    """A request that `workers`, one after the other, did not answer: it may have killed them, and is not retried."""

    def __init__(self, request: str, stage: str, workers: tuple[str, ...]) -> None:
        reason = f"{len(workers)} workers in turn did not answer it: {', '.join(workers)}"
        super().__init__(request, stage, workers[-1], "PoisonRequest", reason)
        self.workers = workers


@dataclass(slots=True, eq=False)
class PendingRequest:
    """A request that its source owns, pending until `result` is set; `latency_ms` is set when it ends either way.

    `responses` holds the responses to the current attempt; a string is the reason for a retry without a failure.
    `trace` is the span of the request, a child of `parent` where there is one.
    """

    content: Content
    source: str
    deadline_ms: float | None = None
    priority: Priority = "interactive"
    parent: TraceContext | None = None
    request_id: bytes = field(default_factory=new_request_id)
    started_s: float = field(default_factory=time.monotonic)
    trace: TraceContext = field(init=False)
    result: Result = field(init=False)
    latency_ms: float = 0.0
    attempt: int = 0
    worker: str = ""
    avoid: set[str] = field(default_factory=set)
    responses: asyncio.Queue[Result | Failure | Disconnected | str] = field(default_factory=asyncio.Queue)
    _failures: list[Failure] = field(default_factory=list)
    _backoff: Backoff = field(default_factory=lambda: Backoff(_REFUSED_FIRST_DELAY_S, _REFUSED_LONGEST_DELAY_S))

    def __post_init__(self) -> None:
        check_priority(self.priority)
        self.trace = start_span(self.request_id, self.parent)

    def start_attempt(self) -> None:
        """Count an attempt and discard the responses to earlier ones, except those that end the request."""
        self.attempt += 1
        responses = [self.responses.get_nowait() for _ in range(self.responses.qsize())]
        for response in responses:
            if isinstance(response, Result | Disconnected):
                self.responses.put_nowait(response)

    def fail_attempt(self, stage: str, worker: str, error: str, reason: str) -> None:
        """Record a retryable failure of the current attempt."""
        failure = Failure(
            request_id=self.request_id,
            stage=stage,
            worker=worker,
            error=error,
            reason=reason,
            attempt=self.attempt,
            retry=True,
        )
        self.responses.put_nowait(failure)

    def trigger_retry(self, reason: str) -> None:
        """Have the request sent again without blaming a worker, unless a response has arrived."""
        if self.attempt and self.responses.empty():
            self.responses.put_nowait(reason)

    def retry_delay(self, failure: Failure) -> float:
        """The delay before the next attempt, in seconds.

        Raises `RequestFailed`, `PoisonRequest` or `DeadlinePassed` where no further attempt would help.
        """
        self.avoid.add(failure.worker)
        if failure.retry and failure.error in _REFUSED:  # not an exception of the same name, raised by an executor
            return self._backoff.next_s()
        self._failures.append(failure)
        if failure.retry and len(self._failures) < RETRY_LIMIT:
            return 0.0
        request = self.request_id.hex()
        if failure.error == DeadlinePassed.__name__ and self.deadline_ms is not None:  # a worker noticed it first
            raise self.deadline_passed(f"stage {failure.stage!r}")
        if failure.retry and all(each.error in _UNANSWERED for each in self._failures):
            raise PoisonRequest(request, failure.stage, tuple(each.worker for each in self._failures))
        raise RequestFailed(request, failure.stage, failure.worker, failure.error, failure.reason)

    def remaining_s(self, limit_s: float) -> float:
        """Seconds until the deadline, at most `limit_s`."""
        if self.deadline_ms is None:
            return limit_s
        return min(limit_s, self.deadline_ms / 1000 - (time.monotonic() - self.started_s))

    def deadline_passed(self, where: str) -> DeadlinePassed:
        """The error of a request whose deadline passed at `where`."""
        assert self.deadline_ms is not None
        return DeadlinePassed(self.request_id.hex(), self.deadline_ms, where)

    def make_task(self, inbox: str) -> Task:
        """The task of the current attempt; responses go to `inbox`."""
        return Task(
            request_id=self.request_id,
            content=self.content,
            reply_to=ReplyTo(inbox),
            sender_inbox=inbox,
            source=self.source,
            attempt=self.attempt,
            deadline_ms=None if self.deadline_ms is None else 1000 * self.remaining_s(math.inf),
            priority=self.priority,
            trace=self.trace,
        )

    def emit_done(self, events: EventClient, error: BaseException | None) -> None:
        """Emit the event `request_done`: the request has ended, with its result or with `error`."""
        hops = () if error else self.result.hops
        # The remainder of the round trip; hops are measured by other clocks, so it may come out negative.
        network_ms = max(0.0, self.latency_ms - sum(hop.total_ms for hop in hops)) if hops else 0.0
        events.emit(
            "request_done",
            request=self.request_id,
            latency_ms=round(self.latency_ms, 3),
            network_ms=round(network_ms, 3),
            attempts=self.attempt,
            bytes_out=self.content.nbytes,
            error=failure_code(error) if error else "",
            hops=hops,
            trace=self.trace.trace_id,
            span=self.trace.span_id,
            parent=self.parent.span_id if self.parent else "",
        )


def failure_code(error: BaseException) -> str:
    """The code of what a request ended with; for `RequestFailed` that of the failure at the stage."""
    return error.error if isinstance(error, RequestFailed) else error_code(error)


def count_bounded(counts: Counter[str], reason: str) -> None:
    """Count `reason`, within `REASON_LIMIT` keys: reasons come from other processes and may be any text."""
    known = reason in counts or len(counts) < REASON_LIMIT
    counts[reason[:_REASON_CHARACTERS] if known else OTHER_REASON] += 1


class RequestTable(dict[bytes, PendingRequest]):
    """The pending requests by id. The first result counts; later duplicates are dropped and counted."""

    def __init__(self, lease_s: float) -> None:
        super().__init__()
        self.counters: Counter[str] = Counter()
        self.latencies_s: deque[float] = deque(maxlen=_RECENT_LATENCIES)
        self._lease_s = lease_s

    def on_message(self, message: Message) -> None:
        request = self.get(message.request_id)
        if request is None:
            # A second result: an attempt that was believed lost was answered after a later one.
            self.counters["duplicates"] += 1
        elif isinstance(message, Result) or (isinstance(message, Failure) and message.attempt == request.attempt):
            request.responses.put_nowait(message)
        else:
            self.counters["unexpected"] += 1

    def on_malformed(self, error: WireError, properties: Properties) -> None:
        """A response that cannot be decoded fails the attempt."""
        if request := self.get(properties.correlation_data):
            request.fail_attempt("?", "?", error.code, f"its result: {error}")

    def on_task_lost(self, lost: LostTask) -> None:
        """The worker that held the task is lost."""
        if lost.cause == "disconnected":
            return  # `on_reconnect` retries every request
        request = self.get(lost.request)
        if request is not None and lost.attempt == request.attempt:
            reason = f"worker {lost.worker!r} was lost while it held the request"
            request.fail_attempt(lost.stage, lost.worker, "WorkerLost", reason)

    async def on_reconnect(self) -> None:
        """Retry every request: messages in transit when the connection broke may be lost."""
        for request in self.values():
            request.trigger_retry("Reconnected")

    def fail_all(self, error: Disconnected) -> None:
        """End every request with `error`."""
        for request in self.values():
            request.responses.put_nowait(error)

    def schedule_overdue_retries(self) -> None:
        """Retry the present requests that stay without a response: a worker of a later stage was lost, or a bridge."""
        timeout_s = self._lease_s / 4
        if self.latencies_s:
            # Capped: the slowest recent request may itself have waited for a lost one.
            timeout_s = min(timeout_s, max(OVERDUE_MIN_S, OVERDUE_FACTOR * max(self.latencies_s)))
        loop = asyncio.get_running_loop()
        for request in self.values():
            loop.call_later(timeout_s, self._retry_overdue, request.request_id, request.attempt)

    def _retry_overdue(self, request_id: bytes, attempt: int) -> None:
        request = self.get(request_id)
        if request is not None and request.attempt == attempt:
            request.trigger_retry("Suspect")
