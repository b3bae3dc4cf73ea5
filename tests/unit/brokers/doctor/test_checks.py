"""Verdicts of the checks: scripted clients, for observations that no real broker can be configured to make."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, cast

import pytest

from brokers.doctor import checks
from brokers.doctor.bridge_checks import BridgeDirection
from brokers.doctor.checks import TEST_PROPERTIES
from brokers.doctor.probe_client import BrokerProbe, CheckResult, ReceivedPublish
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES, PublishHeader
from brokers.mqtt.socket_loop import ConnectionLost
from brokers.protocol.transport import BrokerLimits, Properties

ALL = "all"  # one message for each publication so far


class ScriptedProbe:
    """Probe and client in one: each call of `receive` or `receive_all` returns the next entry of the script."""

    name = "doctor-1"
    site = "near"

    def __init__(self, *script: Any, qos: int = 1, session_present: bool = True, expiry_s: int | None = None) -> None:
        self.qos = qos
        self.limits = BrokerLimits(MAX_REMAINING_BYTES, session_expiry_s=expiry_s)
        self.session_present = session_present
        self._script = list(script)
        self._published: list[bytes] = []

    def topic(self, name: str) -> str:
        return name

    @asynccontextmanager
    async def client(self, **_: object) -> AsyncIterator[ScriptedProbe]:
        yield self

    async def subscribe(self, topic_filter: str, qos: int = 0) -> None: ...

    async def publish(self, topic: str, payload: bytes = b"", *_: object, **__: object) -> None:
        self._published.append(payload)

    async def publish_record(self, client: ScriptedProbe, topic: str) -> None: ...

    def clear_on_exit(self, topic: str) -> None: ...

    def set_reading_paused(self, paused: bool) -> None: ...

    def abort(self, reason: str) -> None: ...

    async def receive(self, timeout_s: float = 0) -> ReceivedPublish | None:
        entry = self._script.pop(0)
        if isinstance(entry, Exception):
            raise entry
        if entry == ALL:
            return message(self._published[-1])
        return cast(ReceivedPublish | None, entry)

    async def receive_all(self, count: int, timeout_s: float = 0) -> list[ReceivedPublish]:
        entry = self._script.pop(0)
        if entry == ALL:
            return [message(payload) for payload in self._published]
        if callable(entry):
            return [message(payload) for payload in entry(self._published)]
        return [message(bytes((number,))) for number in range(entry)]


def message(
    payload: bytes = b"x", *, qos: int = 0, retain: bool = False, properties: Properties = TEST_PROPERTIES
) -> ReceivedPublish:
    return ReceivedPublish(PublishHeader("t", properties, 0, len(payload), qos, retain), memoryview(payload))


RECORD = message(b"record", retain=True)
CLEARED = message(b"")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_READING_PAUSE_S", 0)


def results_of(check: Callable[[], Awaitable[CheckResult | list[CheckResult]]]) -> list[CheckResult]:
    return asyncio.run(checks.run_check("check", check))


@pytest.mark.parametrize(
    ("check", "probe", "level"),
    [
        (checks.check_delivery, ScriptedProbe(message(), message(qos=1)), "ok"),
        (checks.check_delivery, ScriptedProbe(message(), qos=0), "ok"),
        (checks.check_delivery, ScriptedProbe(None), "FAIL"),
        (checks.check_delivery, ScriptedProbe(message(), message(qos=0)), "FAIL"),
        (checks.check_delivery, ScriptedProbe(message(), None), "FAIL"),
        (checks.check_delivery, ScriptedProbe(ConnectionLost("ended")), "FAIL"),
        (checks.check_properties, ScriptedProbe(message()), "ok"),
        (checks.check_properties, ScriptedProbe(None), "FAIL"),
        (checks.check_retained, ScriptedProbe(RECORD, None), "ok"),
        (checks.check_retained, ScriptedProbe(None, None), "FAIL"),
        (checks.check_retained, ScriptedProbe(message(b"record"), None), "FAIL"),
        (checks.check_retained, ScriptedProbe(RECORD, RECORD), "FAIL"),
        (checks.check_will, ScriptedProbe(RECORD, CLEARED, None), "ok"),
        (checks.check_will, ScriptedProbe(RECORD, None), "FAIL"),
        (checks.check_will, ScriptedProbe(RECORD, CLEARED, RECORD), "FAIL"),
        (checks.check_shared_subscription, ScriptedProbe(6, 4), "ok"),
        (checks.check_shared_subscription, ScriptedProbe(10, 0), "warn"),
        (checks.check_shared_subscription, ScriptedProbe(10, 10), "FAIL"),
        (checks.check_shared_subscription, ScriptedProbe(5, 4), "FAIL"),
        (checks.check_packet_sizes, ScriptedProbe(ALL, ALL, ALL, ALL), "ok"),
        (checks.check_packet_sizes, ScriptedProbe(ALL, ALL, ALL, None), "warn"),
        (checks.check_packet_sizes, ScriptedProbe(ALL, ConnectionLost("too large")), "FAIL"),
        (checks.check_burst, ScriptedProbe(ALL), "ok"),
        (checks.check_burst, ScriptedProbe(lambda sent: sent[1:]), "FAIL"),
        (checks.check_burst, ScriptedProbe(lambda sent: sent[::-1]), "FAIL"),
        (checks.check_session, ScriptedProbe(checks.SESSION_MESSAGES), "ok"),
        (checks.check_session, ScriptedProbe(checks.SESSION_MESSAGES, expiry_s=checks.SESSION_EXPIRY_S), "ok"),
        (checks.check_session, ScriptedProbe(checks.SESSION_MESSAGES, expiry_s=60), "warn"),
        (checks.check_session, ScriptedProbe(checks.SESSION_MESSAGES - 1), "warn"),
        (checks.check_session, ScriptedProbe(session_present=False), "warn"),
    ],
)
def test_observation_has_a_level_and_a_fix_unless_ok(
    check: Callable[[BrokerProbe], Awaitable[CheckResult]], probe: ScriptedProbe, level: str
) -> None:
    (result,) = results_of(lambda: check(cast(BrokerProbe, probe)))
    assert (result.level, bool(result.fix)) == (level, level != "ok")
    assert probe._script == []


@pytest.mark.parametrize(
    ("near", "far", "levels"),
    [
        (ScriptedProbe(), ScriptedProbe(RECORD, RECORD, CLEARED, None), ["ok", "ok"]),
        (ScriptedProbe(), ScriptedProbe(message(), RECORD, RECORD, CLEARED, None), ["ok", "ok"]),
        (ScriptedProbe(), ScriptedProbe(RECORD, RECORD, None), ["ok", "FAIL"]),
        (ScriptedProbe(), ScriptedProbe(RECORD, RECORD, CLEARED, RECORD), ["ok", "FAIL"]),
    ],
)
def test_record_across_a_bridge_must_be_cleared(near: ScriptedProbe, far: ScriptedProbe, levels: list[str]) -> None:
    direction = BridgeDirection(cast(BrokerProbe, near), cast(BrokerProbe, far), "stage")
    results = results_of(direction.check_presence)
    assert [result.level for result in results] == levels
    assert [bool(result.fix) for result in results] == [level != "ok" for level in levels]


@pytest.mark.parametrize(
    ("received", "changed"),
    [
        (TEST_PROPERTIES, ""),
        (replace(TEST_PROPERTIES, expiry_s=299), ""),
        (replace(TEST_PROPERTIES, expiry_s=301), "Message Expiry"),
        (replace(TEST_PROPERTIES, expiry_s=None), "Message Expiry"),
        (replace(TEST_PROPERTIES, response_topic=""), "Response Topic"),
        (replace(TEST_PROPERTIES, correlation_data=b""), "Correlation Data"),
        (replace(TEST_PROPERTIES, content_type=""), "Content Type"),
        (replace(TEST_PROPERTIES, user_properties=TEST_PROPERTIES.user_properties[::-1]), "user properties"),
        (Properties(), "Content Type, Correlation Data, Response Topic, user properties, Message Expiry"),
    ],
    ids=lambda value: value or "none" if isinstance(value, str) else "",
)
def test_changed_properties_are_named(received: Properties, changed: str) -> None:
    result = checks.properties_result(message(properties=received), "a to b: ")
    assert result.message == (f"a to b: lost or changed: {changed}" if changed else "a to b: all arrive unchanged")
    assert result.level == ("FAIL" if changed else "ok")
