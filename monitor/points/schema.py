"""Every measurement that is kept: its tags, its fields, types and units, as docs/telemetry.md has them. Pure.

Tags say what a point is of, and are what a database indexes; fields are what was measured. Every point has the tags
`node` and `run`; a tag that does not apply is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FieldType = Literal["float", "int", "bool", "text"]


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One field of a measurement; `unit` as a person reads it."""

    name: str
    type: FieldType
    unit: str
    description: str


@dataclass(frozen=True, slots=True)
class Measurement:
    """Points of one kind."""

    name: str
    description: str
    tags: tuple[str, ...]
    fields: tuple[FieldSpec, ...]

    def field(self, name: str) -> FieldSpec:
        """Raises `KeyError` for one that it does not have."""
        return {field.name: field for field in self.fields}[name]


def _ms(name: str, means: str) -> FieldSpec:
    return FieldSpec(name, "float", "ms", means)


def _bytes(name: str, means: str) -> FieldSpec:
    return FieldSpec(name, "int", "bytes", means)


def _count(name: str, means: str) -> FieldSpec:
    return FieldSpec(name, "int", "", means)


def _text(name: str, means: str) -> FieldSpec:
    return FieldSpec(name, "text", "", means)


def _share(name: str, means: str) -> FieldSpec:
    return FieldSpec(name, "float", "0 to 1", means)


_HERE = ("node", "run")
_RUN = ("node", "run", "site", "pipeline")
_TIMES = (
    _ms("queue_ms", "it waited for the worker"),
    _ms("decode_ms", "its bytes were made tensors"),
    _ms("compute_ms", "it was computed"),
    _ms("encode_ms", "its result was made bytes"),
    _bytes("bytes_in", "of what came in"),
    _bytes("bytes_out", "of what went out"),
    _count("batch", "tasks that were computed together"),
)
_REQUEST = _text("request", "id, in hex")
_POWER = (
    FieldSpec("power_w", "float", "W", "as the sensor says it now, or as the energy since the last sample makes it"),
    FieldSpec("energy_j", "float", "J", "since the last sample"),
)

