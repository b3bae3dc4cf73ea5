"""The tables of `sparse status`. Text in them comes from the network, and is never markup or control codes.

On a terminal the stages are headings, so that a table fits into 80 columns; in a file each line is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from brokers.config.pipeline_file import Pipeline
from brokers.dispatch.presence import SourceRecord, WorkerRecord
from monitor.presence.inference_stats import format_counts, sanitize_text

STATE_STYLES = {
    "lost": "red",
    "none up": "red",
    "failed": "red",
    "draining": "yellow",
    "standby": "dim",
    "stopped": "dim",
    "-": "dim",
}
_Value = Callable[[Any], str]  # the text of a cell, from a record
_WORKER_TEXTS: Mapping[str, _Value] = {
    "node": lambda record: record.node,
    "device": lambda record: record.device,
    "model": lambda record: record.fingerprint,
}
_WORKER_NUMBERS: Mapping[str, _Value] = {
    "age": lambda record: format_age(record.up_s),
    "queue": lambda record: str(record.load.queue),
    "wait ms": lambda record: f"{record.load.queue_ms:.0f}",
    "tasks/s": lambda record: f"{record.load.rate:.1f}",
    "ms/task": lambda record: f"{record.load.task_ms:.1f}",
    "done": lambda record: str(record.load.done),
}
_SOURCE_TEXTS: Mapping[str, _Value] = {"node": lambda record: record.node}
_SOURCE_NUMBERS: Mapping[str, _Value] = {
    "age": lambda record: format_age(record.up_s),
    "in flight": lambda record: f"{record.load.in_flight}/{record.load.window}",
    "results/s": lambda record: f"{record.load.rate:.1f}",
    "p50 ms": lambda record: f"{record.load.latency_ms.p50:.0f}",
    "p99 ms": lambda record: f"{record.load.latency_ms.p99:.0f}",
    "results": lambda record: str(record.load.results),
}
_WORKER_PROBLEMS = ("problems",)
_SOURCE_PROBLEMS = ("dropped", "retried", "failed", "duplicates")
_SHRINKING = ("node", "model")  # columns that are cut where the terminal is too narrow for all
_NAME_WIDTHS = {True: 20, False: 32}  # limits, by whether columns are close together
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


class _Row(NamedTuple):
    place: tuple[str, ...]  # site, pipeline and, for a worker, stage
    name: str
    cells: list[Text | str]
    problems: dict[str, str]  # by column, only those that occurred


def format_age(seconds: float | None) -> str:
    """`12 s`, `3 min`, `5 h` or `2 d`; `?` if it is unknown."""
    if seconds is None:
        return "?"
    for unit_s, unit in ((_DAY_S, "d"), (_HOUR_S, "h"), (_MINUTE_S, "min")):
        if seconds >= unit_s:
            return f"{seconds // unit_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def workers_table(
    workers: Sequence[tuple[WorkerRecord, bool]],
    pipeline: Pipeline | None = None,
    *,
    headings: bool = False,
    column_gap: int = 2,
) -> RenderableType:
    """A row for each worker (its record, and whether it is lost) and for each stage of `pipeline` without workers.

    With headings, problems are in lines below the table.
    """
    rows = [
        _Row(
            (record.site, record.pipeline, record.stage),
            record.worker,
            _cells(record, lost, _WORKER_TEXTS, _WORKER_NUMBERS),
            _worker_problems(record),
        )
        for record, lost in workers
    ]
    if pipeline is not None:
        served = {row.place for row in rows}
        places = [(stage.site, pipeline.name, stage.name) for stage in pipeline.stage]
        rows += [_Row(place, "none up", [], {}) for place in places if place not in served]
    if not rows:
        return Text("no worker is up")
    place = ("site", "pipeline", "stage")
    table = _make_table(place, ("worker", *_WORKER_TEXTS, "state"), _WORKER_NUMBERS, headings, column_gap)
    return _fill(table, rows, _WORKER_PROBLEMS, headings)


def sources_table(
    sources: Sequence[tuple[SourceRecord, bool]], *, headings: bool = False, column_gap: int = 2
) -> RenderableType:
    """A row for each source (its record, and whether it is lost); with headings, problems are in lines below."""
    if not sources:
        return Text("no source is up")
    rows = [
        _Row(
            (record.site, record.pipeline),
            record.source,
            _cells(record, lost, _SOURCE_TEXTS, _SOURCE_NUMBERS),
            _source_problems(record),
        )
        for record, lost in sources
    ]
    texts = ("source", *_SOURCE_TEXTS, "state")
    table = _make_table(("site", "pipeline"), texts, _SOURCE_NUMBERS, headings, column_gap)
    return _fill(table, rows, _SOURCE_PROBLEMS, headings)


def untrusted_text(text: str, style: str = "") -> Text:
    """Text from the network in a cell, cut where there is no room for it."""
    return Text(sanitize_text(text) or "-", style, no_wrap=True, overflow="ellipsis")


def _worker_problems(record: WorkerRecord) -> dict[str, str]:
    counts = {name: getattr(record.load, name) for name in ("failed", "malformed", "rejected", "expired")}
    text = format_counts({name: count for name, count in counts.items() if count})
    return {"problems": text} if text else {}


def _source_problems(record: SourceRecord) -> dict[str, str]:
    load = record.load
    texts = {
        "dropped": format_counts(load.dropped),
        "retried": format_counts(load.retries),
        "failed": format_counts(load.failed),
        "duplicates": str(load.duplicates or ""),
    }
    return {name: text for name, text in texts.items() if text}


def _cells(
    record: WorkerRecord | SourceRecord, lost: bool, texts: Mapping[str, _Value], numbers: Mapping[str, _Value]
) -> list[Text | str]:
    state = _styled("lost" if lost else record.state)
    return [
        *(untrusted_text(value(record)) for value in texts.values()),
        state,
        *(value(record) for value in numbers.values()),
    ]


def _make_table(
    place: Sequence[str], texts: Sequence[str], numbers: Iterable[str], headings: bool, column_gap: int
) -> Table:
    table = Table(box=None, padding=(0, column_gap, 0, 0), pad_edge=False, header_style="dim")
    for column in texts if headings else (*place, *texts):
        table.add_column(column, no_wrap=column not in _SHRINKING)
    if headings:
        table.columns[0].max_width = _NAME_WIDTHS[column_gap < 2]
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)  # numbers are never cut
    return table


def _fill(table: Table, rows: Sequence[_Row], problem_columns: Sequence[str], headings: bool) -> RenderableType:
    """Add the rows: below headings, with the problems in lines after the table; or complete, with all columns."""
    if not headings:
        for column in problem_columns:
            table.add_column(column)
        for row in rows:
            problems = [_styled(row.problems.get(column, "-")) for column in problem_columns] if row.cells else []
            table.add_row(*row.place, _name(row.name), *row.cells, *problems)
        return table
    previous: tuple[str, ...] = ()
    lines = []
    for row in rows:
        if row.place != previous:
            table.add_row(Text(" ".join(row.place), style="bold", no_wrap=True, overflow="ellipsis"))
        previous = row.place
        table.add_row(_name(row.name, indent="  "), *row.cells)
        if row.problems:
            line = Text(f"  {row.name}  ")
            for column, text in row.problems.items():
                label = "" if column in _WORKER_PROBLEMS else f"{column} "
                line.append(f"{label}{text}  ", STATE_STYLES.get(column, "yellow"))
            lines.append(line)
    return Group(table, *lines)


def _name(name: str, indent: str = "") -> Text:
    return Text(f"{indent}{name}", style=STATE_STYLES.get(name, ""), no_wrap=True, overflow="ellipsis")


def _styled(text: str) -> Text:
    return Text(text, style=STATE_STYLES.get(text, ""))
