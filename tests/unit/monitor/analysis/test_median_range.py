"""The median and the range of repeated measurements."""

from __future__ import annotations

import pytest

from monitor.analysis.median_range import MedianRange


def test_median_range_of_several_values() -> None:
    found = MedianRange.from_values([11.0, 10.0, 14.0])
    assert found == MedianRange(11.0, 10.0, 14.0, 3)
    assert found.bounds == (10.0, 14.0)


def test_single_value_has_no_bounds() -> None:
    assert MedianRange.from_values([1.5]).bounds == (None, None)


def test_no_values_raise_value_error() -> None:
    with pytest.raises(ValueError, match="no median"):
        MedianRange.from_values([])
