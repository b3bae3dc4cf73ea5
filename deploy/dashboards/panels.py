"""The panels of the dashboards and their InfluxQL queries, the same for Chronograf and Grafana.

The programs differ in how a query refers to the time range, the interval and the selected run: that is a `Dialect`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from string import Template
from typing import Literal

PanelStyle = Literal["lines", "stacked", "bars"]
PanelUnit = Literal["", "1/s", "ms", "%", "cores", "bytes", "bytes/s", "W", "J"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """The placeholders that a program replaces before it sends a query."""

    database_prefix: str  # before the name of a measurement
    time_condition: str
    interval: str  # the width of one point of a plot
    run_value: str  # the selected run, quoted


@dataclass(frozen=True, slots=True)
class Query:
    """One query; its result has the `columns` for each combination of the tags in `group_by`."""

    template: str
    columns: tuple[str, ...]
    group_by: tuple[str, ...]

    def to_influxql(self, dialect: Dialect) -> str:
        return Template(self.template).substitute(
            db=dialect.database_prefix,
            when=dialect.time_condition,
            run=f'{dialect.time_condition} AND "run" = {dialect.run_value}',
            interval=f"time({dialect.interval})",
        )


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot."""

    title: str
    unit: PanelUnit
    queries: tuple[Query, ...]
    style: PanelStyle = "lines"
    note: str = field(default="", kw_only=True)


def _quote(names: Iterable[str]) -> list[str]:
    return [f'"{name}"' for name in names]


def _select(columns: Mapping[str, str], source: str, groups: Iterable[str], fill: str = "none") -> str:
    """`fill(none)` leaves out times without data; a null there would break the lines of a plot."""
    expressions = ", ".join(f'{expression} AS "{name}"' for name, expression in columns.items())
    return f"SELECT {expressions} FROM {source} GROUP BY {', '.join(groups)} fill({fill})"


def _of_run(measurement: str) -> str:
    return f'$db"{measurement}" WHERE $run'


def _query(measurement: str, group_by: tuple[str, ...], **columns: str) -> Query:
    """The expressions in `columns`, for each combination of tags."""
    template = _select(columns, _of_run(measurement), ["$interval", *_quote(group_by)])
    return Query(template, tuple(columns), group_by)


def _sum(measurement: str, over: tuple[str, ...], group_by: tuple[str, ...], **columns: str) -> Query:
    """The expressions for each combination of `group_by` and `over`, summed over the latter."""
    inner = _select(columns, _of_run(measurement), ["$interval", *_quote((*group_by, *over))])
    sums = {name: f'sum("{name}")' for name in columns}
    template = _select(sums, f"({inner}) WHERE $when", ["$interval", *_quote(group_by)])
    return Query(template, tuple(columns), group_by)


def _rate(measurement: str, group_by: tuple[str, ...], **columns: str) -> Query:
    """The expressions, which count events, per second.

    InfluxQL cannot divide by the interval, so this is the derivative of the cumulative sum. Intervals without events
    are filled with 0: their rate is zero.
    """
    sums = {name: f"cumulative_sum({count})" for name, count in columns.items()}
    inner = _select(sums, _of_run(measurement), ["$interval", *_quote(group_by)], fill="0")
    rates = ", ".join(f'non_negative_derivative("{name}", 1s) AS "{name}"' for name in columns)
    template = f"SELECT {rates} FROM ({inner}) WHERE $when GROUP BY {', '.join(_quote(group_by))}"
    return Query(template, tuple(columns), group_by)


def _increase(counter: str) -> str:
    """The increase of a counter; 0 when a process has restarted."""
    return f'non_negative_difference(max("{counter}"))'


_DURATIONS = ("queue", "decode", "compute", "encode")
_TASK_MS = " + ".join(f'"{part}_ms"' for part in _DURATIONS)
_STAGE_LATENCY = Query(
    'SELECT percentile("ms", 50) AS "p50", percentile("ms", 95) AS "p95" '
    f'FROM (SELECT {_TASK_MS} AS "ms" FROM $db"task" WHERE $run) WHERE $when GROUP BY $interval, "stage" fill(none)',
    ("p50", "p95"),
    ("stage",),
)
# Without the conditions, intervals without samples would show an energy of 0: InfluxQL's x / 0 is 0.
_ENERGY = Query(
    'SELECT "energy" / "samples" AS "energy" FROM '
    '(SELECT sum("energy_j") AS "energy", sum("samples") AS "samples" FROM $db"energy" WHERE $run GROUP BY $interval) '
    'WHERE $when AND "samples" > 0 AND "energy" > 0',
    ("energy",),
    (),
)
_PERCENTILES = {f"p{percent}": f'percentile("latency_ms", {percent})' for percent in (50, 95, 99)}
_ERROR_COUNTERS = ("failed", "rejected", "expired", "malformed")

