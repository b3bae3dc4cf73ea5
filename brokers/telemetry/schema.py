"""What processes tell the monitor of their node, as JSON on a Unix socket: one line an event. Pure.

`start`, `stop`, `task_processed` and `batch_processed` are the paper's (appendix A); the others are ours. Any program
may send them: docs/telemetry.md describes each field.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from brokers.errors import BadPayload
from brokers.protocol.messages import JSON

# One datagram holds any number of lines, up to this; more would not pass a Unix socket's default buffer.
DATAGRAM_LIMIT_BYTES = 128 << 10
TEXT_LIMIT = 128  # characters of a name
HOPS_LIMIT = 64  # of one request

_Count = Annotated[int, Field(ge=0, lt=1 << 53)]
# Sums of what is made up must stay numbers, too, and a time plus some nanoseconds one that SQLite can hold.
_LARGEST_FIGURE = 1e12
_TIME_LIMIT_NS = 1 << 62
_Figure = Annotated[float, Field(ge=0, le=_LARGEST_FIGURE, allow_inf_nan=False)]
_Text = Annotated[str, Field(max_length=TEXT_LIMIT)]
ProcessRole = Literal["run", "stage", "source", "broker", "monitor", "bench", "other"]
BatchPhase = Literal["inference", "forward", "backward", "update"]


class _EventBase(BaseModel):
    """What all events share: when it was, and of what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    time_ns: Annotated[int, Field(gt=0, lt=_TIME_LIMIT_NS)] = Field(description="Unix time, by the sender's clock")
    run: _Text = Field(default="", description="which run it is part of: SPARSE_RUN of the sender")
    site: _Text = ""
    pipeline: _Text = ""


class ProcessStarted(_EventBase):
    """A process begins its work; from now on the monitor samples it, if it can see it."""

    event: Literal["start"] = "start"
    role: ProcessRole = "other"
    name: _Text = ""
    pid: _Count = 0


class ProcessStopped(_EventBase):
    """It ends."""

    event: Literal["stop"] = "stop"
    role: ProcessRole = "other"
    name: _Text = ""
    pid: _Count = 0


class TaskProcessed(_EventBase):
    """A worker is done with one task."""

    event: Literal["task_processed"] = "task_processed"
    stage: _Text
    worker: _Text
    request: _Text = Field(default="", description="its id, in hex")
    queue_ms: _Figure = 0.0
    decode_ms: _Figure = 0.0
    compute_ms: _Figure = 0.0
    encode_ms: _Figure = 0.0
    bytes_in: _Count = 0
    bytes_out: _Count = 0
    batch: _Count = Field(default=1, description="tasks that were computed together")
    error: _Text = Field(default="", description="of a task that failed: its name")
    trace: _Text = Field(default="", description="W3C trace id, in hex")
    span: _Text = Field(default="", description="W3C id of this task's span, in hex")
    parent: _Text = Field(default="", description="and of the span that asked for it")


class BatchProcessed(_EventBase):
    """A worker has computed one batch: tasks of inference, or a micro-batch or update of training."""

    event: Literal["batch_processed"] = "batch_processed"
    stage: _Text
    worker: _Text
    phase: BatchPhase = "inference"
    tasks: _Count = Field(description="in the batch")
    rows: _Count = Field(default=0, description="of training: samples in it")
    busy_ms: _Figure = Field(default=0.0, description="that it kept the worker busy")


class HopMetrics(BaseModel):
    """What one stage did for a request, as in `brokers.protocol.stage_timing`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: _Text
    worker: _Text
    queue_ms: _Figure = 0.0
    decode_ms: _Figure = 0.0
    compute_ms: _Figure = 0.0
    encode_ms: _Figure = 0.0
    bytes_in: _Count = 0
    bytes_out: _Count = 0
    batch: _Count = 1


class RequestDone(_EventBase):
    """A request has come to its end at its source, with a result or without."""

    event: Literal["request_done"] = "request_done"
    source: _Text
    request: _Text = ""
    latency_ms: _Figure = Field(default=0.0, description="from when it was asked to its end")
    network_ms: _Figure = Field(default=0.0, description="the part of it that no stage accounts for")
    attempts: _Count = 1
    bytes_out: _Count = Field(default=0, description="of its content, as it was sent")
    error: _Text = Field(default="", description="of a request without a result: the error's name")
    hops: tuple[HopMetrics, ...] = Field(default=(), max_length=HOPS_LIMIT)
    trace: _Text = ""
    span: _Text = ""
    parent: _Text = ""


class StepDone(_EventBase):
    """A training step is committed on all stages."""

    event: Literal["step_done"] = "step_done"
    source: _Text
    step: _Count
    epoch: _Count = 0
    rows: _Count = Field(default=0, description="samples of the step")
    step_ms: _Figure = 0.0
    loss: Annotated[float, Field(allow_inf_nan=False)] | None = None
    accuracy: _Figure | None = None


class LinkTraffic(_EventBase):
    """What a link between two sites has carried since it began."""

    event: Literal["link_traffic"] = "link_traffic"
    from_site: _Text
    to_site: _Text
    bytes_out: _Count = Field(default=0, description="from `from_site` to `to_site`")
    bytes_in: _Count = Field(default=0, description="the other way")


class EventsDropped(_EventBase):
    """The sender had more to tell than the monitor took: so many of its events are lost."""

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
    """The event of one line; raises `BadPayload` with what is wrong, and where, and nothing of what was sent."""
    try:
        return _ADAPTER.validate_json(line)
    except ValidationError as error:
        raise BadPayload(JSON, f"not an event: {_said(error)}") from None


def _said(error: ValidationError) -> str:
    """What is wrong, in words that are ours alone: a log shows them, and keeps no text that somebody sent."""
    mistake = error.errors(include_url=False, include_input=False)[0]
    place = [str(level) for level in mistake["loc"]]
    match mistake["type"]:
        case "json_invalid":
            return "not JSON"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"event: expected one of {', '.join(EVENT_NAMES)}"
        case "extra_forbidden":
            return f"{': '.join(place[:-1])}: a field that it does not have"
        case _:
            return f"{''.join(f'{level}: ' for level in place)}{mistake['msg']}"
