"""The requests that a source holds, by id, and what it hears of them: results, failures, deaths."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterator

from brokers.dispatch.presence import OTHER, REASON_LIMIT
from brokers.dispatch.stage_client import Lost
from brokers.errors import Disconnected, WireError
from brokers.protocol.messages import Failure, Message, Result
from brokers.protocol.transport import Properties
from sources.client.pending_request import Flight

# Where a worker of a later stage has died, a request that then takes much longer than others did is sent again: whoever
# would have told of it may have died as well. At least so long, and so many times the longest that was seen lately.
SUSPICION_S = 2.0
SUSPICION_TIMES = 3.0
_RECENT = 100


def note(counts: Counter[str], reason: str) -> None:
    """Count one more of this; reasons come from other processes, so they may be any text, and any number of them."""
    known = reason in counts or len(counts) < REASON_LIMIT
    counts[reason[:64] if known else OTHER] += 1


class Flights:
    """Matches what is heard to the requests in flight. The first result counts, later twins are dropped."""

    def __init__(self, lease_s: float) -> None:
        self.counters: Counter[str] = Counter()
        self._by_request: dict[bytes, Flight] = {}
        self._latencies_s: deque[float] = deque(maxlen=_RECENT)
        self._lease_s = lease_s

    def __len__(self) -> int:
        return len(self._by_request)

    def __iter__(self) -> Iterator[Flight]:
        return iter(self._by_request.values())

    def begin(self, flight: Flight) -> None:
        self._by_request[flight.request] = flight

    def end(self, flight: Flight) -> None:
        """It has come to its end, one way or the other."""
        del self._by_request[flight.request]

    def took(self, latency_s: float) -> None:
        """A result came after so long."""
        self._latencies_s.append(latency_s)

    def heard(self, message: Message) -> None:
        flight = self._by_request.get(message.request)
        if flight is None:
            # The result of an attempt that was thought lost, after another attempt's.
            self.counters["twins"] += 1
        elif isinstance(message, Result) or (isinstance(message, Failure) and message.attempt == flight.attempt):
            flight.heard.put_nowait(message)
        else:
            self.counters["unexpected"] += 1

    def garbage(self, error: WireError, properties: Properties) -> None:
        """What came for a request cannot be read."""
        if flight := self._by_request.get(properties.correlation):
            flight.fail("?", "?", type(error).__name__, f"its result: {error}")

    def lost(self, lost: Lost) -> None:
        """The worker that had a request in hand is gone."""
        if lost.why == "disconnected":
            return  # `reconnected` sends everything again
        if (flight := self._by_request.get(lost.request)) and lost.attempt == flight.attempt:
            reason = f"worker {lost.worker!r} died with the request in hand"
            flight.fail(lost.stage, lost.worker, "WorkerLost", reason)

    async def reconnected(self) -> None:
        """What was in flight when the connection broke may be lost: send it all again."""
        for flight in self:
            flight.send_again("Reconnected")

    def give_up(self, reason: Disconnected) -> None:
        """Have all raise this."""
        for flight in self:
            flight.heard.put_nowait(reason)

    def suspect_all(self) -> None:
        """A worker of a later stage died, or a bridge was down: what is then not answered in a while is sent again."""
        slowest_s = max(self._latencies_s, default=None)
        patience_s = longest_s = self._lease_s / 4
        if slowest_s is not None:  # one that took long may itself have waited for what was lost
            patience_s = min(longest_s, max(SUSPICION_S, SUSPICION_TIMES * slowest_s))
        loop = asyncio.get_running_loop()
        for flight in self:
            loop.call_later(patience_s, self._suspect, flight.request, flight.attempt)

    def _suspect(self, request: bytes, attempt: int) -> None:
        flight = self._by_request.get(request)
        if flight is not None and flight.attempt == attempt:
            flight.send_again("Suspect")
