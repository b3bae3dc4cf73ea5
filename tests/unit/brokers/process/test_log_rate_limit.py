"""A log that nobody can flood."""

from __future__ import annotations

import logging

from brokers.process.log_rate_limit import INTERVAL_S, MAX_LINE_CHARACTERS, MAX_LINES, RateLimitFilter, sanitize


class Desk:
    """A logger with the filter before it, a clock that is set by hand, and what was written."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.written: list[str] = []
        self._sparing = RateLimitFilter(lambda: self.now_s)

    def say(self, text: str, *arguments: object, level: int = logging.WARNING, line: int = 1) -> None:
        record = logging.LogRecord("desk", level, "desk.py", line, text, arguments, None)
        if self._sparing.filter(record):
            self.written.append(record.getMessage())


def test_of_a_flood_the_first_lines_are_written_and_later_how_many_were_left_out() -> None:
    desk = Desk()
    for number in range(10_000):
        desk.say("refused %d", number)
    assert desk.written == [f"refused {number}" for number in range(MAX_LINES)]
    desk.now_s += INTERVAL_S
    desk.say("refused %d", 1)
    desk.say("refused %d", 2)
    assert desk.written[MAX_LINES:] == ["refused 1 (9980 lines like this one were left out before)", "refused 2"]


def test_a_flood_from_one_place_does_not_drown_another_place() -> None:
    desk = Desk()
    for number in range(1000):
        desk.say("refused %d", number)
    desk.say("the broker is gone", line=2)
    assert desk.written[-1] == "the broker is gone"


def test_what_a_person_asked_for_with_v_is_written_in_full() -> None:
    desk = Desk()
    for number in range(1000):
        desk.say("request %d", number, level=logging.INFO)
    assert len(desk.written) == 1000


def test_a_name_from_the_network_can_neither_forge_a_line_nor_speak_to_a_terminal_nor_be_endless() -> None:
    desk = Desk()
    desk.say("worker %s", "a\n2026 ERROR all is lost \x1b[2J\x9b %s größer")
    assert desk.written == ["worker a\\n2026 ERROR all is lost \\x1b[2J\\x9b %s größer"]
    assert len(sanitize("a" * 1_000_000)) < MAX_LINE_CHARACTERS + 50


def test_texts_that_are_put_together_before_they_are_logged_are_one_flood_all_the_same() -> None:
    desk = Desk()
    for number in range(1000):
        desk.say(f"text {number}")
    assert len(desk.written) == MAX_LINES
