"""What an examination found, one finding a line, with what mends it; and how it is told. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

CheckLevel = Literal["ok", "warn", "FAIL"]

LINE_WIDTH = 80  # what a terminal has that nobody has made larger
_LEVEL_WIDTH, _WHAT_WIDTH = 6, 13


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One thing that works, works in part, or does not; `mend` is what to change then, and never empty then."""

    level: CheckLevel
    check: str
    message: str
    fix: str = ""
    broker: str = ""  # the broker's address, where two are examined: for programs; people see which one is greeted

    def to_lines(self) -> list[str]:
        """Return it for a person, in lines of at most 80 characters."""
        indent = " " * (_LEVEL_WIDTH + _WHAT_WIDTH)
        head = f"{self.level:<{_LEVEL_WIDTH}}{self.check:<{_WHAT_WIDTH}}"
        told = [*_wrapped(self.message, head, indent), *(_wrapped(self.fix, f"{indent}-> ", f"{indent}   "))]
        return told if self.fix else told[: len(told) - 1]


def ok(check: str, message: str) -> CheckResult:
    return CheckResult("ok", check, message)


def warn(check: str, message: str, fix: str) -> CheckResult:
    return CheckResult("warn", check, message, fix)


def fail(check: str, message: str, fix: str) -> CheckResult:
    return CheckResult("FAIL", check, message, fix)


@dataclass(frozen=True, slots=True)
class ThroughputResult:
    """How fast messages of one size went between two clients, there and back."""

    name: str
    size_bytes: int
    round_trip_ms: float
    outbound_per_s: float  # messages, one after the other without a pause
    inbound_per_s: float

    @property
    def frames_per_s(self) -> float:
        """Requests that the broker could carry, were each one such message there and one back."""
        return min(self.outbound_per_s, self.inbound_per_s)

    @property
    def outbound_mb_s(self) -> float:
        return self.outbound_per_s * self.size_bytes / 1e6

    @property
    def inbound_mb_s(self) -> float:
        return self.inbound_per_s * self.size_bytes / 1e6


def format_table(rows: Sequence[ThroughputResult]) -> list[str]:
    """Return the measurements as lines, with a heading."""
    width = max(len("size"), *(len(row.name) for row in rows))
    heads = f"{'size':<{width}}  {'round trip ms':>13}  {'there MB/s':>10}  {'back MB/s':>10}  {'frames/s':>9}"
    lines = (
        f"{row.name:<{width}}  {row.round_trip_ms:>13.1f}  {row.outbound_mb_s:>10.1f}  {row.inbound_mb_s:>10.1f}"
        f"  {row.frames_per_s:>9.1f}"
        for row in rows
    )
    return [heads, *lines]


def is_usable(results: Iterable[CheckResult]) -> bool:
    """Return whether nothing of it is in the way; warnings are not."""
    return all(finding.level != "FAIL" for finding in results)


def format_bytes(count: int) -> str:
    """Return a count of bytes for a person: exact where it is a round number of KiB or MiB."""
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size and count % size == 0:
            return f"{count // size} {unit}"
    return f"{count:,} bytes"


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, LINE_WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=True, break_on_hyphens=False
    ) or [first.rstrip()]
