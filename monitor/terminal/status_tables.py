"""The tables of `sparse status`. Text in them comes from the network, and is never markup or control codes.

On a terminal the stages are headings, so that a table fits into 80 columns; in a file each line is complete.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
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


class _Row(NamedTuple):
    place: tuple[str, ...]
    name: str
    cells: Sequence[Text | str]
    problems: Mapping[str, str]  # by column


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of a table: attributes of the records, and functions of them by title."""

    place: tuple[str, ...]
    name: str
    texts: Mapping[str, _Value]
    numbers: Mapping[str, _Value]
    problems: Mapping[str, _Value]  # empty where there was no problem

    def row(self, record: WorkerRecord | SourceRecord, is_lost: bool) -> _Row:
        return _Row(
            tuple(getattr(record, attribute) for attribute in self.place),
            getattr(record, self.name),
            [
                *(untrusted_text(value(record)) for value in self.texts.values()),
                _styled("lost" if is_lost else record.state),
                *(value(record) for value in self.numbers.values()),
            ],
            {column: value(record) for column, value in self.problems.items()},
        )


_WORKERS = _Columns(
    place=("site", "pipeline", "stage"),
    name="worker",
    texts={
        "node": lambda record: record.node,
        "device": lambda record: record.device,
        "model": lambda record: record.fingerprint,
    },
    numbers={
        "age": lambda record: format_age(record.up_s),
        "queue": lambda record: str(record.load.queue),
        "wait ms": lambda record: f"{record.load.queue_ms:.0f}",
        "tasks/s": lambda record: f"{record.load.rate:.1f}",
        "ms/task": lambda record: f"{record.load.task_ms:.1f}",
        "done": lambda record: str(record.load.done),
    },
    problems={
        "problems": lambda record: format_counts(
            {name: getattr(record.load, name) for name in ("failed", "malformed", "rejected", "expired")}
        ),
    },
)
_SOURCES = _Columns(
    place=("site", "pipeline"),
    name="source",
    texts={"node": lambda record: record.node},
    numbers={
        "age": lambda record: format_age(record.up_s),
        "in flight": lambda record: f"{record.load.in_flight}/{record.load.window}",
        "results/s": lambda record: f"{record.load.rate:.1f}",
        "p50 ms": lambda record: f"{record.load.latency_ms.p50:.0f}",
        "p99 ms": lambda record: f"{record.load.latency_ms.p99:.0f}",
        "results": lambda record: str(record.load.results),
    },
    problems={
        "dropped": lambda record: format_counts(record.load.dropped),
        "retried": lambda record: format_counts(record.load.retries),
        "failed": lambda record: format_counts(record.load.failed),
        "duplicates": lambda record: str(record.load.duplicates or ""),
    },
)
_SHRINKING = ("node", "model")  # columns that are cut where the terminal is too narrow for all
_NAME_WIDTHS = {True: 20, False: 32}  # limits, by whether columns are close together
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


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
    served = {(record.site, record.pipeline, record.stage) for record, _ in workers}
    places = [(stage.site, pipeline.name, stage.name) for stage in pipeline.stage] if pipeline else []
    unserved = [place for place in places if place not in served]
    return _records_table(_WORKERS, workers, unserved, headings, column_gap)


def sources_table(
    sources: Sequence[tuple[SourceRecord, bool]], *, headings: bool = False, column_gap: int = 2
) -> RenderableType:
    """A row for each source (its record, and whether it is lost); with headings, problems are in lines below."""
    return _records_table(_SOURCES, sources, [], headings, column_gap)


def untrusted_text(text: str, style: str = "") -> Text:
    """Text from the network in a cell, cut where there is no room for it."""
    return Text(sanitize_text(text) or "-", style, no_wrap=True, overflow="ellipsis")


def _records_table(
    columns: _Columns,
    records: Sequence[tuple[WorkerRecord, bool]] | Sequence[tuple[SourceRecord, bool]],
    unserved: Sequence[tuple[str, ...]],
    headings: bool,
    column_gap: int,
) -> RenderableType:
    """A table whose lines are complete; or one with a heading for each place, and the problems in lines below."""
    if not records and not unserved:
        return Text(f"no {columns.name} is up")
    table = Table(box=None, padding=(0, column_gap, 0, 0), pad_edge=False, header_style="dim")
    for column in (*(() if headings else columns.place), columns.name, *columns.texts, "state"):
        table.add_column(column, no_wrap=column not in _SHRINKING)
    if headings:
        table.columns[0].max_width = _NAME_WIDTHS[column_gap < 2]
    for column in columns.numbers:
        table.add_column(column, justify="right", no_wrap=True)  # numbers are never cut
    for column in () if headings else columns.problems:
        table.add_column(column)
    rows = [columns.row(record, is_lost) for record, is_lost in records]
    rows += [_Row(place, "none up", [], {}) for place in unserved]
    for place, group in groupby(rows, key=lambda row: row.place):
        if headings:
            table.add_row(Text(" ".join(place), style="bold", no_wrap=True, overflow="ellipsis"))
        for row in group:
            if headings:
                table.add_row(_name(row.name, indent="  "), *row.cells)
            else:
                problems = (_styled(text or "-") for text in row.problems.values())
                table.add_row(*place, _name(row.name), *row.cells, *problems)
    lines = [_problems_line(row) for row in rows if any(row.problems.values())]
    return Group(table, *lines) if headings else table


def _problems_line(row: _Row) -> Text:
    line = Text(f"  {row.name}  ")
    for column, text in row.problems.items():
        if text:
            label = "" if column == "problems" else f"{column} "
            line.append(f"{label}{text}  ", STATE_STYLES.get(column, "yellow"))
    return line


def _name(name: str, indent: str = "") -> Text:
    return Text(f"{indent}{name}", style=STATE_STYLES.get(name, ""), no_wrap=True, overflow="ellipsis")


def _styled(text: str) -> Text:
    return Text(text, style=STATE_STYLES.get(text, ""))
