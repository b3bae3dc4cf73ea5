"""The checks at one broker: each tries one feature, even if the broker announces it, and returns the verdict.

Every check has clients of its own, so that a disconnected one affects no other check, and a time limit.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from functools import partial

from brokers.dispatch.channel import HEADER_RESERVE_BYTES
from brokers.doctor import mqtt311, verdicts
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
BURST_CHUNKS = 128  # as many as a message of 64 MiB has, but smaller ones
_BURST_CHUNK_BYTES = 128 << 10
_READING_PAUSE_S = 0.3
_SILENCE_S = 0.5  # without a message: none will arrive
_PACKETS_BYTES = (64 << 10, verdicts.CHUNK_PACKET_BYTES, 2_000_000, 8 << 20)
TEST_PROPERTIES = Properties(
    content_type="application/x-sparse-doctor",
    correlation_data=bytes(range(16)),
    response_topic="sparse/doctor/reply",
    expiry_s=300,
    user_properties=(("kind", "probe"), ("kind", "twice"), ("text", "grüße")),
)

BrokerCheck = Callable[[BrokerProbe], Awaitable[list[CheckResult]]]


async def check_connection(probe: BrokerProbe) -> tuple[list[CheckResult], BrokerLimits | None]:
    """Connect, and judge what the broker announces; the limits are None if it accepts no connection."""
    begin_s = time.monotonic()
    try:
        async with probe.client() as client:
            duration_ms = 1000 * (time.monotonic() - begin_s)
            tls_version, expires = client.tls_info or (None, None)
            limits = client.limits
    except (BrokerUnreachable, ConnectionLost, OSError) as error:
        return [await _explain_refusal(probe, error)], None
    probe.qos = min(1, limits.max_qos)
    is_local = probe.address.is_unix_socket or probe.address.host in ("localhost", "127.0.0.1", "::1")
    return [
        ok("MQTT 5", f"{probe.address} accepts a connection after {duration_ms:.0f} ms"),
        verdicts.tls_result(tls_version, expires, datetime.now(UTC), is_local),
        *verdicts.announced_limits_results(limits),
    ], limits


async def check_broker(probe: BrokerProbe, limits: BrokerLimits) -> AsyncIterator[CheckResult]:
    """Yield the results of all checks, except of features that the broker says it lacks."""
    checks: list[tuple[str, BrokerCheck, bool]] = [
        ("publish", check_delivery, True),
        ("properties", check_properties, True),
        ("retained", check_retained, limits.retain_available),
        ("last will", check_will, limits.retain_available and limits.max_qos > 0),
        ("shared", check_shared_subscription, limits.shared_available),
        ("large packet", check_packet_sizes, True),
        ("burst", check_burst, True),
        ("session", check_session, limits.max_qos > 0),
    ]
    for name, check, is_available in checks:
        if is_available:
            for result in await run_check(name, partial(check, probe)):
                yield result


async def run_check(
    name: str, check: Callable[[], Awaitable[list[CheckResult]]], timeout_s: float = CHECK_TIMEOUT_S
) -> list[CheckResult]:
    """Run a check; a broker that disconnects it, refuses an operation or never answers fails the check."""
    try:
        async with asyncio.timeout(timeout_s):
            return await check()
    except TimeoutError:
        return [fail(name, f"not finished within {timeout_s:g} s", verdicts.FIX_SEE_LOG)]
    except BrokerUnreachable as error:
        fix = "Mosquitto: max_connections -1; see also the broker's log"
        return [fail(name, f"no further connection: {error.reason}", fix)]
    except (SparseError, ConnectionLost, OSError) as error:
        fix = verdicts.FIX_ACCESS if isinstance(error, OperationRefused) else verdicts.FIX_SEE_LOG
        return [fail(name, str(error), fix)]


async def check_delivery(probe: BrokerProbe) -> list[CheckResult]:
    """Publish to a subscriber at QoS 0 and 1."""
    topic = probe.topic("deliver")
    async with probe.client() as sender, probe.client() as reader:
        await reader.subscribe(topic, probe.qos)
        await sender.publish(topic, b"0")
        qos0 = await reader.receive() is not None
        if probe.qos == 0 or not qos0:
            return [verdicts.delivery_result(qos0, None)]
        await sender.publish(topic, b"1", qos=1)
        message = await reader.receive()
        return [verdicts.delivery_result(qos0, message is not None and message.qos == 1)]


async def check_properties(probe: BrokerProbe) -> list[CheckResult]:
    """Publish with all properties that Sparse uses."""
    topic = probe.topic("properties")
    async with probe.client() as sender, probe.client() as reader:
        await reader.subscribe(topic)
        await sender.publish(topic, b"x", TEST_PROPERTIES)
        message = await reader.receive()
        if message is None:
            return [fail("properties", "a message with properties does not arrive", verdicts.FIX_PROPERTIES)]
        return [verdicts.properties_result(verdicts.changed_properties(TEST_PROPERTIES, message.properties))]


async def check_retained(probe: BrokerProbe) -> list[CheckResult]:
    """Publish a retained message, subscribe later, and clear it."""
    topic = probe.topic("retained")
    async with probe.client() as sender:
        await probe.publish_retained(sender, topic, b"record")
        async with probe.client() as reader:
            await reader.subscribe(topic, probe.qos)
            message = await reader.receive()
        await sender.publish(topic, qos=probe.qos, retain=True)
        cleared = await is_topic_cleared(probe, topic)
        return [verdicts.retained_result(message is not None, message is not None and message.retain, cleared)]


async def is_topic_cleared(probe: BrokerProbe, topic: str) -> bool:
    """Whether a new subscriber gets no retained message."""
    async with probe.client() as reader:
        await reader.subscribe(topic, probe.qos)
        return await reader.receive(_SILENCE_S) is None


async def check_will(probe: BrokerProbe) -> list[CheckResult]:
    """Break the connection of a client whose will clears its retained message."""
    topic = probe.topic("will")
    async with probe.client() as reader:
        await reader.subscribe(topic, 1)
        async with probe.client(will=Will(topic)) as client:
            await probe.publish_retained(client, topic, b"record")
            await reader.receive()
            await client.abort()
        begin_s = time.monotonic()
        message = await reader.receive()
        if message is None or message.payload:
            return [verdicts.will_result(None, False)]
        after_s = time.monotonic() - begin_s
        return [verdicts.will_result(after_s, await is_topic_cleared(probe, topic))]


async def check_shared_subscription(probe: BrokerProbe) -> list[CheckResult]:
    """Publish to a group of two subscribers."""
    topic = probe.topic("tasks")
    group = f"$share/{probe.name}/{topic}"
    async with probe.client() as sender, probe.client() as first, probe.client() as second:
        for reader in (first, second):
            await reader.subscribe(group, probe.qos)
        for number in range(SHARED_MESSAGES):
            await sender.publish(topic, bytes((number,)), qos=probe.qos)
        # A busy broker may pause between two messages.
        received = [await reader.receive_all(2 * SHARED_MESSAGES, 2 * _SILENCE_S) for reader in (first, second)]
        return [verdicts.shared_subscription_result(SHARED_MESSAGES, *map(len, received))]


async def check_packet_sizes(probe: BrokerProbe) -> list[CheckResult]:
    """Publish packets of increasing size, up to the announced limit, until one is lost."""
    delivered: dict[int, bool] = {}
    announced_bytes = 0
    for packet_bytes in _PACKETS_BYTES:
        async with probe.client() as sender, probe.client() as reader:
            announced_bytes = sender.limits.max_packet_bytes
            packet_bytes = min(packet_bytes, announced_bytes)
            if packet_bytes not in delivered:
                delivered[packet_bytes] = await _is_delivered(probe, sender, reader, packet_bytes)
            if not delivered[packet_bytes]:
                break
    return [verdicts.largest_packet_result(announced_bytes, delivered)]


async def _is_delivered(probe: BrokerProbe, sender: ProbeClient, reader: ProbeClient, packet_bytes: int) -> bool:
    """Whether a packet of exactly this size arrives."""
    topic = probe.topic("large")
    await reader.subscribe(topic)
    payload_bytes = packet_bytes - len(encode_publish_header(topic, Properties(), packet_bytes // 2))
    while len(encode_publish_header(topic, Properties(), payload_bytes)) + payload_bytes > packet_bytes:
        payload_bytes -= 1
    try:
        await sender.publish(topic, bytes(payload_bytes))
        message = await reader.receive()
    except ConnectionLost:  # many brokers answer a packet that is too large with a disconnection
        return False
    return message is not None and len(message.payload) == payload_bytes


async def check_burst(probe: BrokerProbe) -> list[CheckResult]:
    """Publish the chunks of a large message to a subscriber that stops reading while they arrive."""
    topic = probe.topic("burst")
    async with probe.client() as sender, probe.client() as reader:
        chunk_bytes = min(_BURST_CHUNK_BYTES, sender.limits.max_packet_bytes - HEADER_RESERVE_BYTES)
        await reader.subscribe(topic)
        reader.set_reading_paused(True)
        padding = bytes(max(0, chunk_bytes - 2))
        for number in range(BURST_CHUNKS):
            await sender.publish(topic, number.to_bytes(2, "big") + padding)
        await asyncio.sleep(_READING_PAUSE_S)
        reader.set_reading_paused(False)
        messages = await reader.receive_all(BURST_CHUNKS)
        numbers = [int.from_bytes(message.payload[:2], "big") for message in messages]
        return [verdicts.burst_result(BURST_CHUNKS, numbers, len(padding) + 2)]


async def check_session(probe: BrokerProbe) -> list[CheckResult]:
    """Publish to a client while it is disconnected."""
    topic = probe.topic("session")
    name = f"{probe.name}-session"
    async with probe.client(session=name, session_expiry_s=verdicts.SESSION_EXPIRY_S) as client:
        granted_s = client.limits.session_expiry_s
    async with probe.client(session=name) as client:
        await client.subscribe(topic, 1)
    async with probe.client() as sender:
        for _ in range(SESSION_MESSAGES):
            await sender.publish(topic, b"kept", qos=1)
    async with probe.client(session=name, session_expiry_s=CLEANUP_EXPIRY_S) as client:
        messages = await client.receive_all(SESSION_MESSAGES) if client.session_present else []
        return [verdicts.session_result(client.session_present, SESSION_MESSAGES, len(messages), granted_s)]


async def _explain_refusal(probe: BrokerProbe, error: Exception) -> CheckResult:
    """Why an MQTT 5 client cannot connect: access control, an older version of MQTT, or no broker at all."""
    address = probe.address
    code = error.reason_code if isinstance(error, AuthenticationFailed | ConnackRefused) else None
    if code in (BAD_PASSWORD, NOT_AUTHORIZED):
        user = f"user {address.user!r}" if address.user else "clients without a user name"
        return fail("password", f"{address} does not accept {user}", verdicts.FIX_PASSWORD)
    if code == UNSUPPORTED_VERSION or isinstance(error, BrokerUnreachable | ConnectionLost):
        mqtt311_code = await mqtt311.probe_mqtt311(address, probe.tls, probe.name)
        if mqtt311_code is not None:
            access = "; it also requires a user name and password" if mqtt311_code in mqtt311.NOT_AUTHORIZED else ""
            message = f"{address} supports only MQTT 3.1.1, Sparse needs MQTT 5{access}"
            return fail("MQTT 5", message, verdicts.FIX_MQTT5)
    unreachable = error if isinstance(error, BrokerUnreachable) else connect_error(address, error)
    return verdicts.unreachable_result(str(address), unreachable.reason, isinstance(error, ssl.SSLError))
