"""Tables of figures: thinning, empty columns, CSV and number formats."""

from __future__ import annotations

import pytest

from monitor.report.table import DataTable, downsample, format_number


def test_downsampling_keeps_both_ends() -> None:
    rows = downsample([(number,) for number in range(5001)], 2000)
    assert (len(rows), rows[0], rows[-1]) == (2000, (0,), (5000,))
    assert rows == sorted(set(rows))


def test_empty_columns_are_removed() -> None:
    table = DataTable(("run", "low", "high"), (("a", None, 1.0), ("b", None, None))).preview(2)
    assert table == DataTable(("run", "high"), (("a", 1.0), ("b", None)))


def test_csv_has_exact_numbers_and_quoted_names() -> None:
    table = DataTable(("run", "share", "low"), (('a, "b"', 1 / 3, None),))
    assert table.to_csv().splitlines() == ["run,share,low", f'"a, ""b""",{1 / 3},']


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.0, "12"), (0.0, "0"), (12345.6, "12,346"), (99.96, "100"), (1.2345, "1.23"), (0.00012, "1.20e-04")],
)
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert format_number(value) == text
