"""The doctor's verdicts: each changes with what was seen, and what is not ok says how it is mended."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from brokers.commands.doctor import CutsUnknown, _cuts
from brokers.doctor import mqtt311 as older
from brokers.doctor import verdicts as doctor
from brokers.doctor.check_result import CheckResult, ThroughputResult, format_bytes, format_table, is_usable
from brokers.doctor.checks import TEST_PROPERTIES
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from brokers.protocol.broker_url import parse_address
from brokers.protocol.chunking import MESSAGE_LIMIT_BYTES
from brokers.protocol.transport import BrokerLimits, Properties

GOOD = BrokerLimits(MAX_REMAINING_BYTES)
NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("limits", "what", "level"),
    [
        (replace(GOOD, max_packet_bytes=doctor.MIN_PACKET_BYTES - 1), "packet size", "FAIL"),
        (replace(GOOD, max_packet_bytes=doctor.MIN_PACKET_BYTES), "packet size", "warn"),
        (replace(GOOD, max_packet_bytes=doctor.CHUNK_PACKET_BYTES - 1), "packet size", "warn"),
        (replace(GOOD, receive_maximum=doctor.MIN_RECEIVE_MAXIMUM - 1), "in flight", "warn"),
        (replace(GOOD, max_qos=0), "QoS", "FAIL"),
        (replace(GOOD, retain_available=False), "retained", "FAIL"),
        (replace(GOOD, wildcards_available=False), "wildcards", "FAIL"),
        (replace(GOOD, shared_available=False), "shared", "FAIL"),
        (replace(GOOD, keepalive_s=3), "keep-alive", "warn"),
    ],
)
def test_each_limit_has_its_verdict(limits: BrokerLimits, what: str, level: str) -> None:
    (bad,) = [finding for finding in doctor.announced_limits_results(limits) if finding.level != "ok"]
    assert (bad.check, bad.level, bool(bad.fix)) == (what, level, True)


@pytest.mark.parametrize(
    "limits",
    [GOOD, BrokerLimits(doctor.CHUNK_PACKET_BYTES, doctor.MIN_RECEIVE_MAXIMUM, 1, keepalive_s=60)],
)
def test_limits_that_are_wide_enough_are_ok(limits: BrokerLimits) -> None:
    assert {finding.level for finding in doctor.announced_limits_results(limits)} == {"ok"}


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (
            doctor.delivery_result(True, True),
            [doctor.delivery_result(False, None), doctor.delivery_result(True, False)],
        ),
        (doctor.delivery_result(True, None), []),
        (
            doctor.retained_result(True, True, True),
            [
                doctor.retained_result(False, False, True),
                doctor.retained_result(True, False, True),
                doctor.retained_result(True, True, False),
            ],
        ),
        (doctor.will_result(0.1, True), [doctor.will_result(None, False), doctor.will_result(0.1, False)]),
        (
            doctor.shared_subscription_result(10, 6, 4),
            [doctor.shared_subscription_result(10, 10, 10), doctor.shared_subscription_result(10, 5, 4)],
        ),
        (doctor.properties_result([]), [doctor.properties_result(["Response Topic"])]),
        (doctor.largest_packet_result(GOOD.max_packet_bytes, {1000: True, 2000: True}), []),
        (
            doctor.burst_result(3, [0, 1, 2], 100),
            [doctor.burst_result(3, [0, 1], 100), doctor.burst_result(3, [0, 2, 1], 100)],
        ),
        (doctor.bridge_result("a to b", 0.1, "m"), [doctor.bridge_result("a to b", None, "m")]),
        (doctor.duplicates_result("a to b", 1), [doctor.duplicates_result("a to b", 2)]),
        (doctor.bridge_presence_result("a to b", True, "b"), [doctor.bridge_presence_result("a to b", False, "b")]),
        (
            doctor.bridge_will_result("a to b", 0.1, True, "b"),
            [
                doctor.bridge_will_result("a to b", None, True, "b"),
                doctor.bridge_will_result("a to b", 0.1, False, "b"),
            ],
        ),
        (doctor.bridge_chunk_result("a to b", 10, True), [doctor.bridge_chunk_result("a to b", 10, False)]),
        (doctor.bridge_properties_result("a to b", []), [doctor.bridge_properties_result("a to b", ["Content Type"])]),
    ],
)
def test_what_was_tried_has_its_verdict(good: CheckResult, bad: list[CheckResult]) -> None:
    assert (good.level, good.fix) == ("ok", "")
    assert all(each.level == "FAIL" and each.fix for each in bad)


def test_what_only_some_need_is_a_warning() -> None:
    warnings = [
        doctor.shared_subscription_result(10, 10, 0),
        doctor.session_result(False, 10, 0, None),
        doctor.session_result(True, 10, 9, None),
        doctor.session_result(True, 10, 10, 60),
        doctor.tls_result(None, None, NOW, is_local=False),
        doctor.tls_result("TLSv1.3", NOW + timedelta(days=3), NOW, is_local=False),
    ]
    assert all(each.level == "warn" and each.fix for each in warnings)
    fine = [
        doctor.session_result(True, 10, 10, None),
        doctor.session_result(True, 10, 10, doctor.SESSION_EXPIRY_S),
        doctor.tls_result(None, None, NOW, is_local=True),
        doctor.tls_result("TLSv1.3", NOW + timedelta(days=300), NOW, is_local=False),
    ]
    assert all(each.level == "ok" for each in fine)


def test_a_packet_that_is_lost_below_what_senders_make_fails_and_above_it_warns() -> None:
    usual = doctor.CHUNK_PACKET_BYTES
    assert doctor.largest_packet_result(MAX_REMAINING_BYTES, {1000: True, usual: False}).level == "FAIL"
    assert doctor.largest_packet_result(MAX_REMAINING_BYTES, {usual: True, 2 * usual: False}).level == "warn"


@pytest.mark.parametrize(
    ("came", "lost"),
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
)
def test_each_property_that_is_lost_is_named(came: Properties, lost: list[str]) -> None:
    assert doctor.changed_properties(TEST_PROPERTIES, came) == lost


def test_a_cut_that_is_larger_than_a_message_fails() -> None:
    sizes = {"a to b": MESSAGE_LIMIT_BYTES, "b to c": MESSAGE_LIMIT_BYTES + 1}
    found = list(doctor.cut_results(sizes, MAX_REMAINING_BYTES))
    assert [finding.level for finding in found] == ["ok", "FAIL"]
    assert "b to c" in found[1].message


@pytest.mark.parametrize(("limit_bytes", "chunks"), [(MAX_REMAINING_BYTES, "in 2 chunks"), (100_000, "in 11 chunks")])
def test_a_narrow_broker_gets_a_cut_in_more_chunks(limit_bytes: int, chunks: str) -> None:
    (found,) = doctor.cut_results({"a to b": 1 << 20}, limit_bytes)
    assert chunks in found.message


def test_a_warning_is_in_nobodys_way() -> None:
    warning = CheckResult("warn", "it", "is so", "mend it")
    assert is_usable([warning, CheckResult("ok", "it", "is good")])
    assert not is_usable([warning, replace(warning, level="FAIL")])


def test_a_finding_fits_a_terminal_and_the_line_that_mends_it_comes_last() -> None:
    finding = CheckResult("FAIL", "packet size", "word " * 40, "max_packet_size 268435455")
    lines = finding.to_lines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[0].startswith("FAIL  packet size  word")
    assert lines[-1].strip() == "-> max_packet_size 268435455"
    assert CheckResult("ok", "it", "is good").to_lines() == ["ok    it           is good"]


def test_the_table_fits_a_terminal() -> None:
    lines = format_table([ThroughputResult("a-long-name-of-a-stage to another", 16 << 20, 12345.6, 12345.6, 0.1)])
    assert all(len(line) <= 100 for line in lines)
    assert lines[1].split()[-1] == "0.1"  # the slower way


@pytest.mark.parametrize(
    ("count", "text"), [(1 << 20, "1 MiB"), (3 << 10, "3 KiB"), (100_000, "100,000 bytes"), (0, "0 bytes")]
)
def test_bytes_are_told_exactly(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_a_connect_of_311_is_what_its_specification_says() -> None:
    assert older.encode_connect("ab", None, None) == b"\x10\x0e\x00\x04MQTT\x04\x02\x00\x0a\x00\x02ab"
    assert older.encode_connect("a", "u", "p") == b"\x10\x13\x00\x04MQTT\x04\xc2\x00\x0a\x00\x01a\x00\x01u\x00\x01p"
    assert older.encode_connect("a", "u", None)[9] == 0x82


@pytest.mark.parametrize(
    ("data", "code"), [(b"\x20\x02\x00\x00", 0), (b"\x20\x02\x01\x05", 5), (b"\x20\x03\x00\x00", None), (b"HTTP", None)]
)
def test_only_a_connack_of_311_is_an_answer(data: bytes, code: int | None) -> None:
    answer = older.decode_connack(data)
    assert (None if answer is None else answer.code) == code


def test_the_password_of_an_address_is_in_no_line() -> None:
    address = parse_address("mqtt://ann:secret@host")
    assert "secret" not in "".join(doctor.unreachable_result(str(address), "refused", tls_failed=False).to_lines())


def test_cuts_that_take_too_long_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brokers.commands.doctor._CUTS_S", 0.001)
    with pytest.raises(CutsUnknown, match=r"street.toml: its cuts were not computed within 0.001 s"):
        _cuts("street.toml")
