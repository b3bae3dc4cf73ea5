"""Workers and sources as tables for a person. Text in them is from the network: never markup, never control codes.

On a terminal a stage is a heading, so that the table fits; in a file or a pipe each line says all of one worker.
"""

from __future__ import annotations

from collections.abc import Sequence

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
_GIVE_WAY = ("node", "model")  # where there is no room for all: they tell little of how the work fares
_NAME_WIDTHS = {True: 20, False: 32}  # at most, of a worker or a stage; the former where columns stand close together
_MINUTE_S, _HOUR_S, _DAY_S = 60, 3600, 86400


def format_age(seconds: float | None) -> str:
    """`12 s`, `3 min`, `5 h`, `2 d`; `?` where nobody says."""
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
    """A row for each worker (and whether it is lost), and for each stage of `pipeline` that has none.

    With headings, what went wrong is in lines below, where a narrow terminal has room for it.
    """
    rows = [((birth.site, birth.pipeline, birth.stage), birth.worker, _worker(birth, lost)) for birth, lost in workers]
    served = {where for where, _, _ in rows}
    for stage in pipeline.stage if pipeline else ():
        where = (stage.site, pipeline.name if pipeline else "", stage.name)
        if where not in served:
            rows.append((where, "none up", []))
    if not rows:
        return Text("no worker is up")
    words = ("worker", "node", "device", "model", "state")
    numbers = ("age", "queue", "waits ms", "tasks/s", "ms/task", "done")
    table = _table(("site", "pipeline", "stage"), words, numbers, headings=headings, gap=column_gap)
    troubles = [(birth.worker, _troubles_of_worker(birth)) for birth, _ in workers]
    if not headings:
        table.add_column("troubles")
        for (_, _, cells), (_, said) in zip(rows, troubles, strict=False):  # a stage without a worker comes after these
            cells.append(_said(said or "-"))
    _fill(table, rows, headings=headings)
    if not headings:
        return table
    return Group(table, *(Text(f"  {name}  {said}", style="yellow") for name, said in troubles if said))


def sources_table(
    sources: Sequence[tuple[SourceRecord, bool]], *, headings: bool = False, column_gap: int = 2
) -> RenderableType:
    """A row for each source (and whether it is lost); with headings, what went wrong is in lines below."""
    if not sources:
        return Text("no source is up")
    rows = [((birth.site, birth.pipeline), birth.source, _source(birth, lost)) for birth, lost in sources]
    words = ("source", "node", "state")
    numbers = ("age", "in flight", "results/s", "p50 ms", "p99 ms", "results")
    table = _table(("site", "pipeline"), words, numbers, headings=headings, gap=column_gap)
    troubles = [(birth.source, source_problems(birth)) for birth, _ in sources]
    if not headings:
        for column in ("dropped", "retried", "failed", "duplicates"):
            table.add_column(column)
        for (_, _, cells), (_, found) in zip(rows, troubles, strict=True):
            cells += [_said(found.get(what) or "-") for what in ("dropped", "retried", "failed", "duplicates")]
    _fill(table, rows, headings=headings)
    if not headings:
        return table
    lines = [
        Text.assemble(
            f"  {name}  ", *((f"{what} {said}  ", STATE_STYLES.get(what, "yellow")) for what, said in found.items())
        )
        for name, found in troubles
        if found
    ]
    return Group(table, *lines)


def source_problems(birth: SourceRecord) -> dict[str, str]:
    """What was dropped, retried and failed, each with its reasons, and how many twins; without what never happened."""
    load = birth.load
    found = {
        "dropped": format_counts(load.dropped),
        "retries_by_reason": format_counts(load.retries),
        "failed": format_counts(load.failed),
        "duplicates": str(load.duplicates or ""),
    }
    return {what: said for what, said in found.items() if said}


def _troubles_of_worker(birth: WorkerRecord) -> str:
    load = birth.load
    troubles = {
        "failed": load.failed,
        "malformed": load.malformed,
        "turned away": load.rejected,
        "expired": load.expired,
    }
    return format_counts({what: count for what, count in troubles.items() if count})


def _worker(birth: WorkerRecord, lost: bool) -> list[Text | str]:
    load = birth.load
    return [
        untrusted_text(birth.node),
        untrusted_text(birth.device),
        untrusted_text(birth.fingerprint),
        _said("lost" if lost else birth.state),
        format_age(birth.up_s),
        str(load.queue),
        f"{load.queue_ms:.0f}",
        f"{load.rate:.1f}",
        f"{load.task_ms:.1f}",
        str(load.done),
    ]


def _source(birth: SourceRecord, lost: bool) -> list[Text | str]:
    load = birth.load
    return [
        untrusted_text(birth.node),
        _said("lost" if lost else birth.state),
        format_age(birth.up_s),
        f"{load.in_flight}/{load.window}",
        f"{load.rate:.1f}",
        f"{load.latency_ms.p50:.0f}",
        f"{load.latency_ms.p99:.0f}",
        str(load.results),
    ]


def _table(where: Sequence[str], words: Sequence[str], numbers: Sequence[str], *, headings: bool, gap: int) -> Table:
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    for column in words if headings else (*where, *words):
        table.add_column(column, no_wrap=column not in _GIVE_WAY)
    if headings:
        table.columns[0].max_width = _NAME_WIDTHS[gap < 2]
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)  # figures are shown whole; names give way
    return table


def _fill(table: Table, rows: Sequence[tuple[tuple[str, ...], str, Sequence[Text | str]]], *, headings: bool) -> None:
    before: tuple[str, ...] = ()
    for where, name, cells in rows:
        if headings and where != before:
            table.add_row(Text(" ".join(where), style="bold", no_wrap=True, overflow="ellipsis"))
        before = where
        shown = Text(
            f"  {name}" if headings else name, style=STATE_STYLES.get(name, ""), no_wrap=True, overflow="ellipsis"
        )
        table.add_row(*([] if headings else where), shown, *cells)


def untrusted_text(text: str, style: str = "") -> Text:
    """What may be of any length gives way to what may not."""
    return Text(sanitize_text(text) or "-", style, no_wrap=True, overflow="ellipsis")


def _said(word: str) -> Text:
    return Text(word, style=STATE_STYLES.get(word, ""))
