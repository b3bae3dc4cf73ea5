"""Rate limit for the log lines of a program.

Messages from the network cause warnings, and their senders decide how often: without a limit, one client could fill the
disk, or hide a line that matters among a million others.
"""

import logging
import time
from collections.abc import Callable
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


def sanitize(text: str) -> str:
    """Return `text` as one line of at most `MAX_LINE_CHARACTERS` characters, with control characters escaped.

    A name from the network must not forge a log line, nor send escape sequences to a terminal.
    """
    if len(text) > MAX_LINE_CHARACTERS:
        text = f"{text[:MAX_LINE_CHARACTERS]}... ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
