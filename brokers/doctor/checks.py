"""What is tried at one broker, not only read in what it announces: each probe does one thing and says what it saw.

Every probe has clients of its own, so that one that the broker throws out spoils no other, and a time limit.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from functools import partial

from brokers.dispatch.channel import HEADER_RESERVE_BYTES
from brokers.doctor import mqtt311 as older
from brokers.doctor import verdicts as doctor
from brokers.doctor.check_result import CheckResult, fail, ok
from brokers.doctor.probe_client import CLEANUP_EXPIRY_S, BrokerProbe, ProbeClient
from brokers.errors import BrokerUnreachable, SparseError
from brokers.mqtt.connect_errors import (
    BAD_PASSWORD,
    NOT_AUTHORIZED,
    UNSUPPORTED_VERSION,
    AuthenticationFailed,
    ConnackRefused,
    OperationRefused,
    connect_error,
)
from brokers.mqtt.publish_packet import encode_publish_header
from brokers.mqtt.socket_loop import ConnectionLost
from brokers.protocol.transport import BrokerLimits, Properties, Will

CHECK_TIMEOUT_S = 20.0
SHARED_MESSAGES = 10
SESSION_MESSAGES = 100
BURST_CHUNKS = 128  # as many as a message of 64 MiB has, though smaller
_BURST_CHUNK_BYTES = 128 << 10
_LOOKS_AWAY_S = 0.3
_NOTHING_S = 0.5  # for what should not come
_PACKETS_BYTES = (64 << 10, doctor.CHUNK_PACKET_BYTES, 2_000_000, 8 << 20)
TEST_PROPERTIES = Properties(
    content_type="application/x-sparse-doctor",
    correlation_data=bytes(range(16)),
    response_topic="sparse/doctor/reply",
    expiry_s=300,
    user_properties=(("kind", "probe"), ("kind", "twice"), ("text", "grüße")),
)

BrokerCheck = Callable[[BrokerProbe], Awaitable[list[CheckResult]]]


async def check_connection(visit: BrokerProbe) -> tuple[list[CheckResult], BrokerLimits | None]:
    """Connect once: whether the broker is there, what it speaks, what it announces; None when the rest is in vain."""
    began_s = time.monotonic()
    try:
        async with visit.client() as visitor:
            took_ms = 1000 * (time.monotonic() - began_s)
            version, ends = visitor.tls_info or (None, None)
            limits = visitor.limits
    except (BrokerUnreachable, ConnectionLost, OSError) as error:
        return [await _why_not(visit, error)], None
    visit.qos = min(1, limits.max_qos)
    local = visit.address.is_unix_socket or visit.address.host in ("localhost", "127.0.0.1", "::1")
    return [
        ok("MQTT 5", f"{visit.address} lets us in after {took_ms:.0f} ms"),
        doctor.tls_result(version, ends, datetime.now(UTC), local),
        *doctor.announced_limits_results(limits),
    ], limits


async def check_broker(visit: BrokerProbe, limits: BrokerLimits) -> AsyncIterator[CheckResult]:
    """Yield what is found by trying, for as much as the broker says it can do."""
    probes: list[tuple[str, BrokerCheck, bool]] = [
        ("publish", check_delivery, True),
        ("properties", check_properties, True),
        ("retained", check_retained, limits.retain_available),
        ("last will", check_will, limits.retain_available and limits.max_qos > 0),
        ("shared", check_shared_subscription, limits.shared_available),
        ("largest", check_packet_sizes, True),
        ("burst", check_burst, True),
        ("session", check_session, limits.max_qos > 0),
    ]
    for what, probe, sensible in probes:
        if sensible:
            for finding in await run_check(what, partial(probe, visit)):
                yield finding


async def run_check(
    name: str, check: Callable[[], Awaitable[list[CheckResult]]], timeout_s: float = CHECK_TIMEOUT_S
) -> list[CheckResult]:
    """Return what a probe found; a broker that throws it out, refuses or never answers is a finding, too."""
    try:
        async with asyncio.timeout(timeout_s):
            return await check()
    except TimeoutError:
        return [fail(name, f"no end within {timeout_s:g} s", doctor.FIX_SEE_LOG)]
    except BrokerUnreachable as error:
        return [fail(name, f"no further connection: {error.reason}", "Mosquitto: max_connections -1; see what it logs")]
    except (SparseError, ConnectionLost, OSError) as error:
        return [
            fail(name, str(error), doctor.FIX_ACCESS if isinstance(error, OperationRefused) else doctor.FIX_SEE_LOG)
        ]


# One broker -------------------------------------------------------------------------------------------------------


async def check_delivery(visit: BrokerProbe) -> list[CheckResult]:
    """Publish to a subscriber at QoS 0 and 1."""
    topic = visit.topic("deliver")
    async with visit.client() as sender, visit.client() as reader:
        await reader.subscribe(topic, visit.qos)
        await sender.publish(topic, b"0")
        qos0 = await reader.receive() is not None
        if visit.qos == 0 or not qos0:
            return [doctor.delivery_result(qos0, None)]
        await sender.publish(topic, b"1", qos=1)
        heard = await reader.receive()
        return [doctor.delivery_result(qos0, heard is not None and heard.qos == 1)]


async def check_properties(visit: BrokerProbe) -> list[CheckResult]:
    """Publish with all properties that Sparse uses."""
    topic = visit.topic("properties")
    async with visit.client() as sender, visit.client() as reader:
        await reader.subscribe(topic)
        await sender.publish(topic, b"x", TEST_PROPERTIES)
        heard = await reader.receive()
        if heard is None:
            return [fail("properties", "a message with properties does not arrive", doctor.FIX_PROPERTIES)]
        return [doctor.properties_result(doctor.changed_properties(TEST_PROPERTIES, heard.properties))]


async def check_retained(visit: BrokerProbe) -> list[CheckResult]:
    """Leave a record for a late subscriber, and take it away again."""
    topic = visit.topic("retained")
    async with visit.client() as sender:
        await visit.publish_retained(sender, topic, b"record")
        async with visit.client() as late:
            await late.subscribe(topic, visit.qos)
            heard = await late.receive()
        await sender.publish(topic, qos=visit.qos, retain=True)
        gone = await is_topic_cleared(visit, topic)
        return [doctor.retained_result(heard is not None, heard is not None and heard.retain, gone)]


async def is_topic_cleared(visit: BrokerProbe, topic: str) -> bool:
    """Whether one who subscribes now gets nothing."""
    async with visit.client() as later:
        await later.subscribe(topic, visit.qos)
        return await later.receive(_NOTHING_S) is None


async def check_will(visit: BrokerProbe) -> list[CheckResult]:
    """Break the connection of a client that has left a record and the will to clear it."""
    topic = visit.topic("will")
    async with visit.client() as reader:
        await reader.subscribe(topic, 1)
        async with visit.client(will=Will(topic)) as doomed:
            await visit.publish_retained(doomed, topic, b"record")
            await reader.receive()
            await doomed.abort()
        began_s = time.monotonic()
        heard = await reader.receive()
        if heard is None or heard.payload:
            return [doctor.will_result(None, False)]
        after_s = time.monotonic() - began_s
        return [doctor.will_result(after_s, await is_topic_cleared(visit, topic))]


async def check_shared_subscription(visit: BrokerProbe) -> list[CheckResult]:
    """Publish to a group of two."""
    topic = visit.topic("tasks")
    group = f"$share/{visit.name}/{topic}"
    async with visit.client() as sender, visit.client() as one, visit.client() as other:
        for each in (one, other):
            await each.subscribe(group, visit.qos)
        for number in range(SHARED_MESSAGES):
            await sender.publish(topic, bytes((number,)), qos=visit.qos)
        first, second = await asyncio.gather(*(_count(each) for each in (one, other)))
        return [doctor.shared_subscription_result(SHARED_MESSAGES, first, second)]


async def _count(visitor: ProbeClient) -> int:
    """How many come before a pause, which must be long enough for a broker that is busy."""
    return len(await visitor.receive_all(2 * SHARED_MESSAGES, 2 * _NOTHING_S))


async def check_packet_sizes(visit: BrokerProbe) -> list[CheckResult]:
    """Publish whole packets of sizes that matter, up to what is announced."""
    tried_bytes: dict[int, bool] = {}
    announced = 0
    for size in _PACKETS_BYTES:
        async with visit.client() as sender, visit.client() as reader:
            announced = sender.limits.max_packet_bytes
            wanted = min(size, announced)
            if wanted not in tried_bytes:
                tried_bytes[wanted] = await _passes(visit, sender, reader, wanted)
            if not tried_bytes[wanted]:
                break
    return [doctor.largest_packet_result(announced, tried_bytes)]


async def _passes(visit: BrokerProbe, sender: ProbeClient, reader: ProbeClient, packet_bytes: int) -> bool:
    """Whether a packet of exactly that many bytes comes through."""
    topic = visit.topic("largest")
    await reader.subscribe(topic)
    payload_bytes = packet_bytes - len(encode_publish_header(topic, Properties(), packet_bytes // 2))
    while len(encode_publish_header(topic, Properties(), payload_bytes)) + payload_bytes > packet_bytes:
        payload_bytes -= 1
    try:
        await sender.publish(topic, bytes(payload_bytes))
        heard = await reader.receive()
    except ConnectionLost:  # the answer of many brokers to a packet that is too large
        return False
    return heard is not None and len(heard.payload) == payload_bytes


async def check_burst(visit: BrokerProbe) -> list[CheckResult]:
    """Publish the chunks of a message to a reader that looks away while they come."""
    topic = visit.topic("burst")
    async with visit.client() as sender, visit.client() as reader:
        chunk_bytes = min(_BURST_CHUNK_BYTES, sender.limits.max_packet_bytes - HEADER_RESERVE_BYTES)
        await reader.subscribe(topic)
        reader.set_reading_paused(True)
        rest = bytes(max(0, chunk_bytes - 2))
        for number in range(BURST_CHUNKS):
            await sender.publish(topic, number.to_bytes(2, "big") + rest)
        await asyncio.sleep(_LOOKS_AWAY_S)
        reader.set_reading_paused(False)
        came = [int.from_bytes(heard.payload[:2], "big") for heard in await reader.receive_all(BURST_CHUNKS)]
        return [doctor.burst_result(BURST_CHUNKS, came, len(rest) + 2)]


async def check_session(visit: BrokerProbe) -> list[CheckResult]:
    """Publish to a client that is away."""
    topic, name = visit.topic("session"), f"{visit.name}-session"
    async with visit.client(session=name, session_expiry_s=doctor.SESSION_EXPIRY_S) as asking:
        lasts_s = asking.limits.session_expiry_s
    async with visit.client(session=name) as leaving:
        await leaving.subscribe(topic, 1)
    async with visit.client() as sender:
        for _ in range(SESSION_MESSAGES):
            await sender.publish(topic, b"kept", qos=1)
    async with visit.client(session=name, session_expiry_s=CLEANUP_EXPIRY_S) as back:
        came = await back.receive_all(SESSION_MESSAGES) if back.session_present else []
        return [doctor.session_result(back.session_present, SESSION_MESSAGES, len(came), lasts_s)]


# When nobody lets us in -------------------------------------------------------------------------------------------


async def _why_not(visit: BrokerProbe, error: Exception) -> CheckResult:
    """What stands in the way of an MQTT 5 client: a lock, an older version, or that nobody is there."""
    address, code = (
        visit.address,
        error.reason_code if isinstance(error, AuthenticationFailed | ConnackRefused) else None,
    )
    if code in (BAD_PASSWORD, NOT_AUTHORIZED):
        user = f"user {address.user!r}" if address.user else "a client that names no user"
        return fail("password", f"{address} does not let {user} in", doctor.FIX_PASSWORD)
    answered = code == UNSUPPORTED_VERSION or isinstance(error, BrokerUnreachable | ConnectionLost)
    if answered and (old := await older.probe_mqtt311(address, visit.tls, visit.name)) is not None and old.is_mqtt311:
        locked = "; and wants a user and password" if old.code in older.NOT_AUTHORIZED else ""
        return fail("MQTT 5", f"{address} speaks only MQTT 3.1.1, Sparse needs MQTT 5{locked}", doctor.FIX_MQTT5)
    told = error if isinstance(error, BrokerUnreachable) else connect_error(address, error)
    return doctor.unreachable_result(str(address), told.reason, isinstance(error, ssl.SSLError))
