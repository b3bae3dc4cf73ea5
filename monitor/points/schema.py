"""The schema of telemetry: every measurement with its tags, fields, types and units (the tables of docs/telemetry.md).

Tags identify a series and are indexed by databases; fields are the values. All points have the tags `node` and `run`;
a tag that does not apply is empty.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

FieldType = Literal["float", "int", "text"]


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One field of a measurement; `unit` is empty for counts, ratios and text."""

    type: FieldType
    unit: str
    name: str
    description: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """A kind of point."""

    name: str
    description: str
    tags: tuple[str, ...]
    fields: tuple[FieldSpec, ...]


_ms = partial(FieldSpec, "float", "ms")
_bytes = partial(FieldSpec, "int", "bytes")
_count = partial(FieldSpec, "int", "")
_text = partial(FieldSpec, "text", "")
_number = partial(FieldSpec, "float", "")
_ratio = partial(FieldSpec, "float", "0 to 1")
_per_s = partial(FieldSpec, "float", "1/s")
_bytes_per_s = partial(FieldSpec, "float", "bytes/s")
_joules = partial(FieldSpec, "float", "J")

_NODE = ("node", "run")
_PIPELINE = ("node", "run", "site", "pipeline")
_TASK = (
    _ms("queue_ms", "time in the worker's queue"),
    _ms("decode_ms", "time to decode the request's tensors"),
    _ms("compute_ms", "time to compute the result"),
    _ms("encode_ms", "time to encode the result's tensors"),
    _bytes("bytes_in", "size of the input message"),
    _bytes("bytes_out", "size of the output message"),
    _count("batch", "number of tasks computed in the same batch"),
)
_REQUEST = _text("request", "request id, in hex")
_POWER = (
    FieldSpec("float", "W", "power_w", "power now, or mean power since the previous sample, depending on the sensor"),
    _joules("energy_j", "energy since the previous sample"),
)


MEASUREMENTS: dict[str, Measurement] = {}


def _define(name: str, description: str, tags: tuple[str, ...], *fields: FieldSpec) -> None:
    MEASUREMENTS[name] = Measurement(name, description, tags, fields)