_ALL = (
    Measurement(
        "request",
        "A request that has come to its end at its source.",
        (*_RUN, "source"),
        (
            _ms("latency_ms", "from when it was asked to its end"),
            _ms("network_ms", "the part of the latency that no stage accounts for"),
            _count("attempts", "how often it was sent"),
            _bytes("bytes_out", "of its content, as it was sent"),
            _REQUEST,
            _text("error", "of a request without a result: the error's name; else empty"),
        ),
    ),
    Measurement(
        "hop",
        "What one stage did for a request that has its result.",
        (*_RUN, "source", "stage", "worker"),
        (*_TIMES, _REQUEST, _count("place", "of the hop on the request's way: 0, 1, ...")),
    ),
    Measurement(
        "task",
        "A task that a worker is done with, as it says itself: tasks that were done twice are here twice.",
        (*_RUN, "stage", "worker"),
        (*_TIMES, _REQUEST, _text("error", "of a task that failed: its name; else empty")),
    ),
    Measurement(
        "batch",
        "A batch that a worker has computed.",
        (*_RUN, "stage", "worker", "phase"),
        (
            _count("tasks", "in it"),
            _count("rows", "of training: samples in it"),
            _ms("busy_ms", "it kept the worker busy"),
        ),
    ),
    Measurement(
        "step",
        "A training step that is committed on all stages.",
        (*_RUN, "source"),
        (
            _count("step", "its number"),
            _count("epoch", "it is part of"),
            _count("rows", "samples in it"),
            _ms("step_ms", "it took"),
            FieldSpec("loss", "float", "", "mean over its rows"),
            _share("accuracy", "of its rows, where the loss has one"),
        ),
    ),
    Measurement(
        "link",
        "What a link between two sites has carried since it began.",
        (*_RUN, "from", "to"),
        (_bytes("bytes_out", "from `from` to `to`"), _bytes("bytes_in", "the other way")),
    ),
    Measurement(
        "life",
        "A process has begun or ended.",
        (*_RUN, "role", "name"),
        (_text("event", "start or stop"), _count("pid", "process id")),
    ),
    Measurement(
        "dropped_events",
        "A sender had more to tell than its monitor took.",
        _RUN,
        (_count("count", "events that are lost"),),
    ),
    Measurement(
        "node",
        "The machine that a monitor is on.",
        _HERE,
        (
            _share("cpu", "of all cores' time that was spent since the last sample"),
            FieldSpec("load", "float", "", "mean number of processes that wanted to run, over the last minute"),
            _bytes("memory_used_bytes", "that no process could have any more"),
            _bytes("memory_total_bytes", "of the machine, or of its container"),
        ),
    ),
    Measurement(
        "interface",
        "A network interface of the node.",
        (*_HERE, "interface"),
        (
            _bytes("received_bytes", "since the last sample"),
            _bytes("sent_bytes", "since the last sample"),
            FieldSpec("received_bytes_per_s", "float", "bytes/s", "the same, for a second"),
            FieldSpec("sent_bytes_per_s", "float", "bytes/s", "the same, for a second"),
            _count("errors", "packets lost or broken, both ways, since the last sample"),
        ),
    ),
    Measurement(
        "process",
        "A process of ours on the node: one that said `start`, or the monitor itself.",
        (*_HERE, "role", "name"),
        (
            FieldSpec("cpu", "float", "cores", "that it kept busy since the last sample"),
            FieldSpec("cpu_s", "float", "s", "of processor time since it began"),
            _bytes("memory_bytes", "resident"),
            _count("threads", "it has"),
            _count("pid", "process id"),
        ),
    ),
    Measurement(
        "gpu",
        "A GPU of the node.",
        (*_HERE, "gpu", "model"),
        (
            _share("use", "of the time in which it computed anything, lately"),
            _bytes("memory_used_bytes", "taken"),
            _bytes("memory_total_bytes", "there is"),
            FieldSpec("temperature_c", "float", "degrees Celsius", "of the chip"),
            *_POWER,
        ),
    ),
    Measurement(
        "power",
        "A power rail of the node: RAPL's zones, a Jetson's rails. Those without a slash in their name add up.",
        (*_HERE, "rail"),
        _POWER,
    ),
    Measurement(
        "energy",
        "What a node's energy was spent on, so that the one can be divided by the other.",
        _HERE,
        (
            FieldSpec("energy_j", "float", "J", "of all its GPUs and rails, each joule once, since the last point"),
            _count("samples", "requests with a result and rows of steps, of sources on the node, since the last point"),
        ),
    ),
    Measurement(
        "missing",
        "Something that cannot be measured on the node; said once.",
        (*_HERE, "sensor"),
        (_text("reason", "why"),),
    ),
    Measurement(
        "stage",
        "A worker's load, as its presence record says it each second.",
        (*_RUN, "stage", "worker"),
        (
            _text("state", "up, standby, draining or stopped"),
            _count("queue", "tasks that wait"),
            _ms("queue_ms", "mean wait of the tasks begun lately"),
            _count("done", "tasks since it began"),
            _count("failed", "of them with a failure"),
            _count("malformed", "messages that broke the protocol"),
            _count("rejected", "tasks given back: it was full, or leaving"),
            _count("expired", "tasks past their deadline"),
            _share("busy", "of its time"),
            FieldSpec("rate", "float", "1/s", "tasks finished in the last second"),
            _ms("task_ms", "mean time that a task keeps it busy"),
        ),
    ),
    Measurement(
        "source",
        "How a source's requests fare, as its presence record says it each second.",
        (*_RUN, "source"),
        (
            _count("requests", "asked for since it began"),
            _count("results", "answered"),
            _count("in_flight", "sent, and not answered yet"),
            _count("waiting", "for room in the window"),
            _count("window", "how many may be in flight"),
            FieldSpec("rate", "float", "1/s", "results lately"),
            _ms("latency_p50_ms", "median of the newest results"),
            _ms("latency_p99_ms", "99th percentile of the same"),
            _count("dropped", "samples that never became a request"),
            _count("retries", "attempts after the first"),
            _count("failed", "requests that ended without a result"),
            _count("duplicates", "second answers, dropped"),
        ),
    ),
    Measurement(
        "monitor",
        "The monitor itself.",
        _HERE,
        (
            _count("events", "it has taken since it began"),
            _count("bad_events", "it could not read"),
            _count("dropped_events", "that came faster than it could read them"),
            _count("points", "it has made"),
            _count("waiting_points", "that a store has not taken yet"),
            _count("dropped_points", "that no store has room for any more"),
            _count("dropped_spans", "that a collector of traces did not take"),
        ),
    ),
)

MEASUREMENTS = {measurement.name: measurement for measurement in _ALL}
