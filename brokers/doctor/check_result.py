"""Results of the checks of a broker, and how they are printed."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

CheckLevel = Literal["ok", "warn", "FAIL"]

LINE_WIDTH = 80  # of a terminal that was never resized
_LEVEL_WIDTH = 6
_CHECK_WIDTH = 13


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check; `fix` says what to change, and is empty only if the result is ok."""

    level: CheckLevel
    check: str
    message: str
    fix: str = ""
    broker: str = ""  # address of the broker, for `--json` with two brokers

    def to_lines(self) -> list[str]:
        """The result in lines of at most 80 characters, the fix last."""
        indent = " " * (_LEVEL_WIDTH + _CHECK_WIDTH)
        head = f"{self.level:<{_LEVEL_WIDTH}}{self.check:<{_CHECK_WIDTH}}"
        lines = _wrap(self.message, head, indent)
        return lines + _wrap(self.fix, f"{indent}-> ", f"{indent}   ") if self.fix else lines


def ok(check: str, message: str) -> CheckResult:
    return CheckResult("ok", check, message)


def warn(check: str, message: str, fix: str) -> CheckResult:
    return CheckResult("warn", check, message, fix)


def fail(check: str, message: str, fix: str) -> CheckResult:
    return CheckResult("FAIL", check, message, fix)


def is_usable(results: Iterable[CheckResult]) -> bool:
    """Whether no check failed; warnings do not count."""
    return all(result.level != "FAIL" for result in results)


def format_bytes(count: int) -> str:
    """A size: in KiB or MiB if that is exact, else in bytes."""
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size and count % size == 0:
            return f"{count // size} {unit}"
    return f"{count:,} bytes"


def _wrap(text: str, first: str, rest: str) -> list[str]:
    lines = textwrap.wrap(
        text, LINE_WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=True, break_on_hyphens=False
    )
    return lines or [first.rstrip()]
