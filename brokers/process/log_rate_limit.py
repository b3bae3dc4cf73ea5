"""Rate limits for log lines: for all warnings of a program, and for one repeated failure.

Messages from the network cause warnings, and their senders decide how often: without a limit, one client could fill the
disk, or hide a line that matters among a million others.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

# At most 2 lines a second from one call site: enough to diagnose a fault.
MAX_LINES = 20
INTERVAL_S = 10.0
MAX_LINE_CHARACTERS = 1000


@dataclass(slots=True)
class _Window:
    """The present interval of one call site."""

    begin_s: float
    lines: int = 0
    suppressed: int = 0


class RateLimitFilter(logging.Filter):
    """Logging filter that rate-limits warnings per call site (20 per 10 s), and sanitizes all lines.

    The next line that passes says how many were suppressed.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._windows: dict[tuple[str, int], _Window] = {}  # by file and line: bounded by the size of the code

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is written; its text is sanitized."""
        suppressed = 0
        if record.levelno >= logging.WARNING:
            window = self._window(record)
            if window.lines >= MAX_LINES:
                window.suppressed += 1
                return False
            window.lines += 1
            suppressed = window.suppressed
            window.suppressed = 0
        record.msg = sanitize(record.getMessage())
        record.args = ()
        if suppressed:
            record.msg += f" ({suppressed} lines from the same place were suppressed before)"
        return True

    def _window(self, record: logging.LogRecord) -> _Window:
        now_s = self._clock()
        window = self._windows.setdefault((record.pathname, record.lineno), _Window(now_s))
        if now_s - window.begin_s >= INTERVAL_S:
            window.begin_s = now_s
            window.lines = 0
        return window


class LogThrottle:
    """Limits the log lines about a repeated failure to one per key in `interval_s` seconds, or until `reset`.

    >>> if throttle.allows("disk"):
    ...     log.warning("points are lost: the disk is full")
    """

    def __init__(self, interval_s: float = math.inf, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval_s = interval_s
        self._clock = clock
        self._logged_s: dict[Hashable, float] = {}

    def allows(self, key: Hashable = "") -> bool:
        """Return whether to log now, and count it as logged if so."""
        now_s = self._clock()
        if now_s - self._logged_s.get(key, -math.inf) < self._interval_s:
            return False
        self._logged_s[key] = now_s
        return True

    def reset(self, key: Hashable = "") -> None:
        """Allow the next line: it works again."""
        self._logged_s.pop(key, None)


def sanitize(text: str) -> str:
    """Return `text` as one line of at most `MAX_LINE_CHARACTERS` characters, with control characters escaped.

    A name from the network must not forge a log line, nor send escape sequences to a terminal.
    """
    if len(text) > MAX_LINE_CHARACTERS:
        text = f"{text[:MAX_LINE_CHARACTERS]}... ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
