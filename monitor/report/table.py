"""The numbers of one figure, as rows: what is drawn, what stands on the page, and what its CSV file holds. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Cell = str | float | int | None
# The part of a bar that is no part but all of it: of repeats, the median of their wholes, with the least and the most.
TOTAL = "total"


@dataclass(frozen=True)
class DataTable:
    """Rows of cells, one for each column; None is what was not measured. A column's name ends with its unit."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __bool__(self) -> bool:
        return bool(self.rows)

    def column(self, name: str) -> list[Cell]:
        """All of its cells; raises `ValueError` for a column that is not there."""
        place = self.columns.index(name)
        return [row[place] for row in self.rows]

    def floats(self, name: str) -> list[float]:
        """The same as numbers; NaN where there is none."""
        return [float(cell) if isinstance(cell, int | float) else float("nan") for cell in self.column(name)]

    def where(self, name: str, value: Cell) -> DataTable:
        """Only the rows that have this value there."""
        place = self.columns.index(name)
        return DataTable(self.columns, tuple(row for row in self.rows if row[place] == value))

    def where_not(self, name: str, value: Cell) -> DataTable:
        """Only the rows that have another value there."""
        place = self.columns.index(name)
        return DataTable(self.columns, tuple(row for row in self.rows if row[place] != value))

    def distinct(self, name: str) -> list[str]:
        """The different cells of a column of text, in the order in which they come."""
        return list(dict.fromkeys(str(cell) for cell in self.column(name)))

    def to_csv(self) -> str:
        """As a CSV file: a line of names, then the rows; nothing where nothing was measured."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()


@dataclass(frozen=True)
class LinePlot:
    """Drawn as lines: one for each value of `series`, a panel below the other for each value of `panel`."""

    x: str
    y: str
    x_label: str
    y_label: str
    series: str = "run"
    panel: str = ""
    band_axis: Literal["", "x", "y"] = ""  # `low` and `high` are columns, and bounds of this
    stepped: bool = False  # a value holds until the next point
    y_is_fraction: bool = False  # y goes from 0 to 1
    log_x: bool = False
    markers: bool = False  # each point is a value of its own


@dataclass(frozen=True)
class StackedBars:
    """Drawn as one bar for each value of `bar`, made of `part`s end to end; its `TOTAL` has the bounds of the whole."""

    value: str
    label: str
    bar: str = "run"
    part: str = "part"
    group_by: str = ""  # a column by which parts belong together: written above them


PlotSpec = LinePlot | StackedBars


@dataclass(frozen=True)
class ReportFigure:
    """One figure: how it is drawn, from which numbers, and what a reader sees in it."""

    name: str
    title: str
    caption: str
    table: DataTable
    plot: PlotSpec
    percentiles: DataTable | None = None  # numbers that stand under the picture, for all to see


@dataclass(frozen=True)
class OmittedFigure:
    """A figure that no run has the numbers for."""

    title: str
    reason: str


def downsample(rows: Sequence[tuple[Cell, ...]], limit: int) -> list[tuple[Cell, ...]]:
    """At most so many of these rows, evenly chosen, the first and the last among them."""
    if len(rows) <= limit:
        return list(rows)
    last = len(rows) - 1
    return [rows[round(place * last / (limit - 1))] for place in range(limit)]
