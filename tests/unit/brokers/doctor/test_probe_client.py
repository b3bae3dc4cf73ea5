"""Results of checks, and how they are printed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from brokers.doctor.probe_client import CheckResult, format_bytes, is_usable


def test_only_failures_make_a_broker_unusable() -> None:
    warning = CheckResult("warn", "check", "message", "fix")
    assert is_usable([warning, CheckResult("ok", "check", "message")])
    assert not is_usable([warning, replace(warning, level="FAIL")])


def test_lines_fit_a_terminal_and_end_with_the_fix() -> None:
    result = CheckResult("FAIL", "packet size", "word " * 40, "max_packet_size 268435455")
    lines = result.to_lines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("FAIL  packet size  word")
    assert lines[-1].strip() == "-> max_packet_size 268435455"
    assert CheckResult("ok", "check", "is good").to_lines() == ["ok    check        is good"]


@pytest.mark.parametrize(
    ("count", "text"), [(1 << 20, "1 MiB"), (3 << 10, "3 KiB"), (100_000, "100,000 bytes"), (0, "0 bytes")]
)
def test_sizes_are_exact(count: int, text: str) -> None:
    assert format_bytes(count) == text
