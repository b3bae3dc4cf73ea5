"""A log that nobody can flood: of lines from one place in the code only so many are let through in some seconds.

What comes from the network makes programs warn, and whoever may publish decides how often: unlimited, one client could
fill a disk, or hide a line that matters among a million others. Lines are cut too, and control characters escaped: a
name that came from the network must not forge a line of its own, nor speak to a terminal.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

# Ample for a person to see what is going on; at most 2 lines a second from one place.
MAX_LINES = 20
INTERVAL_S = 10.0
MAX_LINE_CHARACTERS = 1000


@dataclass(slots=True)
class _Place:
    begin_s: float
    lines: int = 0
    left_out: int = 0


class RateLimitFilter(logging.Filter):
    """For a handler: lets warnings and worse through while they are few, and says how many of them it left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._places: dict[tuple[str, int], _Place] = {}  # by file and line: as many as the code has

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this line is written; its text is made harmless."""
        left_out = 0
        if record.levelno >= logging.WARNING:
            place = self._place(record)
            if place.lines >= MAX_LINES:
                place.left_out += 1
                return False
            place.lines += 1
            left_out, place.left_out = place.left_out, 0
        record.msg, record.args = sanitize(record.getMessage()), ()
        if left_out:
            record.msg += f" ({left_out} lines like this one were left out before)"
        return True

    def _place(self, record: logging.LogRecord) -> _Place:
        now_s = self._clock()
        place = self._places.setdefault((record.pathname, record.lineno), _Place(now_s))
        if now_s - place.begin_s >= INTERVAL_S:
            place.begin_s, place.lines = now_s, 0
        return place


def sanitize(text: str) -> str:
    """`text` in at most `MAX_LINE_CHARACTERS` letters, as one line, with no character that is more than a letter."""
    if len(text) > MAX_LINE_CHARACTERS:
        text = f"{text[:MAX_LINE_CHARACTERS]}... ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