WORKLOAD_PANELS = (
    Panel("Requests", "1/s", (_rate("request", ("source",), requests='count("latency_ms")'),)),
    Panel("Request latency", "ms", (_query("request", ("source",), **_PERCENTILES),)),
    Panel(
        "Time by stage",
        "ms",
        (
            _sum("hop", ("stage",), ("pipeline",), **{part: f'mean("{part}_ms")' for part in _DURATIONS}),
            _query("request", ("pipeline",), network='mean("network_ms")'),
        ),
        "stacked",
        note="Mean of a request, summed over its stages. Network is the time outside the stages.",
    ),
    Panel("Tasks by stage", "1/s", (_rate("task", ("stage",), tasks='count("compute_ms")'),)),
    Panel("Task latency by stage", "ms", (_STAGE_LATENCY,), note="From the arrival of a task to its result."),
    Panel("Worker utilisation", "%", (_query("stage", ("stage", "worker"), busy='mean("busy") * 100'),)),
)
QUEUE_PANELS = (
    Panel("Queue length", "", (_sum("stage", ("worker",), ("stage",), tasks='mean("queue")'),)),
    Panel("Queueing time", "ms", (_query("task", ("stage",), wait='mean("queue_ms")'),)),
    Panel(
        "Retries and drops",
        "",
        (_query("source", ("source",), **{name: _increase(name) for name in ("retries", "dropped", "failed")}),),
        "bars",
    ),
    Panel(
        "Worker errors",
        "",
        (_sum("stage", ("worker",), ("stage",), **{name: _increase(name) for name in _ERROR_COUNTERS}),),
        "bars",
    ),
    Panel(
        "Traffic between sites",
        "bytes/s",
        (
            _query(
                "link",
                ("from", "to"),
                out='non_negative_derivative(max("bytes_out"), 1s)',
                back='non_negative_derivative(max("bytes_in"), 1s)',
            ),
        ),
    ),
    Panel(
        "Telemetry",
        "",
        (
            _query("monitor", ("node",), waiting='max("waiting_points")', lost=_increase("dropped_points")),
            _query("dropped_events", ("node",), dropped_events='sum("count")'),
        ),
        note="Points not yet stored, points lost, and events that the monitor did not receive.",
    ),
)
NODE_PANELS = (
    Panel("CPU", "%", (_query("node", ("node",), cpu='mean("cpu") * 100'),)),
    Panel("Memory", "bytes", (_query("node", ("node",), used='mean("memory_used_bytes")'),)),
    Panel(
        "Network",
        "bytes/s",
        (
            _query(
                "interface",
                ("node", "interface"),
                received='mean("received_bytes_per_s")',
                sent='mean("sent_bytes_per_s")',
            ),
        ),
    ),
    Panel("CPU by process", "cores", (_query("process", ("node", "name"), cpu='mean("cpu")'),)),
    Panel("Memory by process", "bytes", (_query("process", ("node", "name"), memory='mean("memory_bytes")'),)),
    Panel("GPU use", "%", (_query("gpu", ("node", "gpu"), use='mean("use") * 100'),)),
    Panel("GPU memory", "bytes", (_query("gpu", ("node", "gpu"), used='mean("memory_used_bytes")'),)),
    Panel(
        "Power",
        "W",
        (
            _query("gpu", ("node", "gpu"), power='mean("power_w")'),
            _query("power", ("node", "rail"), power='mean("power_w")'),
        ),
    ),
    Panel("Energy per sample", "J", (_ENERGY,), note="Of nodes with power sensors; a sample is a result or a row."),
)
TRAINING_PANELS = (
    Panel("Loss", "", (_query("step", ("source",), loss='mean("loss")'),)),
    Panel("Accuracy", "%", (_query("step", ("source",), accuracy='mean("accuracy") * 100'),)),
    Panel("Rows trained", "1/s", (_rate("step", ("source",), rows='sum("rows")'),)),
    Panel("Step duration", "ms", (_query("step", ("source",), step='mean("step_ms")'),)),
)
SECTIONS = {
    "Workload": WORKLOAD_PANELS,
    "Queues and errors": QUEUE_PANELS,
    "Nodes": NODE_PANELS,
    "Training": TRAINING_PANELS,
}
