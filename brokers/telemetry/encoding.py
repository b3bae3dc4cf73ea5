"""Events as their sender has them, made JSON lines, and lines made datagrams: see brokers/telemetry/schema.py. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from brokers.protocol.stage_timing import Hop
from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES, HOPS_LIMIT, TEXT_LIMIT

# The name of an event, when it was (Unix time in ns), and its figures.
QueuedEvent = tuple[str, int, Mapping[str, Any]]
# These are of a process, or of a site; all others are of somebody's work.
_NOT_OF_WORK = frozenset({"start", "stop", "link_traffic", "events_dropped"})
_HOP_FIELDS = tuple(Hop.__dataclass_fields__)
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class EventEncoder:
    """Makes lines of the events of one sender: `common` stands in each, `own` in those of its work besides."""

    def __init__(self, common_fields: Mapping[str, str], work_fields: Mapping[str, str]) -> None:
        # What is the same in all is written once: it is half of a line.
        self._common = _encode(_plain(common_fields))[1:-1]
        self._own = _encode(_plain({**common_fields, **work_fields}))[1:-1]

    def encode_line(self, queued: QueuedEvent) -> bytes:
        """One event, without a line's end. Raises `TypeError` for a figure that is of no kind that events have.

        Bytes are written as hexadecimal digits, what is no finite number as null; longer texts and lists are cut.
        """
        event, time_ns, figures = queued
        constant = self._common if event in _NOT_OF_WORK else self._own
        head = f'{{"event":"{event}","time_ns":{time_ns}{"," if constant else ""}{constant}'
        own = _encode(_plain(figures))[1:]
        return f"{head}{own if own == '}' else ',' + own}".encode()

    def encode_datagrams(self, events: Sequence[QueuedEvent]) -> Iterator[tuple[bytes, int]]:
        """All of them, in order: each datagram, and how many of them it is for. It is empty for one that fits none."""
        lines: list[bytes] = []
        size = 0
        for told in events:
            line = self._line_or_none(told)
            if lines and (line is None or size + len(line) > DATAGRAM_LIMIT_BYTES):
                yield b"\n".join(lines), len(lines)
                lines, size = [], 0
            if line is None:
                yield b"", 1
                continue
            lines.append(line)
            size += len(line) + 1
        if lines:
            yield b"\n".join(lines), len(lines)

    def _line_or_none(self, told: QueuedEvent) -> bytes | None:
        try:
            line = self.encode_line(told)
        except (TypeError, ValueError):
            return None
        return line if len(line) <= DATAGRAM_LIMIT_BYTES else None


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain_value(value) for name, value in figures.items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, str):
        return value[:TEXT_LIMIT]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_plain({name: getattr(hop, name) for name in _HOP_FIELDS}) for hop in value[:HOPS_LIMIT]]
    return value
