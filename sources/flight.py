"""One request on its way, as its owner sees it: how often it was sent, to whom, and what was heard of it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from brokers.errors import Disconnected
from brokers.messages import Failure, Result


@dataclass(slots=True, eq=False)
class Flight:
    """A request that its owner holds. Words about it arrive in `heard`; an empty word says: send it again."""

    request: bytes
    begun_s: float
    deadline_ms: float | None
    attempt: int = 0
    failures: int = 0
    worker: str = ""
    avoid: set[str] = field(default_factory=set)
    heard: asyncio.Queue[Result | Failure | Disconnected | None] = field(default_factory=asyncio.Queue)

    def begin_attempt(self) -> None:
        """Count it; what was said of earlier attempts is forgotten, unless it ends the request."""
        self.attempt += 1
        heard = [self.heard.get_nowait() for _ in range(self.heard.qsize())]
        for word in heard:
            if isinstance(word, Result | Disconnected):
                self.heard.put_nowait(word)

    def fail(self, stage: str, worker: str, error: str, reason: str) -> None:
        """Note a failure of the present attempt that another attempt may mend."""
        self.heard.put_nowait(
            Failure(
                request=self.request,
                stage=stage,
                worker=worker,
                error=error,
                reason=reason,
                attempt=self.attempt,
                retry=True,
            )
        )

    def left_s(self, limit_s: float) -> float:
        """Seconds until the deadline, at most `limit_s`."""
        if self.deadline_ms is None:
            return limit_s
        return min(limit_s, self.deadline_ms / 1000 - (time.monotonic() - self.begun_s))
