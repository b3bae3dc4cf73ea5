"""What is wrong with what a daemon is sent: counted by kind, and said in one line a kind, now and then. Pure."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

LOG_INTERVAL_S = 10.0
# Kinds that are told apart: events have about a hundred ways to be wrong.
_KINDS_LIMIT = 256


@dataclass(slots=True)
class ErrorCounts:
    """Times are monotonic seconds of whoever asks."""

    total: int = 0
    _untold: Counter[str] = field(default_factory=Counter)
    _told_s: dict[str, float] = field(default_factory=dict)

    def add(self, kind: str, count: int = 1) -> None:
        """So many more of one kind; `kind` is the line's text, and must hold nothing that was sent."""
        self.total += count
        known = kind in self._untold or len(self._untold) < _KINDS_LIMIT
        self._untold[kind if known else "other mistakes"] += count

    def due_lines(self, now_s: float) -> list[str]:
        """The lines that are due."""
        found = []
        for kind, count in self._untold.items():
            if count and now_s - self._told_s.get(kind, -math.inf) >= LOG_INTERVAL_S:
                self._told_s[kind] = now_s
                self._untold[kind] = 0
                found.append(f"{kind} ({count} since this was last said)" if count > 1 else kind)
        return found
