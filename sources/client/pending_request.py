"""One request on its way, as its owner sees it: how often it was sent, to whom, and what was heard of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from brokers.errors import DeadlinePassed, Disconnected, RequestFailed
from brokers.protocol.messages import Failure, Priority, Result, check_priority
from brokers.protocol.traceparent import TraceContext, start_span

# How often a request may fail in a way that another worker might not, before its owner is told.
RETRY_LIMIT = 3
# A worker that turns a task away has not failed at it: such attempts are not counted, only spaced.
_TURNED_AWAY = frozenset({"Busy", "Draining"})
_TURNED_AWAY_WAIT_S = (0.05, 1.0)  # the first, doubled each time, and the longest
# What is said of a request when the worker that had it did not come to an answer.
_NOT_ANSWERED = frozenset({"WorkerLost", "NoAnswer"})


class PoisonRequest(RequestFailed):
    """A request that several workers in turn died of, or never came back from: it is not given to yet another."""

    def __init__(
        self, request: str, stage: str, worker: str, error: str, reason: str, workers: tuple[str, ...] = ()
    ) -> None:
        super().__init__(request, stage, worker, error, reason)
        self.message = f"request {request} failed at stage {stage!r}: {error}: {reason}"
        self.workers = workers


@dataclass(slots=True, eq=False)
class PendingRequest:
    """A request that its owner holds. Words about it arrive in `heard`; a text says why to send it again.

    `trace` is its span, which `parent` asked for, where somebody did.
    """

    request_id: bytes
    started_s: float
    deadline_ms: float | None
    priority: Priority = "interactive"
    parent: TraceContext | None = None
    trace: TraceContext = field(init=False)
    attempt: int = 0
    worker: str = ""
    avoid: set[str] = field(default_factory=set)
    responses: asyncio.Queue[Result | Failure | Disconnected | str] = field(default_factory=asyncio.Queue)
    _failures: list[Failure] = field(default_factory=list)
    _turned_away: int = 0

    def __post_init__(self) -> None:
        check_priority(self.priority)
        self.trace = start_span(self.request_id, self.parent)

    def start_attempt(self) -> None:
        """Count it; what was said of earlier attempts is forgotten, unless it ends the request."""
        self.attempt += 1
        heard = [self.responses.get_nowait() for _ in range(self.responses.qsize())]
        for word in heard:
            if isinstance(word, Result | Disconnected):
                self.responses.put_nowait(word)

    def fail_attempt(self, stage: str, worker: str, error: str, reason: str) -> None:
        """Note a failure of the present attempt that another attempt may mend."""
        self.responses.put_nowait(
            Failure(
                request_id=self.request_id,
                stage=stage,
                worker=worker,
                error=error,
                reason=reason,
                attempt=self.attempt,
                retry=True,
            )
        )

    def trigger_retry(self, why: str) -> None:
        """Have it sent once more, with nobody to blame, unless something has been heard of it."""
        if self.attempt and self.responses.empty():
            self.responses.put_nowait(why)

    def retry_delay(self, failure: Failure) -> float:
        """How long to wait, in seconds, before another attempt elsewhere; raise where none would help."""
        self.avoid.add(failure.worker)
        if failure.retry and failure.error in _TURNED_AWAY:  # not an exception of a stage that is called so
            first_s, longest_s = _TURNED_AWAY_WAIT_S
            self._turned_away += 1
            return float(min(longest_s, first_s * 2 ** min(self._turned_away - 1, 10)))
        self._failures.append(failure)
        if failure.retry and len(self._failures) < RETRY_LIMIT:
            return 0.0
        request = self.request_id.hex()
        if failure.error == DeadlinePassed.__name__ and self.deadline_ms is not None:  # a worker saw it first
            raise DeadlinePassed(request, self.deadline_ms, f"stage {failure.stage!r}")
        if failure.retry and all(each.error in _NOT_ANSWERED for each in self._failures):
            workers = tuple(each.worker for each in self._failures)
            reason = f"{len(workers)} workers in turn did not come back from it: {', '.join(workers)}"
            raise PoisonRequest(request, failure.stage, failure.worker, PoisonRequest.__name__, reason, workers)
        raise RequestFailed(request, failure.stage, failure.worker, failure.error, failure.reason)

    def remaining_s(self, limit_s: float) -> float:
        """Seconds until the deadline, at most `limit_s`."""
        if self.deadline_ms is None:
            return limit_s
        return min(limit_s, self.deadline_ms / 1000 - (time.monotonic() - self.started_s))
