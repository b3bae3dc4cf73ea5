"""How often a daemon says what is wrong with what it is sent."""

from __future__ import annotations

from monitor.daemon.complaints import LOG_INTERVAL_S, ErrorCounts


def test_a_kind_is_said_at_once_and_then_only_now_and_then_with_a_count() -> None:
    complaints = ErrorCounts()
    complaints.add("no event")
    assert complaints.due_lines(100.0) == ["no event"]
    complaints.add("no event", 41)
    complaints.add("too large")
    assert complaints.due_lines(100.1) == ["too large"]
    assert complaints.due_lines(100.0 + LOG_INTERVAL_S) == ["no event (41 since this was last said)"]
    assert complaints.due_lines(100.0 + 9 * LOG_INTERVAL_S) == []
    assert complaints.total == 43


def test_kinds_are_bounded() -> None:
    complaints = ErrorCounts()
    for number in range(10_000):
        complaints.add(f"kind {number}")
    assert len(complaints.due_lines(0.0)) == 257
    assert complaints.total == 10_000
