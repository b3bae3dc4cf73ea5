"""Log lines are rate-limited per call site or per failure, and sanitized."""

from __future__ import annotations

import logging

from brokers.process.log_rate_limit import (
    INTERVAL_S,
    MAX_LINE_CHARACTERS,
    MAX_LINES,
    RateLimitFilter,
    sanitize,
)


class FilteredLog:
    """The lines that pass a `RateLimitFilter`, whose clock the test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.lines: list[str] = []
        self._filter = RateLimitFilter(lambda: self.now_s)

    def log(self, text: str, *arguments: object, level: int = logging.WARNING, line: int = 1) -> None:
        record = logging.LogRecord("name", level, "file.py", line, text, arguments, None)
        if self._filter.filter(record):
            self.lines.append(record.getMessage())


def test_first_lines_pass_and_the_suppressed_are_counted() -> None:
    log = FilteredLog()
    for number in range(10_000):
        log.log("refused %d", number)
    assert log.lines == [f"refused {number}" for number in range(MAX_LINES)]
    log.now_s += INTERVAL_S
    log.log("refused %d", 1)
    log.log("refused %d", 2)
    assert log.lines[MAX_LINES:] == ["refused 1 (9980 lines from the same place were suppressed before)", "refused 2"]


def test_call_sites_are_limited_separately() -> None:
    log = FilteredLog()
    for number in range(1000):
        log.log("refused %d", number)
    log.log("the broker is gone", line=2)
    assert log.lines[-1] == "the broker is gone"


def test_different_texts_of_one_call_site_share_its_limit() -> None:
    log = FilteredLog()
    for number in range(1000):
        log.log(f"text {number}")
    assert len(log.lines) == MAX_LINES


def test_info_lines_are_not_limited() -> None:
    log = FilteredLog()
    for number in range(1000):
        log.log("request %d", number, level=logging.INFO)
    assert len(log.lines) == 1000


def test_control_characters_are_escaped_and_long_lines_cut() -> None:
    log = FilteredLog()
    log.log("worker %s", "a\n2026 ERROR all is lost \x1b[2J\x9b %s größer")
    assert log.lines == ["worker a\\n2026 ERROR all is lost \\x1b[2J\\x9b %s größer"]
    assert len(sanitize("a" * 1_000_000)) < MAX_LINE_CHARACTERS + 50
