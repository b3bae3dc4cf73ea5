"""The data of a figure as rows of cells, how it is plotted, and how numbers are written."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from monitor.report.run import ReportRun, group_runs

Cell = str | float | int | None
Row = tuple[Cell, ...]
# The part of a bar that stands for its sum, which has a range where the bar stands for several runs.
TOTAL = "total"


@dataclass(frozen=True)
class DataTable:
    """Rows with one cell per column; None where something was not measured. Column names end with their unit.

    A report needs so little of a data frame that pandas would be its largest dependency for its smallest part.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def __bool__(self) -> bool:
        return bool(self.rows)

    def column(self, name: str) -> list[Cell]:
        """The cells of a column. Raises `ValueError` for an unknown column."""
        index = self.columns.index(name)
        return [row[index] for row in self.rows]

    def floats(self, name: str) -> list[float]:
        """The cells of a column as numbers; NaN where a cell has none."""
        return [float(cell) if isinstance(cell, int | float) else float("nan") for cell in self.column(name)]

    def where(self, name: str, value: Cell, *, differs: bool = False) -> DataTable:
        """The rows whose cell equals `value`, or whose cell differs from it."""
        index = self.columns.index(name)
        return DataTable(self.columns, tuple(row for row in self.rows if (row[index] != value) == differs))

    def distinct(self, name: str) -> list[str]:
        """The distinct cells of a text column, in the order of their first rows."""
        return list(dict.fromkeys(str(cell) for cell in self.column(name)))

    def preview(self, limit: int) -> DataTable:
        """At most `limit` of the rows, without columns that are empty in all of them."""
        rows = downsample(self.rows, limit)
        columns = [index for index in range(len(self.columns)) if any(row[index] is not None for row in rows)]
        names = tuple(self.columns[index] for index in columns)
        return DataTable(names, tuple(tuple(row[index] for index in columns) for row in rows))

    def to_csv(self) -> str:
        """The table as a CSV file with a header; None is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()


def table_of_groups(
    columns: Sequence[str], runs: Sequence[ReportRun], rows_of: Callable[[Sequence[ReportRun]], Iterable[Row]]
) -> DataTable:
    """The rows of each group of repeats, after a column `run` with the label of the group."""
    rows = [(label, *row) for label, repeats in group_runs(runs).items() for row in rows_of(repeats)]
    return DataTable(("run", *columns), tuple(rows))


def downsample(rows: Sequence[Row], limit: int) -> list[Row]:
    """At most `limit` rows, evenly spaced, including the first and the last."""
    if len(rows) <= limit:
        return list(rows)
    last = len(rows) - 1
    return [rows[round(index * last / (limit - 1))] for index in range(limit)]


def format_number(value: float) -> str:
    """A number with three significant digits; a whole number, or one above 100, without decimals."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.2e}"


@dataclass(frozen=True)
class LinePlot:
    """Lines: one per value of the column `series`, in one panel per value of the column `panel`."""

    x: str
    y: str
    x_label: str
    y_label: str
    series: str = "run"
    panel: str = ""
    band_axis: Literal["", "x", "y"] = ""  # the axis whose range is in the columns `low` and `high`
    stepped: bool = False  # a value holds until the next point
    y_is_fraction: bool = False
    log_x: bool = False
    markers: bool = False  # points are separate measurements: mark each, with an error bar


@dataclass(frozen=True)
class StackedBars:
    """One horizontal bar per value of the column `bar`, a stack of parts; the row `TOTAL` has the range of the sum."""

    value: str
    label: str
    bar: str = "run"
    part: str = "part"
    group_by: str = ""  # the column of a name that is written above consecutive parts


@dataclass(frozen=True)
class ReportFigure:
    """One figure: its texts, data and plot. A figure without rows is left out of the report."""

    title: str
    caption: str
    table: DataTable
    plot: LinePlot | StackedBars
    missing_reason: str  # why the table has no rows, where it has none
    percentiles: DataTable | None = None  # shown below the plot
    name: str = ""  # of its files
