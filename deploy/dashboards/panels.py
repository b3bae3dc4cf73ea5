"""What a dashboard shows of a run, panel by panel, and the InfluxQL that asks for it. Pure.

One table for all programs that draw: what differs between them is how they write the time that is looked at, and the
name of the run, which is a `Dialect`.
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
    """What a program puts into a query before it asks."""

    database_prefix: str  # what stands before a measurement's name
    time_condition: str  # the condition on time
    interval: str  # the width of what is one point on the screen
    run_value: str  # the run that was picked, in quotes


@dataclass(frozen=True, slots=True)
class Query:
    """One question; `columns` it answers with for each of `by`, which are tags."""

    template: str
    columns: tuple[str, ...]
    group_by: tuple[str, ...]

    def to_influxql(self, dialect: Dialect) -> str:
        """InfluxQL, as this program takes it."""
        here = f'{dialect.when} AND "run" = {dialect.run}'
        every = f"time({dialect.every})"
        return Template(self.template).substitute(db=dialect.database, here=here, when=dialect.when, every=every)


@dataclass(frozen=True, slots=True)
class Panel:
    """A third of a row."""

    title: str
    unit: PanelUnit
    queries: tuple[Query, ...]
    style: PanelStyle = "lines"
    note: str = field(default="", kw_only=True)


def _names(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f'"{name}"' for name in names)


def _select(columns: Mapping[str, str], source: str, groups: Iterable[str]) -> str:
    wanted = ", ".join(f'{expression} AS "{name}"' for name, expression in columns.items())
    # `fill(none)`: no point where nothing was measured. A null would be one that breaks lines.
    return f"SELECT {wanted} FROM {source} GROUP BY {', '.join(groups)} fill(none)"


def _from(measurement: str) -> str:
    return f'$db"{measurement}" WHERE $here'


def _ask(measurement: str, by: tuple[str, ...], **columns: str) -> Query:
    """Each column as it is, for each value of `by`."""
    template = _select(columns, _from(measurement), ["$every", *_names(by)])
    return Query(template, tuple(columns), by)


def _sum(measurement: str, of: tuple[str, ...], by: tuple[str, ...], **columns: str) -> Query:
    """Each column for each value of `of` first; then their sum for each value of `by`."""
    inner = _select(columns, _from(measurement), ["$every", *_names((*by, *of))])
    sums = {name: f'sum("{name}")' for name in columns}
    template = _select(sums, f"({inner}) WHERE $when", ["$every", *_names(by)])
    return Query(template, tuple(columns), by)


def _rate(measurement: str, by: tuple[str, ...], **columns: str) -> Query:
    """Each column, which counts what came, for a second.

    InfluxQL divides by no duration, so the sum so far is what is differentiated.
    """
    sums = {name: f"cumulative_sum({count})" for name, count in columns.items()}
    # Not `_select`: a moment without any is a rate of zero here, and no hole.
    wanted = ", ".join(f'{expression} AS "{name}"' for name, expression in sums.items())
    inner = f"SELECT {wanted} FROM {_from(measurement)} GROUP BY {', '.join(['$every', *_names(by)])} fill(0)"
    outer = ", ".join(f'non_negative_derivative("{name}", 1s) AS "{name}"' for name in columns)
    template = f"SELECT {outer} FROM ({inner}) WHERE $when GROUP BY {', '.join(_names(by))}"
    return Query(template, tuple(columns), by)


def _more(name: str) -> str:
    """By how much a count that only grows has grown; a process that began anew is no loss."""
    return f'non_negative_difference(max("{name}"))'


_HOP = ("queue", "decode", "compute", "encode")
_TASK_MS = " + ".join(f'"{part}_ms"' for part in _HOP)
_STAGE_LATENCY = Query(
    'SELECT percentile("ms", 50) AS "p50", percentile("ms", 95) AS "p95" '
    f'FROM (SELECT {_TASK_MS} AS "ms" FROM $db"task" WHERE $here) WHERE $when GROUP BY $every, "stage" fill(none)',
    ("p50", "p95"),
    ("stage",),
)
# Only where something was done, and measured: in InfluxQL a division by 0 is 0, which would say that it cost nothing.
_ENERGY = Query(
    'SELECT "energy" / "samples" AS "energy" FROM '
    '(SELECT sum("energy_j") AS "energy", sum("samples") AS "samples" FROM $db"energy" WHERE $here GROUP BY $every) '
    'WHERE $when AND "samples" > 0 AND "energy" > 0',
    ("energy",),
    (),
)
_PERCENTILES = {f"p{share}": f'percentile("latency_ms", {share})' for share in (50, 95, 99)}
_TROUBLES = ("failed", "rejected", "expired", "malformed")

WORKLOAD_PANELS = (
    Panel("Requests done", "1/s", (_rate("request", ("source",), requests='count("latency_ms")'),)),
    Panel("Latency of requests", "ms", (_ask("request", ("source",), **_PERCENTILES),)),
    Panel(
        "Where the time goes",
        "ms",
        (
            _sum("hop", ("stage",), ("pipeline",), **{part: f'mean("{part}_ms")' for part in _HOP}),
            _ask("request", ("pipeline",), network='mean("network_ms")'),
        ),
        "stacked",
        note="Of one request, over all its stages. Network is what no stage accounts for.",
    ),
    Panel("Tasks done by stage", "1/s", (_rate("task", ("stage",), tasks='count("compute_ms")'),)),
    Panel("Latency by stage", "ms", (_STAGE_LATENCY,), note="From a task's arrival to its result, in the worker."),
    Panel("Workers busy", "%", (_ask("stage", ("stage", "worker"), busy='mean("busy") * 100'),)),
)
QUEUE_PANELS = (
    Panel("Tasks that wait", "", (_sum("stage", ("worker",), ("stage",), waiting='mean("queue")'),)),
    Panel("Wait in the queue", "ms", (_ask("task", ("stage",), wait='mean("queue_ms")'),)),
    Panel(
        "Retries and drops",
        "",
        (_ask("source", ("source",), **{name: _more(name) for name in ("retries", "dropped", "failed")}),),
        "bars",
    ),
    Panel(
        "Troubles of workers",
        "",
        (_sum("stage", ("worker",), ("stage",), **{name: _more(name) for name in _TROUBLES}),),
        "bars",
    ),
    Panel(
        "Between sites",
        "bytes/s",
        (
            _ask(
                "link",
                ("from", "to"),
                out='non_negative_derivative(max("bytes_out"), 1s)',
                back='non_negative_derivative(max("bytes_in"), 1s)',
            ),
        ),
    ),
    Panel(
        "Telemetry itself",
        "",
        (
            _ask("monitor", ("node",), waiting='max("waiting_points")', lost=_more("dropped_points")),
            _ask("dropped_events", ("node",), unheard='sum("count")'),
        ),
        note="Points that no database has taken yet, that were given up, and events that no monitor took.",
    ),
)
NODE_PANELS = (
    Panel("CPU", "%", (_ask("node", ("node",), cpu='mean("cpu") * 100'),)),
    Panel("Memory", "bytes", (_ask("node", ("node",), used='mean("memory_used_bytes")'),)),
    Panel(
        "Network",
        "bytes/s",
        (
            _ask(
                "interface",
                ("node", "interface"),
                received='mean("received_bytes_per_s")',
                sent='mean("sent_bytes_per_s")',
            ),
        ),
    ),
    Panel("CPU of our processes", "cores", (_ask("process", ("node", "name"), cpu='mean("cpu")'),)),
    Panel("Memory of our processes", "bytes", (_ask("process", ("node", "name"), memory='mean("memory_bytes")'),)),
    Panel("GPU use", "%", (_ask("gpu", ("node", "gpu"), use='mean("use") * 100'),)),
    Panel("GPU memory", "bytes", (_ask("gpu", ("node", "gpu"), used='mean("memory_used_bytes")'),)),
    Panel(
        "Power",
        "W",
        (
            _ask("gpu", ("node", "gpu"), power='mean("power_w")'),
            _ask("power", ("node", "rail"), power='mean("power_w")'),
        ),
    ),
    Panel("Energy per sample", "J", (_ENERGY,), note="Of nodes that can measure it; a sample is a result or a row."),
)
TRAINING_PANELS = (
    Panel("Loss", "", (_ask("step", ("source",), loss='mean("loss")'),)),
    Panel("Accuracy", "%", (_ask("step", ("source",), accuracy='mean("accuracy") * 100'),)),
    Panel("Rows trained", "1/s", (_rate("step", ("source",), rows='sum("rows")'),)),
    Panel("Time of a step", "ms", (_ask("step", ("source",), step='mean("step_ms")'),)),
)
SECTIONS = {
    "Work": WORKLOAD_PANELS,
    "Queues and troubles": QUEUE_PANELS,
    "Nodes": NODE_PANELS,
    "Training": TRAINING_PANELS,
}
