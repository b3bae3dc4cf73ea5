"""Verdicts on what a broker announces: the level of each limit, and a fix for each that is not sufficient."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from brokers.doctor.connection_checks import (
    MIN_PACKET_BYTES,
    MIN_RECEIVE_MAXIMUM,
    announced_limits_results,
    cut_results,
    tls_result,
)
from brokers.doctor.probe_client import CHUNK_PACKET_BYTES
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from brokers.protocol.chunking import MESSAGE_LIMIT_BYTES
from brokers.protocol.transport import BrokerLimits

UNLIMITED = BrokerLimits(MAX_REMAINING_BYTES)
NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("limits", "check", "level"),
    [
        (replace(UNLIMITED, max_packet_bytes=MIN_PACKET_BYTES - 1), "packet size", "FAIL"),
        (replace(UNLIMITED, max_packet_bytes=MIN_PACKET_BYTES), "packet size", "warn"),
        (replace(UNLIMITED, max_packet_bytes=CHUNK_PACKET_BYTES - 1), "packet size", "warn"),
        (replace(UNLIMITED, receive_maximum=MIN_RECEIVE_MAXIMUM - 1), "in flight", "warn"),
        (replace(UNLIMITED, max_qos=0), "QoS", "FAIL"),
        (replace(UNLIMITED, retain_available=False), "retained", "FAIL"),
        (replace(UNLIMITED, wildcards_available=False), "wildcards", "FAIL"),
        (replace(UNLIMITED, shared_available=False), "shared", "FAIL"),
        (replace(UNLIMITED, keepalive_s=3), "keep-alive", "warn"),
    ],
    ids=str,
)
def test_insufficient_limit_has_a_level_and_a_fix(limits: BrokerLimits, check: str, level: str) -> None:
    (bad,) = [result for result in announced_limits_results(limits) if result.level != "ok"]
    assert (bad.check, bad.level, bool(bad.fix)) == (check, level, True)


@pytest.mark.parametrize(
    "limits",
    [UNLIMITED, BrokerLimits(CHUNK_PACKET_BYTES, MIN_RECEIVE_MAXIMUM, 1, keepalive_s=60)],
    ids=["none announced", "just sufficient"],
)
def test_sufficient_limits_are_ok(limits: BrokerLimits) -> None:
    assert {result.level for result in announced_limits_results(limits)} == {"ok"}


@pytest.mark.parametrize(
    ("tls_info", "is_local", "level"),
    [
        (None, True, "ok"),
        (None, False, "warn"),
        (("TLSv1.3", None), False, "ok"),
        (("TLSv1.3", NOW + timedelta(days=300)), False, "ok"),
        (("TLSv1.3", NOW + timedelta(days=3)), False, "warn"),
    ],
)
def test_tls_is_judged_by_place_and_certificate(
    tls_info: tuple[str, datetime | None] | None, is_local: bool, level: str
) -> None:
    result = tls_result(tls_info, NOW, is_local)
    assert (result.level, bool(result.fix)) == (level, level != "ok")


def test_cut_larger_than_a_message_fails() -> None:
    sizes = {"a to b": MESSAGE_LIMIT_BYTES, "b to c": MESSAGE_LIMIT_BYTES + 1}
    results = list(cut_results(sizes, MAX_REMAINING_BYTES))
    assert [result.level for result in results] == ["ok", "FAIL"]
    assert "b to c" in results[1].message


@pytest.mark.parametrize(("limit_bytes", "chunks"), [(MAX_REMAINING_BYTES, "in 2 chunks"), (100_000, "in 11 chunks")])
def test_packet_limit_determines_the_chunks_of_a_cut(limit_bytes: int, chunks: str) -> None:
    (result,) = cut_results({"a to b": 1 << 20}, limit_bytes)
    assert chunks in result.message
