"""Encodes telemetry events as JSON lines, and packs lines into datagrams: see brokers/telemetry/schema.py."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from brokers.protocol.stage_timing import Hop
from brokers.telemetry.schema import DATAGRAM_LIMIT_BYTES, HOPS_LIMIT, TEXT_LIMIT

# The name of an event, its Unix time in nanoseconds, and its fields.
QueuedEvent = tuple[str, int, Mapping[str, Any]]
# These are about a process or a site; all others are about the work of a stage or source.
_EVENTS_WITHOUT_WORK = frozenset({"start", "stop", "link_traffic", "events_dropped"})
_HOP_FIELDS = tuple(Hop.__dataclass_fields__)
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class EventEncoder:
    """Encodes the events of one sender: `common_fields` are part of each, `work_fields` of those about work."""

    def __init__(self, common_fields: Mapping[str, str], work_fields: Mapping[str, str]) -> None:
        # The constant fields are half of a line: they are encoded once.
        self._common = _encode(_to_json_object(common_fields))[1:-1]
        self._work = _encode(_to_json_object({**common_fields, **work_fields}))[1:-1]

    def encode_line(self, queued: QueuedEvent) -> bytes:
        """One event, without a line break. Raises `TypeError` for a value of a type that events do not have.

        Bytes become hexadecimal digits, infinities and NaN null; long texts and lists are cut.
        """
        event, time_ns, fields = queued
        constant = self._common if event in _EVENTS_WITHOUT_WORK else self._work
        head = f'{{"event":"{event}","time_ns":{time_ns}{"," if constant else ""}{constant}'
        rest = _encode(_to_json_object(fields))[1:]
        return f"{head}{rest if rest == '}' else ',' + rest}".encode()

    def encode_datagrams(self, events: Sequence[QueuedEvent]) -> Iterator[tuple[bytes, int]]:
        """Yield datagrams with all events in order, each with its number of events.

        An event that cannot be encoded, or is larger than a datagram, yields an empty datagram.
        """
        lines: list[bytes] = []
        size = 0
        for event in events:
            line = self._encode_or_none(event)
            if lines and (line is None or size + len(line) > DATAGRAM_LIMIT_BYTES):
                yield b"\n".join(lines), len(lines)
                lines = []
                size = 0
            if line is None:
                yield b"", 1
                continue
            lines.append(line)
            size += len(line) + 1
        if lines:
            yield b"\n".join(lines), len(lines)

    def _encode_or_none(self, event: QueuedEvent) -> bytes | None:
        try:
            line = self.encode_line(event)
        except (TypeError, ValueError):
            return None
        return line if len(line) <= DATAGRAM_LIMIT_BYTES else None


def _to_json_object(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _to_json_value(value) for name, value in fields.items()}


def _to_json_value(value: Any) -> Any:
    if isinstance(value, str):
        return value[:TEXT_LIMIT]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_to_json_object({name: getattr(hop, name) for name in _HOP_FIELDS}) for hop in value[:HOPS_LIMIT]]
    return value
