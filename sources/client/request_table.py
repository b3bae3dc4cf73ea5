"""The pending requests of a source by request id, and the responses and losses that concern them."""

import asyncio
from collections import Counter, deque
from collections.abc import Iterator

from brokers.dispatch.presence import OTHER_REASON, REASON_LIMIT
from brokers.dispatch.worker_pool import LostTask
from brokers.errors import Disconnected, WireError
from brokers.protocol.messages import Failure, Message, Result
from brokers.protocol.transport import Properties
from sources.client.pending_request import PendingRequest

# After a worker of a later stage was lost, a request that takes much longer than recent ones is sent again: the worker
# that would have reported it lost may be lost too. The timeout is the slowest recent latency times the factor.
OVERDUE_MIN_S = 2.0
OVERDUE_FACTOR = 3.0
_RECENT_LATENCIES = 100
_REASON_CHARACTERS = 64


def count_bounded(counts: Counter[str], reason: str) -> None:
    """Count `reason`, within `REASON_LIMIT` keys: reasons come from other processes and may be any text."""
    known = reason in counts or len(counts) < REASON_LIMIT
    counts[reason[:_REASON_CHARACTERS] if known else OTHER_REASON] += 1


class RequestTable:
    """Matches responses to pending requests. The first result counts; later duplicates are dropped and counted."""

    def __init__(self, lease_s: float) -> None:
        self.counters: Counter[str] = Counter()
        self._by_id: dict[bytes, PendingRequest] = {}
        self._latencies_s: deque[float] = deque(maxlen=_RECENT_LATENCIES)
        self._lease_s = lease_s

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[PendingRequest]:
        return iter(self._by_id.values())

    def add(self, request: PendingRequest) -> None:
        self._by_id[request.request_id] = request

    def remove(self, request: PendingRequest) -> None:
        del self._by_id[request.request_id]

    def record_latency(self, latency_s: float) -> None:
        self._latencies_s.append(latency_s)

    def on_message(self, message: Message) -> None:
        request = self._by_id.get(message.request_id)
        if request is None:
            # A second result: an attempt that was believed lost was answered after a later one.
            self.counters["duplicates"] += 1
        elif isinstance(message, Result) or (isinstance(message, Failure) and message.attempt == request.attempt):
            request.responses.put_nowait(message)
        else:
            self.counters["unexpected"] += 1

    def on_malformed(self, error: WireError, properties: Properties) -> None:
        """A response that cannot be decoded fails the attempt."""
        if request := self._by_id.get(properties.correlation_data):
            request.fail_attempt("?", "?", error.code, f"its result: {error}")

    def on_task_lost(self, lost: LostTask) -> None:
        """The worker that held the task is lost."""
        if lost.cause == "disconnected":
            return  # `on_reconnect` retries every request
        request = self._by_id.get(lost.request)
        if request is not None and lost.attempt == request.attempt:
            reason = f"worker {lost.worker!r} was lost while it held the request"
            request.fail_attempt(lost.stage, lost.worker, "WorkerLost", reason)

    async def on_reconnect(self) -> None:
        """Retry every request: messages in transit when the connection broke may be lost."""
        for request in self:
            request.trigger_retry("Reconnected")

    def fail_all(self, error: Disconnected) -> None:
        """End every request with `error`."""
        for request in self:
            request.responses.put_nowait(error)

    def schedule_overdue_retries(self) -> None:
        """Retry the present requests that stay without a response: a worker of a later stage was lost, or a bridge."""
        timeout_s = self._lease_s / 4
        if self._latencies_s:
            # Capped: the slowest recent request may itself have waited for a lost one.
            timeout_s = min(timeout_s, max(OVERDUE_MIN_S, OVERDUE_FACTOR * max(self._latencies_s)))
        loop = asyncio.get_running_loop()
        for request in self:
            loop.call_later(timeout_s, self._retry_overdue, request.request_id, request.attempt)

    def _retry_overdue(self, request_id: bytes, attempt: int) -> None:
        request = self._by_id.get(request_id)
        if request is not None and request.attempt == attempt:
            request.trigger_retry("Suspect")
