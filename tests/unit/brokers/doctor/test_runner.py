"""The table of measurements."""

from __future__ import annotations

from brokers.doctor.runner import ThroughputResult, format_table


def test_table_fits_a_terminal_and_shows_the_slower_direction() -> None:
    lines = format_table([ThroughputResult("a-long-name-of-a-stage to another", 16 << 20, 12345.6, 12345.6, 0.1)])
    assert all(len(line) <= 100 for line in lines)
    assert lines[1].split()[-1] == "0.1"
