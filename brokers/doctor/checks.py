"""The checks at one broker: each tries one feature, even if the broker announces it, and returns its verdict.

Every check has its own clients, so that a disconnected one affects no other check, and a time limit.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

from brokers.dispatch.channel import HEADER_RESERVE_BYTES
from brokers.doctor.probe_client import (
    CHUNK_PACKET_BYTES,
    CLEANUP_EXPIRY_S,
    FIX_PACKET_SIZE,
    FIX_QOS,
    FIX_RETAIN,
    FIX_SHARED_SUBSCRIPTION,
    BrokerProbe,
    CheckResult,
    ProbeClient,
    ReceivedPublish,
    fail,
    format_bytes,
    ok,
    warn,
)
from brokers.errors import BrokerUnreachable, SparseError
from brokers.mqtt.publish_packet import encode_publish_header
from brokers.mqtt.socket_connect import OperationRefused
from brokers.mqtt.socket_loop import ConnectionLost
from brokers.protocol.transport import BrokerLimits, Properties, Will

CHECK_TIMEOUT_S = 20.0
SHARED_MESSAGES = 10
SESSION_MESSAGES = 100
SESSION_EXPIRY_S = 24 * 3600  # requested by an ingress with keep = "all"
BURST_CHUNKS = 128  # as many as a message of 64 MiB has, but smaller ones
_BURST_CHUNK_BYTES = 128 << 10
_READING_PAUSE_S = 0.3
_SILENCE_S = 0.5  # without a message: none will arrive
_PACKETS_BYTES = (64 << 10, CHUNK_PACKET_BYTES, 2_000_000, 8 << 20)
TEST_PROPERTIES = Properties(
    content_type="application/x-sparse-doctor",
    correlation_data=bytes(range(16)),
    response_topic="sparse/doctor/reply",
    expiry_s=300,
    user_properties=(("kind", "probe"), ("kind", "twice"), ("text", "grüße")),
)

_FIX_ACCESS = "allow this client to read and write sparse/# (Mosquitto: in its acl_file)"
_FIX_SEE_LOG = "see the broker's log: Mosquitto with `log_type all`"
_FIX_QUEUE = "Mosquitto: max_queued_messages 1000; else: a longer queue for each client"
_FIX_SESSION = "Mosquitto: no persistent_client_expiration, max_queued_messages 1000; else: keep sessions for 24 h"
_FIX_WILL = "Mosquitto: allow the client to write there in its acl_file; else: allow last wills"
_FIX_PROPERTIES = "forward the MQTT 5 properties unchanged: no gateway or plugin in between may use MQTT 3.1.1"

BrokerCheck = Callable[[BrokerProbe], Awaitable[CheckResult]]


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
    name: str, check: Callable[[], Awaitable[CheckResult | list[CheckResult]]], timeout_s: float = CHECK_TIMEOUT_S
) -> list[CheckResult]:
    """Run a check; a broker that disconnects it, refuses an operation or never answers fails the check."""
    try:
        async with asyncio.timeout(timeout_s):
            results = await check()
            return results if isinstance(results, list) else [results]
    except TimeoutError:
        return [fail(name, f"not finished within {timeout_s:g} s", _FIX_SEE_LOG)]
    except BrokerUnreachable as error:
        fix = "Mosquitto: max_connections -1; see also the broker's log"
        return [fail(name, f"no further connection: {error.reason}", fix)]
    except (SparseError, ConnectionLost, OSError) as error:
        fix = _FIX_ACCESS if isinstance(error, OperationRefused) else _FIX_SEE_LOG
        return [fail(name, str(error), fix)]


async def check_delivery(probe: BrokerProbe) -> CheckResult:
    topic = probe.topic("deliver")
    async with probe.client() as sender, probe.client() as reader:
        await reader.subscribe(topic, probe.qos)
        await sender.publish(topic, b"0")
        if await reader.receive() is None:
            return fail("publish", "a message of QoS 0 did not reach its subscriber", _FIX_ACCESS)
        if probe.qos == 0:
            return ok("publish", "QoS 0 arrives; QoS 1 was not tried")
        await sender.publish(topic, b"1", qos=1)
        message = await reader.receive()
        if message is None or message.header.qos != 1:
            return fail("publish", "QoS 1 does not arrive as QoS 1", FIX_QOS)
        return ok("publish", "QoS 0 and 1 arrive")


async def check_properties(probe: BrokerProbe) -> CheckResult:
    topic = probe.topic("properties")
    async with probe.client() as sender, probe.client() as reader:
        await reader.subscribe(topic)
        await sender.publish(topic, b"x", TEST_PROPERTIES)
        return properties_result(await reader.receive())


def properties_result(message: ReceivedPublish | None, prefix: str = "", fix: str = _FIX_PROPERTIES) -> CheckResult:
    """Whether a message with `TEST_PROPERTIES` arrived unchanged; its expiry may have become shorter on the way."""
    if message is None:
        return fail("properties", f"{prefix}a message with properties does not arrive", fix)
    sent = TEST_PROPERTIES
    received = message.header.properties
    unchanged = {
        "Content Type": sent.content_type == received.content_type,
        "Correlation Data": sent.correlation_data == received.correlation_data,
        "Response Topic": sent.response_topic == received.response_topic,
        "user properties": sent.user_properties == received.user_properties,
        "Message Expiry": received.expiry_s is not None and 0 < received.expiry_s <= (sent.expiry_s or 0),
    }
    if changed := [name for name, same in unchanged.items() if not same]:
        return fail("properties", f"{prefix}lost or changed: {', '.join(changed)}", fix)
    return ok("properties", f"{prefix}all arrive unchanged")


async def check_retained(probe: BrokerProbe) -> CheckResult:
    topic = probe.topic("retained")
    async with probe.client() as sender:
        await probe.publish_record(sender, topic)
        async with probe.client() as reader:
            await reader.subscribe(topic, probe.qos)
            message = await reader.receive()
        await sender.publish(topic, qos=probe.qos, retain=True)
        is_cleared = await is_topic_cleared(probe, topic)
    if message is None:
        return fail("retained", "a retained message did not reach a later subscriber", FIX_RETAIN)
    if not message.header.retain:
        return fail("retained", "a retained message arrived without its flag: old records look new", FIX_RETAIN)
    if not is_cleared:
        return fail("retained", "a retained message cannot be cleared: workers that left look up", FIX_RETAIN)
    return ok("retained", "a later subscriber gets the record, until it is cleared")


async def is_topic_cleared(probe: BrokerProbe, topic: str) -> bool:
    """Whether a new subscriber gets no retained message."""
    async with probe.client() as reader:
        await reader.subscribe(topic, probe.qos)
        return await reader.receive(_SILENCE_S) is None


async def check_will(probe: BrokerProbe) -> CheckResult:
    """Break the connection of a client whose will clears its retained message."""
    topic = probe.topic("will")
    async with probe.client() as reader:
        await reader.subscribe(topic, 1)
        async with probe.client(will=Will(topic)) as client:
            await probe.publish_record(client, topic)
            await reader.receive()
            client.abort("aborted")
        begin_s = time.monotonic()
        message = await reader.receive()
        after_ms = 1000 * (time.monotonic() - begin_s)
        if message is None or message.payload:
            return fail("last will", "not published when its client died", _FIX_WILL)
        if not await is_topic_cleared(probe, topic):
            return fail("last will", "published, but the retained record is still there", _FIX_WILL)
        return ok("last will", f"clears the record of a dead client after {after_ms:.1f} ms")


async def check_shared_subscription(probe: BrokerProbe) -> CheckResult:
    topic = probe.topic("tasks")
    group = f"$share/{probe.name}/{topic}"
    sent = SHARED_MESSAGES
    async with probe.client() as sender, probe.client() as one, probe.client() as other:
        for reader in (one, other):
            await reader.subscribe(group, probe.qos)
        for number in range(sent):
            await sender.publish(topic, bytes((number,)), qos=probe.qos)
        # A busy broker may pause between two messages.
        first, second = [len(await reader.receive_all(2 * sent, 2 * _SILENCE_S)) for reader in (one, other)]
    if first + second > sent:
        message = f"{sent} messages to a group arrived {first + second} times: each subscriber gets its own copy"
        return fail("shared", message, FIX_SHARED_SUBSCRIPTION)
    if first + second < sent:
        return fail("shared", f"of {sent} messages to a group {first + second} arrived", _FIX_QUEUE)
    if not (first and second):
        message = f"all {sent} messages went to one of two subscribers: more workers on a shared task topic do not help"
        return warn("shared", message, FIX_SHARED_SUBSCRIPTION)
    return ok("shared", f"{sent} messages were distributed over two subscribers, {first} and {second}")


async def check_packet_sizes(probe: BrokerProbe) -> CheckResult:
    """Publish packets of increasing size, up to the announced limit, until one is lost."""
    check = "large packet"
    largest_bytes = announced_bytes = 0
    for packet_bytes in _PACKETS_BYTES:
        async with probe.client() as sender, probe.client() as reader:
            announced_bytes = sender.limits.max_packet_bytes
            packet_bytes = min(packet_bytes, announced_bytes)
            if packet_bytes > largest_bytes and not await _is_delivered(probe, sender, reader, packet_bytes):
                break
            largest_bytes = packet_bytes
    else:
        return ok(check, f"a packet of {format_bytes(largest_bytes)} arrives")
    message = f"a packet of {format_bytes(packet_bytes)} is lost, one of {format_bytes(largest_bytes)} arrives"
    if announced_bytes >= CHUNK_PACKET_BYTES > largest_bytes:
        message += f": senders rely on the announced limit, and send {format_bytes(CHUNK_PACKET_BYTES)}"
        return fail(check, message, FIX_PACKET_SIZE)
    message += ", below the announced limit: whole frames at the ingress must be smaller"
    return warn(check, message, FIX_PACKET_SIZE)


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


async def check_burst(probe: BrokerProbe) -> CheckResult:
    """Publish the chunks of a large message to a subscriber that stops reading while they arrive."""
    topic = probe.topic("burst")
    async with probe.client() as sender, probe.client() as reader:
        chunk_bytes = max(2, min(_BURST_CHUNK_BYTES, sender.limits.max_packet_bytes - HEADER_RESERVE_BYTES))
        await reader.subscribe(topic)
        reader.set_reading_paused(True)
        for number in range(BURST_CHUNKS):
            await sender.publish(topic, number.to_bytes(2, "big").ljust(chunk_bytes, b"\0"))
        await asyncio.sleep(_READING_PAUSE_S)
        reader.set_reading_paused(False)
        messages = await reader.receive_all(BURST_CHUNKS)
    chunks = f"{BURST_CHUNKS} chunks of {format_bytes(chunk_bytes)}"
    if len(messages) < BURST_CHUNKS:
        message = f"of {chunks} at QoS 0 only {len(messages)} reach a busy subscriber: large messages would be lost"
        return fail("burst", message, _FIX_QUEUE)
    if [int.from_bytes(message.payload[:2], "big") for message in messages] != list(range(BURST_CHUNKS)):
        fix = "keep the order of the messages of a client (MQTT 5.0, section 4.6)"
        return fail("burst", f"{chunks} at QoS 0 arrive out of order", fix)
    return ok("burst", f"{chunks} at QoS 0 all reach a busy subscriber, in order")


async def check_session(probe: BrokerProbe) -> CheckResult:
    """Publish to a client while it is disconnected."""
    topic = probe.topic("session")
    name = f"{probe.name}-session"
    async with probe.client(session=name, session_expiry_s=SESSION_EXPIRY_S) as client:
        granted_s = client.limits.session_expiry_s
    async with probe.client(session=name) as client:
        await client.subscribe(topic, 1)
    async with probe.client() as sender:
        for _ in range(SESSION_MESSAGES):
            await sender.publish(topic, b"kept", qos=1)
    need = 'an ingress with keep = "all" needs it'
    async with probe.client(session=name, session_expiry_s=CLEANUP_EXPIRY_S) as client:
        if not client.session_present:
            return warn("session", f"not kept when its client disconnects; {need}", _FIX_SESSION)
        received = len(await client.receive_all(SESSION_MESSAGES))
    if received < SESSION_MESSAGES:
        message = f"of {SESSION_MESSAGES} messages of QoS 1 to a disconnected client {received} were kept; {need}"
        return warn("session", message, _FIX_SESSION)
    if granted_s is not None and granted_s < SESSION_EXPIRY_S:
        return warn("session", f"kept for {granted_s} s, of {SESSION_EXPIRY_S} s requested; {need}", _FIX_SESSION)
    return ok("session", f"kept for a disconnected client, with all of {SESSION_MESSAGES} messages of QoS 1")
