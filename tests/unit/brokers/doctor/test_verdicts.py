"""Verdicts of the doctor: the level of each observation, and a fix for each that is not ok."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from brokers.doctor import verdicts
from brokers.doctor.check_result import CheckResult
from brokers.doctor.checks import TEST_PROPERTIES
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from brokers.protocol.broker_url import parse_address
from brokers.protocol.chunking import MESSAGE_LIMIT_BYTES
from brokers.protocol.transport import BrokerLimits, Properties

UNLIMITED = BrokerLimits(MAX_REMAINING_BYTES)
NOW = datetime(2030, 1, 1, tzinfo=UTC)


# Announced limits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "check", "level"),
    [
        (replace(UNLIMITED, max_packet_bytes=verdicts.MIN_PACKET_BYTES - 1), "packet size", "FAIL"),
        (replace(UNLIMITED, max_packet_bytes=verdicts.MIN_PACKET_BYTES), "packet size", "warn"),
        (replace(UNLIMITED, max_packet_bytes=verdicts.CHUNK_PACKET_BYTES - 1), "packet size", "warn"),
        (replace(UNLIMITED, receive_maximum=verdicts.MIN_RECEIVE_MAXIMUM - 1), "in flight", "warn"),
        (replace(UNLIMITED, max_qos=0), "QoS", "FAIL"),
        (replace(UNLIMITED, retain_available=False), "retained", "FAIL"),
        (replace(UNLIMITED, wildcards_available=False), "wildcards", "FAIL"),
        (replace(UNLIMITED, shared_available=False), "shared", "FAIL"),
        (replace(UNLIMITED, keepalive_s=3), "keep-alive", "warn"),
    ],
    ids=str,
)
def test_insufficient_limit_has_a_level_and_a_fix(limits: BrokerLimits, check: str, level: str) -> None:
    (bad,) = [result for result in verdicts.announced_limits_results(limits) if result.level != "ok"]
    assert (bad.check, bad.level, bool(bad.fix)) == (check, level, True)


@pytest.mark.parametrize(
    "limits",
    [UNLIMITED, BrokerLimits(verdicts.CHUNK_PACKET_BYTES, verdicts.MIN_RECEIVE_MAXIMUM, 1, keepalive_s=60)],
    ids=["none announced", "just sufficient"],
)
def test_sufficient_limits_are_ok(limits: BrokerLimits) -> None:
    assert {result.level for result in verdicts.announced_limits_results(limits)} == {"ok"}


# Tried features -----------------------------------------------------------------------------------------------------

OK = [
    verdicts.delivery_result(True, True),
    verdicts.delivery_result(True, None),
    verdicts.retained_result(True, True, True),
    verdicts.will_result(0.1, True),
    verdicts.shared_subscription_result(10, 6, 4),
    verdicts.properties_result([]),
    verdicts.largest_packet_result(UNLIMITED.max_packet_bytes, {1000: True, 2000: True}),
    verdicts.burst_result(3, [0, 1, 2], 100),
    verdicts.session_result(True, 10, 10, None),
    verdicts.session_result(True, 10, 10, verdicts.SESSION_EXPIRY_S),
    verdicts.tls_result(None, None, NOW, is_local=True),
    verdicts.tls_result("TLSv1.3", None, NOW, is_local=False),
    verdicts.tls_result("TLSv1.3", NOW + timedelta(days=300), NOW, is_local=False),
    verdicts.bridge_result("a to b", 0.1, "fix"),
    verdicts.duplicates_result("a to b", 1),
    verdicts.bridge_presence_result("a to b", True, "b"),
    verdicts.bridge_will_result("a to b", 0.1, True, "b"),
    verdicts.bridge_chunk_result("a to b", 10, True),
    verdicts.bridge_properties_result("a to b", []),
]
WARN = [
    verdicts.shared_subscription_result(10, 10, 0),
    verdicts.session_result(False, 10, 0, None),
    verdicts.session_result(True, 10, 9, None),
    verdicts.session_result(True, 10, 10, 60),
    verdicts.tls_result(None, None, NOW, is_local=False),
    verdicts.tls_result("TLSv1.3", NOW + timedelta(days=3), NOW, is_local=False),
    verdicts.largest_packet_result(MAX_REMAINING_BYTES, {verdicts.CHUNK_PACKET_BYTES: True, 8 << 20: False}),
]
FAIL = [
    verdicts.delivery_result(False, None),
    verdicts.delivery_result(True, False),
    verdicts.retained_result(False, False, True),
    verdicts.retained_result(True, False, True),
    verdicts.retained_result(True, True, False),
    verdicts.will_result(None, False),
    verdicts.will_result(0.1, False),
    verdicts.shared_subscription_result(10, 10, 10),
    verdicts.shared_subscription_result(10, 5, 4),
    verdicts.properties_result(["Response Topic"]),
    verdicts.largest_packet_result(MAX_REMAINING_BYTES, {1000: True, verdicts.CHUNK_PACKET_BYTES: False}),
    verdicts.burst_result(3, [0, 1], 100),
    verdicts.burst_result(3, [0, 2, 1], 100),
    verdicts.bridge_result("a to b", None, "fix"),
    verdicts.duplicates_result("a to b", 2),
    verdicts.bridge_presence_result("a to b", False, "b"),
    verdicts.bridge_will_result("a to b", None, True, "b"),
    verdicts.bridge_will_result("a to b", 0.1, False, "b"),
    verdicts.bridge_chunk_result("a to b", 10, False),
    verdicts.bridge_properties_result("a to b", ["Content Type"]),
    verdicts.unreachable_result("mqtt://host", "refused", tls_failed=False),
    verdicts.unreachable_result("mqtts://host", "not trusted", tls_failed=True),
]


@pytest.mark.parametrize(
    ("level", "result"),
    [(level, result) for level, results in (("ok", OK), ("warn", WARN), ("FAIL", FAIL)) for result in results],
    ids=lambda value: value if isinstance(value, str) else value.check,
)
def test_observation_has_a_level_and_a_fix_unless_ok(level: str, result: CheckResult) -> None:
    assert (result.level, bool(result.fix)) == (level, level != "ok")


@pytest.mark.parametrize(
    ("received", "changed"),
    [
        (TEST_PROPERTIES, []),
        (replace(TEST_PROPERTIES, expiry_s=299), []),
        (replace(TEST_PROPERTIES, expiry_s=301), ["Message Expiry"]),
        (replace(TEST_PROPERTIES, expiry_s=None), ["Message Expiry"]),
        (replace(TEST_PROPERTIES, response_topic=""), ["Response Topic"]),
        (replace(TEST_PROPERTIES, correlation_data=b""), ["Correlation Data"]),
        (replace(TEST_PROPERTIES, content_type=""), ["Content Type"]),
        (replace(TEST_PROPERTIES, user_properties=TEST_PROPERTIES.user_properties[::-1]), ["user properties"]),
        (Properties(), ["Content Type", "Correlation Data", "Response Topic", "user properties", "Message Expiry"]),
    ],
    ids=lambda value: ", ".join(value) or "none" if isinstance(value, list) else "",
)
def test_changed_properties_are_named(received: Properties, changed: list[str]) -> None:
    assert verdicts.changed_properties(TEST_PROPERTIES, received) == changed


# Cuts ---------------------------------------------------------------------------------------------------------------


def test_cut_larger_than_a_message_fails() -> None:
    sizes = {"a to b": MESSAGE_LIMIT_BYTES, "b to c": MESSAGE_LIMIT_BYTES + 1}
    results = list(verdicts.cut_results(sizes, MAX_REMAINING_BYTES))
    assert [result.level for result in results] == ["ok", "FAIL"]
    assert "b to c" in results[1].message


@pytest.mark.parametrize(("limit_bytes", "chunks"), [(MAX_REMAINING_BYTES, "in 2 chunks"), (100_000, "in 11 chunks")])
def test_packet_limit_determines_the_chunks_of_a_cut(limit_bytes: int, chunks: str) -> None:
    (result,) = verdicts.cut_results({"a to b": 1 << 20}, limit_bytes)
    assert chunks in result.message


def test_password_of_an_address_is_not_printed() -> None:
    address = parse_address("mqtt://ann:secret@host")
    assert "secret" not in "".join(verdicts.unreachable_result(str(address), "refused", tls_failed=False).to_lines())