_define(
    "request",
    "A request that has ended, with or without a result; reported by its source.",
    (*_PIPELINE, "source"),
    _ms("latency_ms", "from the call to the end of the request"),
    _ms("network_ms", "part of the latency that is spent outside the stages"),
    _count("attempts", "number of times the request was sent"),
    _bytes("bytes_out", "size of the request as sent"),
    _REQUEST,
    _text("error", "error code of a request without a result; else empty"),
)
_define(
    "hop",
    "The part of one stage in a request that has a result.",
    (*_PIPELINE, "source", "stage", "worker"),
    *_TASK,
    _REQUEST,
    _count("place", "index of the stage on the request's path: 0, 1, ..."),
)
_define(
    "task",
    "A task that a worker has finished; reported by the worker, so a task that ran twice counts twice.",
    (*_PIPELINE, "stage", "worker"),
    *_TASK,
    _REQUEST,
    _text("error", "error code of a task that failed; else empty"),
)
_define(
    "batch",
    "A batch that a worker has computed.",
    (*_PIPELINE, "stage", "worker", "phase"),
    _count("tasks", "number of tasks in the batch"),
    _count("rows", "number of samples in the batch (training only)"),
    _ms("busy_ms", "time the worker was busy with it"),
)
_define(
    "step",
    "A training step that is committed on all stages.",
    (*_PIPELINE, "source"),
    _count("step", "number of the step"),
    _count("epoch", "number of the epoch"),
    _count("rows", "number of samples in the step"),
    _ms("step_ms", "duration of the step"),
    _number("loss", "mean loss over the step's samples"),
    _ratio("accuracy", "share of the step's samples classified correctly, for a loss that defines it"),
)
_define(
    "link",
    "Bytes that a link between two sites has carried since it started.",
    (*_PIPELINE, "from", "to"),
    _bytes("bytes_out", "from `from` to `to`"),
    _bytes("bytes_in", "from `to` to `from`"),
)
_define(
    "life",
    "The start or the end of a process.",
    (*_PIPELINE, "role", "name"),
    _text("event", "start or stop"),
    _count("pid", "process id"),
)
_define(
    "dropped_events",
    "Events that a sender has dropped because its monitor did not read fast enough.",
    _PIPELINE,
    _count("count", "number of events lost"),
)
_define(
    "node",
    "The machine on which a monitor runs.",
    _NODE,
    _ratio("cpu", "share of the CPU time of all cores in use since the previous sample"),
    _number("load", "load average over the last minute"),
    _bytes("memory_used_bytes", "memory that is not available to processes"),
    _bytes("memory_total_bytes", "memory of the machine, or the memory limit of its container"),
)
_define(
    "interface",
    "A network interface of the node.",
    (*_NODE, "interface"),
    _bytes("received_bytes", "since the previous sample"),
    _bytes("sent_bytes", "since the previous sample"),
    _bytes_per_s("received_bytes_per_s", "mean since the previous sample"),
    _bytes_per_s("sent_bytes_per_s", "mean since the previous sample"),
    _count("errors", "packets lost or broken in both directions since the previous sample"),
)
_define(
    "process",
    "A process of Sparse on the node: one that sent `start`, or the monitor itself.",
    (*_NODE, "role", "name"),
    FieldSpec("float", "cores", "cpu", "mean number of cores in use since the previous sample"),
    FieldSpec("float", "s", "cpu_s", "CPU time since the process started"),
    _bytes("memory_bytes", "resident set size"),
    _count("threads", "number of threads"),
    _count("pid", "process id"),
)
_define(
    "gpu",
    "A GPU of the node.",
    (*_NODE, "gpu", "model"),
    _ratio("use", "share of the last sampling period in which the GPU computed"),
    _bytes("memory_used_bytes", "memory in use"),
    _bytes("memory_total_bytes", "memory of the GPU"),
    FieldSpec("float", "degrees Celsius", "temperature_c", "temperature of the chip"),
    *_POWER,
)
_define(
    "power",
    "A power rail of the node: a RAPL zone or a Jetson's rail. Rails without a slash in their name add up.",
    (*_NODE, "rail"),
    *_POWER,
)
_define(
    "energy",
    "The energy of a node beside the samples processed in the same time, so that one query divides them.",
    _NODE,
    _joules("energy_j", "energy of all GPUs and additive rails since the previous point"),
    _count("samples", "requests with a result and rows of steps, of sources on the node, in the same time"),
)
_define(
    "missing",
    "A value that cannot be measured on the node; written once.",
    (*_NODE, "sensor"),
    _text("reason", "reason why it cannot be measured"),
)
_define(
    "stage",
    "The load of a worker, from its presence record, each second.",
    (*_PIPELINE, "stage", "worker"),
    _text("state", "up, standby, draining or stopped"),
    _count("queue", "tasks waiting"),
    _ms("queue_ms", "mean wait of the tasks started lately"),
    _count("done", "tasks finished since the worker started"),
    _count("failed", "tasks answered with a failure"),
    _count("malformed", "messages that break the protocol"),
    _count("rejected", "tasks returned to their sender because the worker was full or leaving"),
    _count("expired", "tasks dropped because their deadline had passed"),
    _ratio("busy", "share of the last second spent computing"),
    _per_s("rate", "tasks finished in the last second"),
    _ms("task_ms", "mean time for which a task keeps the worker busy"),
)
_define(
    "source",
    "The requests of a source, from its presence record, each second.",
    (*_PIPELINE, "source"),
    _count("requests", "requests made since the source started"),
    _count("results", "requests answered with a result"),
    _count("in_flight", "requests sent and not yet answered"),
    _count("waiting", "requests waiting for a slot of the in-flight window"),
    _count("window", "size of the in-flight window"),
    _per_s("rate", "recent results per second"),
    _ms("latency_p50_ms", "median latency of the newest results"),
    _ms("latency_p99_ms", "99th percentile of the latency of the newest results"),
    _count("dropped", "samples dropped before they became requests"),
    _count("retries", "attempts after the first"),
    _count("failed", "requests that ended without a result"),
    _count("duplicates", "duplicate results, dropped"),
)
_define(
    "monitor",
    "The monitor itself; counts are since it started.",
    _NODE,
    _count("events", "events received"),
    _count("bad_events", "lines that are not a valid event"),
    _count("dropped_events", "events dropped because the buffer was full"),
    _count("points", "points made"),
    _count("waiting_points", "points not yet stored"),
    _count("dropped_points", "points lost because a store could not take them"),
    _count("dropped_spans", "spans that the trace collector did not take"),
)
