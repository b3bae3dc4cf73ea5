"""The telemetry events that processes send to the monitor of their machine: JSON lines on a Unix socket.

`start`, `stop`, `task_processed` and `batch_processed` are those of the paper (appendix A); the others are additions.
Any program may send them: docs/telemetry.md describes each field.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from brokers.errors import BadPayload, first_mistake
from brokers.protocol.messages import JSON
from brokers.protocol.stage_timing import Hop

# A datagram has any number of lines, up to this size; the default buffer of a Unix socket holds no more.
DATAGRAM_LIMIT_BYTES = 128 << 10
TEXT_LIMIT = 128  # characters of a name
HOPS_LIMIT = 64  # of one request

_Count = Annotated[int, Field(ge=0, lt=1 << 53)]
# Sums of invented values must stay finite, and times must fit SQLite's integers after some nanoseconds are added.
_MEASURE_LIMIT = 1e12
_TIME_LIMIT_NS = 1 << 62
_Measure = Annotated[float, Field(ge=0, le=_MEASURE_LIMIT, allow_inf_nan=False)]
_Text = Annotated[str, Field(max_length=TEXT_LIMIT)]
ProcessRole = Literal["run", "stage", "source", "broker", "monitor", "bench", "other"]
BatchPhase = Literal["inference", "forward", "backward", "update"]


class HopMetrics(BaseModel):
    """The part of one stage in a request, as in `brokers.protocol.stage_timing`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: _Text
    worker: _Text
    queue_ms: _Measure = 0.0
    decode_ms: _Measure = 0.0
    compute_ms: _Measure = 0.0
    encode_ms: _Measure = 0.0
    bytes_in: _Count = 0
    bytes_out: _Count = 0
    batch: _Count = Field(default=1, description="tasks that were computed together")


class _EventBase(BaseModel):
    """The fields of every event."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    time_ns: Annotated[int, Field(gt=0, lt=_TIME_LIMIT_NS)] = Field(description="Unix time, by the sender's clock")
    run: _Text = Field(default="", description="the run that it is part of: SPARSE_RUN of the sender")
    site: _Text = ""
    pipeline: _Text = ""


class _ProcessEvent(_EventBase):
    role: ProcessRole = "other"
    name: _Text = ""
    pid: _Count = 0


class ProcessStarted(_ProcessEvent):
    """A process starts; the monitor samples it from now on, if it can see it."""

    event: Literal["start"] = "start"


class ProcessStopped(_ProcessEvent):
    """A process ends."""

    event: Literal["stop"] = "stop"


class TaskProcessed(HopMetrics, _EventBase):
    """A worker has finished one task."""

    event: Literal["task_processed"] = "task_processed"
    request: _Text = Field(default="", description="request id, in hex")
    error: _Text = Field(default="", description="error code of a task that failed")
    trace: _Text = Field(default="", description="W3C trace id, in hex")
    span: _Text = Field(default="", description="W3C id of the task's span, in hex")
    parent: _Text = Field(default="", description="W3C id of the parent span, in hex")


class BatchProcessed(_EventBase):
    """A worker has computed one batch: tasks of inference, or a micro-batch or update of training."""

    event: Literal["batch_processed"] = "batch_processed"
    stage: _Text
    worker: _Text
    phase: BatchPhase = "inference"
    tasks: _Count = Field(description="tasks in the batch")
    rows: _Count = Field(default=0, description="samples in the batch, of training")
    busy_ms: _Measure = Field(default=0.0, description="time that the batch kept the worker busy")


class RequestDone(_EventBase):
    """A request has ended at its source, with a result or without."""

    event: Literal["request_done"] = "request_done"
    source: _Text
    request: _Text = ""
    latency_ms: _Measure = Field(default=0.0, description="round trip, from the request to its end")
    network_ms: _Measure = Field(default=0.0, description="the part of the round trip that no stage accounts for")
    attempts: _Count = 1
    bytes_out: _Count = Field(default=0, description="size of its content, as sent")
    error: _Text = Field(default="", description="error code of a request without a result")
    hops: tuple[HopMetrics, ...] = Field(default=(), max_length=HOPS_LIMIT)
    trace: _Text = ""
    span: _Text = ""
    parent: _Text = ""


class StepDone(_EventBase):
    """A training step was committed on all stages."""

    event: Literal["step_done"] = "step_done"
    source: _Text
    step: _Count
    epoch: _Count = 0
    rows: _Count = Field(default=0, description="samples of the step")
    step_ms: _Measure = 0.0
    loss: Annotated[float, Field(allow_inf_nan=False)] | None = None
    accuracy: _Measure | None = None


class LinkTraffic(_EventBase):
    """The bytes that a link between two sites has carried since it started."""

    event: Literal["link_traffic"] = "link_traffic"
    from_site: _Text
    to_site: _Text
    bytes_out: _Count = Field(default=0, description="from `from_site` to `to_site`")
    bytes_in: _Count = Field(default=0, description="from `to_site` to `from_site`")


class EventsDropped(_EventBase):
    """The sender had to drop events, because the monitor was absent or slow."""

    event: Literal["events_dropped"] = "events_dropped"
    count: _Count


TelemetryEvent = (
    ProcessStarted
    | ProcessStopped
    | TaskProcessed
    | BatchProcessed
    | RequestDone
    | StepDone
    | LinkTraffic
    | EventsDropped
)
EVENT_NAMES = tuple(str(kind.model_fields["event"].default) for kind in get_args(TelemetryEvent))
_ADAPTER: TypeAdapter[TelemetryEvent] = TypeAdapter(Annotated[TelemetryEvent, Field(discriminator="event")])


def event_from_json(line: bytes) -> TelemetryEvent:
    """Parse one line; raises `BadPayload`, whose message names place and mistake but quotes no received text."""
    try:
        return _ADAPTER.validate_json(line)
    except ValidationError as error:
        raise BadPayload(JSON, f"not an event: {_describe(error)}") from None


def _describe(error: ValidationError) -> str:
    mistake = error.errors(include_url=False, include_input=False)[0]
    place = [str(level) for level in mistake["loc"]]
    match mistake["type"]:
        case "json_invalid":
            return "not JSON"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"event: expected one of {', '.join(EVENT_NAMES)}"
        case "extra_forbidden":
            return f"{': '.join(place[:-1])}: unknown field"  # its name is received text
        case _:
            return first_mistake(error)


QueuedEvent = tuple[str, int, Mapping[str, Any]]  # the name of an event, its Unix time in nanoseconds, and its fields
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
