"""Results of the checks of a broker, how they are printed, and the fixes that several checks name.

"FAIL" stops a pipeline or loses its messages; "warn" matters to some pipelines. Fixes are lines of mosquitto.conf where
there are any, and a description for other brokers.
"""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from brokers.dispatch.channel import HEADER_RESERVE_BYTES
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from brokers.protocol.chunking import CHUNK_BYTES

CheckLevel = Literal["ok", "warn", "FAIL"]

LINE_WIDTH = 80  # of a terminal that was never resized
_LEVEL_WIDTH = 6
_CHECK_WIDTH = 13

CHUNK_PACKET_BYTES = CHUNK_BYTES + HEADER_RESERVE_BYTES
FIX_PACKET_SIZE = f"Mosquitto: max_packet_size {MAX_REMAINING_BYTES}; else: allow packets of {CHUNK_PACKET_BYTES} bytes"
FIX_QOS = "Mosquitto: max_qos 2; else: allow QoS 1"
FIX_RETAIN = "Mosquitto: retain_available true; else: allow retained messages"
FIX_SHARED_SUBSCRIPTION = "Mosquitto has them by default; else: enable shared subscriptions"


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
