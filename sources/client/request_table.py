"""The requests that a source holds, by id, and what it hears of them: results, failures, deaths."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator

from brokers.dispatch.presence import OTHER_REASON, REASON_LIMIT
from brokers.dispatch.worker_pool import LostTask
from brokers.errors import Disconnected, WireError
from brokers.protocol.messages import Failure, Message, Result
from brokers.protocol.transport import Properties
from sources.client.pending_request import PendingRequest

# Where a worker of a later stage has died, a request that then takes much longer than others did is sent again: whoever
# would have told of it may have died as well. At least so long, and so many times the longest that was seen lately.
OVERDUE_MIN_S = 2.0
OVERDUE_FACTOR = 3.0
_RECENT = 100


def count_bounded(counts: Counter[str], reason: str) -> None:
    """Count one more of this; reasons come from other processes, so they may be any text, and any number of them."""
    known = reason in counts or len(counts) < REASON_LIMIT
    counts[reason[:64] if known else OTHER_REASON] += 1


class RequestTable:
    """Matches what is heard to the requests in flight. The first result counts, later twins are dropped."""

    def __init__(self, lease_s: float) -> None:
        self.counters: Counter[str] = Counter()
        self._by_request: dict[bytes, PendingRequest] = {}
        self._latencies_s: deque[float] = deque(maxlen=_RECENT)
        self._lease_s = lease_s

    def __len__(self) -> int:
        return len(self._by_request)

    def __iter__(self) -> Iterator[PendingRequest]:
        return iter(self._by_request.values())

    def add(self, flight: PendingRequest) -> None:
        self._by_request[flight.request_id] = flight

    def remove(self, flight: PendingRequest) -> None:
        """It has come to its end, one way or the other."""
        del self._by_request[flight.request_id]

    def record_latency(self, latency_s: float) -> None:
        """A result came after so long."""
        self._latencies_s.append(latency_s)

    def on_message(self, message: Message) -> None:
        flight = self._by_request.get(message.request_id)
        if flight is None:
            # The result of an attempt that was thought lost, after another attempt's.
            self.counters["duplicates"] += 1
        elif isinstance(message, Result) or (isinstance(message, Failure) and message.attempt == flight.attempt):
            flight.responses.put_nowait(message)
        else:
            self.counters["unexpected"] += 1

    def on_malformed(self, error: WireError, properties: Properties) -> None:
        """What came for a request cannot be read."""
        if flight := self._by_request.get(properties.correlation_data):
            flight.fail_attempt("?", "?", error.code, f"its result: {error}")

    def on_task_lost(self, lost: LostTask) -> None:
        """The worker that had a request in hand is gone."""
        if lost.cause == "disconnected":
            return  # `reconnected` sends everything again
        if (flight := self._by_request.get(lost.request)) and lost.attempt == flight.attempt:
            reason = f"worker {lost.worker!r} died with the request in hand"
            flight.fail_attempt(lost.stage, lost.worker, "WorkerLost", reason)

    async def on_reconnect(self) -> None:
        """What was in flight when the connection broke may be lost: send it all again."""
        for flight in self:
            flight.trigger_retry("Reconnected")

    def fail_all(self, reason: Disconnected) -> None:
        """Have all raise this."""
        for flight in self:
            flight.responses.put_nowait(reason)

    def schedule_overdue_retries(self) -> None:
        """A worker of a later stage died, or a bridge was down: what is then not answered in a while is sent again."""
        slowest_s = max(self._latencies_s, default=None)
        patience_s = longest_s = self._lease_s / 4
        if slowest_s is not None:  # one that took long may itself have waited for what was lost
            patience_s = min(longest_s, max(OVERDUE_MIN_S, OVERDUE_FACTOR * slowest_s))
        loop = asyncio.get_running_loop()
        for flight in self:
            loop.call_later(patience_s, self._suspect, flight.request_id, flight.attempt)

    def _suspect(self, request: bytes, attempt: int) -> None:
        flight = self._by_request.get(request)
        if flight is not None and flight.attempt == attempt:
            flight.trigger_retry("Suspect")
