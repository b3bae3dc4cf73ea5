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

from brokers.dispatch.channel import HEAD_ROOM_BYTES
from brokers.doctor import mqtt311 as older
from brokers.doctor import verdicts as doctor
from brokers.doctor.check_result import Finding, fail, ok
from brokers.doctor.probe_client import EXPIRY_S, Visit, Visitor
from brokers.errors import BrokerUnreachable, SparseError
from brokers.mqtt.connect_errors import (
    BAD_PASSWORD,
    NOT_AUTHORIZED,
    UNSUPPORTED_VERSION,
    Declined,
    Refused,
    TurnedAway,
    not_reached,
)
from brokers.mqtt.publish_packet import encode_head
from brokers.mqtt.socket_loop import ConnectionLost
from brokers.protocol.transport import Limits, Properties, Will

PROBE_S = 20.0
SHARED_MESSAGES = 10
KEPT_MESSAGES = 100
BURST_CHUNKS = 128  # as many as a message of 64 MiB has, though smaller
_BURST_CHUNK_BYTES = 128 << 10
_LOOKS_AWAY_S = 0.3
_NOTHING_S = 0.5  # for what should not come
_PACKETS_BYTES = (64 << 10, doctor.USUAL_PACKET_BYTES, 2_000_000, 8 << 20)
PROPERTIES = Properties(
    content_type="application/x-sparse-doctor",
    correlation=bytes(range(16)),
    response_topic="sparse/doctor/reply",
    expiry_s=300,
    user=(("kind", "probe"), ("kind", "twice"), ("text", "grüße")),
)

Probe = Callable[[Visit], Awaitable[list[Finding]]]


async def greet(visit: Visit) -> tuple[list[Finding], Limits | None]:
    """Connect once: whether the broker is there, what it speaks, what it announces; None when the rest is in vain."""
    began_s = time.monotonic()
    try:
        async with visit.visitor() as visitor:
            took_ms = 1000 * (time.monotonic() - began_s)
            version, ends = visitor.secured or (None, None)
            limits = visitor.limits
    except (BrokerUnreachable, ConnectionLost, OSError) as error:
        return [await _why_not(visit, error)], None
    visit.qos = min(1, limits.max_qos)
    local = visit.address.unix or visit.address.host in ("localhost", "127.0.0.1", "::1")
    return [
        ok("MQTT 5", f"{visit.address} lets us in after {took_ms:.0f} ms"),
        doctor.tls(version, ends, datetime.now(UTC), local),
        *doctor.announced(limits),
    ], limits


async def examine(visit: Visit, limits: Limits) -> AsyncIterator[Finding]:
    """Yield what is found by trying, for as much as the broker says it can do."""
    probes: list[tuple[str, Probe, bool]] = [
        ("publish", deliver, True),
        ("properties", keep_properties, True),
        ("retained", retain, limits.retain),
        ("last will", die, limits.retain and limits.max_qos > 0),
        ("shared", share, limits.shared),
        ("largest", swallow, True),
        ("burst", keep_order, True),
        ("session", remember, limits.max_qos > 0),
    ]
    for what, probe, sensible in probes:
        if sensible:
            for finding in await tried(what, partial(probe, visit)):
                yield finding


async def tried(what: str, act: Callable[[], Awaitable[list[Finding]]], limit_s: float = PROBE_S) -> list[Finding]:
    """Return what a probe found; a broker that throws it out, refuses or never answers is a finding, too."""
    try:
        async with asyncio.timeout(limit_s):
            return await act()
    except TimeoutError:
        return [fail(what, f"no end within {limit_s:g} s", doctor.LOGS)]
    except BrokerUnreachable as error:
        return [fail(what, f"no further connection: {error.reason}", "Mosquitto: max_connections -1; see what it logs")]
    except (SparseError, ConnectionLost, OSError) as error:
        return [fail(what, str(error), doctor.ACCESS if isinstance(error, Refused) else doctor.LOGS)]


# One broker -------------------------------------------------------------------------------------------------------


async def deliver(visit: Visit) -> list[Finding]:
    """Publish to a subscriber at QoS 0 and 1."""
    topic = visit.topic("deliver")
    async with visit.visitor() as sender, visit.visitor() as reader:
        await reader.subscribe(topic, visit.qos)
        await sender.publish(topic, b"0")
        qos0 = await reader.hear() is not None
        if visit.qos == 0 or not qos0:
            return [doctor.delivery(qos0, None)]
        await sender.publish(topic, b"1", qos=1)
        heard = await reader.hear()
        return [doctor.delivery(qos0, heard is not None and heard.qos == 1)]


async def keep_properties(visit: Visit) -> list[Finding]:
    """Publish with all properties that Sparse uses."""
    topic = visit.topic("properties")
    async with visit.visitor() as sender, visit.visitor() as reader:
        await reader.subscribe(topic)
        await sender.publish(topic, b"x", PROPERTIES)
        heard = await reader.hear()
        if heard is None:
            return [fail("properties", "a message with properties does not arrive", doctor.PROPERTIES)]
        return [doctor.properties(doctor.differences(PROPERTIES, heard.properties))]


async def retain(visit: Visit) -> list[Finding]:
    """Leave a record for a late subscriber, and take it away again."""
    topic = visit.topic("retained")
    async with visit.visitor() as sender:
        await visit.retain(sender, topic, b"record")
        async with visit.visitor() as late:
            await late.subscribe(topic, visit.qos)
            heard = await late.hear()
        await sender.publish(topic, qos=visit.qos, retain=True)
        gone = await nothing_retained(visit, topic)
        return [doctor.retained(heard is not None, heard is not None and heard.retain, gone)]


async def nothing_retained(visit: Visit, topic: str) -> bool:
    """Whether one who subscribes now gets nothing."""
    async with visit.visitor() as later:
        await later.subscribe(topic, visit.qos)
        return await later.hear(_NOTHING_S) is None


async def die(visit: Visit) -> list[Finding]:
    """Break the connection of a client that has left a record and the will to clear it."""
    topic = visit.topic("will")
    async with visit.visitor() as reader:
        await reader.subscribe(topic, 1)
        async with visit.visitor(will=Will(topic)) as doomed:
            await visit.retain(doomed, topic, b"record")
            await reader.hear()
            await doomed.vanish()
        began_s = time.monotonic()
        heard = await reader.hear()
        if heard is None or heard.payload:
            return [doctor.will(None, False)]
        after_s = time.monotonic() - began_s
        return [doctor.will(after_s, await nothing_retained(visit, topic))]


async def share(visit: Visit) -> list[Finding]:
    """Publish to a group of two."""
    topic = visit.topic("tasks")
    group = f"$share/{visit.name}/{topic}"
    async with visit.visitor() as sender, visit.visitor() as one, visit.visitor() as other:
        for each in (one, other):
            await each.subscribe(group, visit.qos)
        for number in range(SHARED_MESSAGES):
            await sender.publish(topic, bytes((number,)), qos=visit.qos)
        first, second = await asyncio.gather(*(_count(each) for each in (one, other)))
        return [doctor.shared(SHARED_MESSAGES, first, second)]


async def _count(visitor: Visitor) -> int:
    """How many come before a pause, which must be long enough for a broker that is busy."""
    return len(await visitor.hear_all(2 * SHARED_MESSAGES, 2 * _NOTHING_S))


async def swallow(visit: Visit) -> list[Finding]:
    """Publish whole packets of sizes that matter, up to what is announced."""
    tried_bytes: dict[int, bool] = {}
    announced = 0
    for size in _PACKETS_BYTES:
        async with visit.visitor() as sender, visit.visitor() as reader:
            announced = sender.limits.max_packet_bytes
            wanted = min(size, announced)
            if wanted not in tried_bytes:
                tried_bytes[wanted] = await _passes(visit, sender, reader, wanted)
            if not tried_bytes[wanted]:
                break
    return [doctor.largest(announced, tried_bytes)]


async def _passes(visit: Visit, sender: Visitor, reader: Visitor, packet_bytes: int) -> bool:
    """Whether a packet of exactly that many bytes comes through."""
    topic = visit.topic("largest")
    await reader.subscribe(topic)
    payload_bytes = packet_bytes - len(encode_head(topic, Properties(), packet_bytes // 2))
    while len(encode_head(topic, Properties(), payload_bytes)) + payload_bytes > packet_bytes:
        payload_bytes -= 1
    try:
        await sender.publish(topic, bytes(payload_bytes))
        heard = await reader.hear()
    except ConnectionLost:  # the answer of many brokers to a packet that is too large
        return False
    return heard is not None and len(heard.payload) == payload_bytes


async def keep_order(visit: Visit) -> list[Finding]:
    """Publish the chunks of a message to a reader that looks away while they come."""
    topic = visit.topic("burst")
    async with visit.visitor() as sender, visit.visitor() as reader:
        chunk_bytes = min(_BURST_CHUNK_BYTES, sender.limits.max_packet_bytes - HEAD_ROOM_BYTES)
        await reader.subscribe(topic)
        reader.look_away(True)
        rest = bytes(max(0, chunk_bytes - 2))
        for number in range(BURST_CHUNKS):
            await sender.publish(topic, number.to_bytes(2, "big") + rest)
        await asyncio.sleep(_LOOKS_AWAY_S)
        reader.look_away(False)
        came = [int.from_bytes(heard.payload[:2], "big") for heard in await reader.hear_all(BURST_CHUNKS)]
        return [doctor.burst(BURST_CHUNKS, came, len(rest) + 2)]


async def remember(visit: Visit) -> list[Finding]:
    """Publish to a client that is away."""
    topic, name = visit.topic("session"), f"{visit.name}-session"
    async with visit.visitor(session=name, session_expiry_s=doctor.SESSION_S) as asking:
        lasts_s = asking.limits.session_expiry_s
    async with visit.visitor(session=name) as leaving:
        await leaving.subscribe(topic, 1)
    async with visit.visitor() as sender:
        for _ in range(KEPT_MESSAGES):
            await sender.publish(topic, b"kept", qos=1)
    async with visit.visitor(session=name, session_expiry_s=EXPIRY_S) as back:
        came = await back.hear_all(KEPT_MESSAGES) if back.resumed else []
        return [doctor.session(back.resumed, KEPT_MESSAGES, len(came), lasts_s)]


# When nobody lets us in -------------------------------------------------------------------------------------------


async def _why_not(visit: Visit, error: Exception) -> Finding:
    """What stands in the way of an MQTT 5 client: a lock, an older version, or that nobody is there."""
    address, code = visit.address, error.code if isinstance(error, TurnedAway | Declined) else None
    if code in (BAD_PASSWORD, NOT_AUTHORIZED):
        user = f"user {address.user!r}" if address.user else "a client that names no user"
        return fail("password", f"{address} does not let {user} in", doctor.PASSWORD)
    answered = code == UNSUPPORTED_VERSION or isinstance(error, BrokerUnreachable | ConnectionLost)
    if answered and (old := await older.ask(address, visit.tls, visit.name)) is not None and old.speaks:
        locked = "; and wants a user and password" if old.code in older.NOT_AUTHORIZED else ""
        return fail("MQTT 5", f"{address} speaks only MQTT 3.1.1, Sparse needs MQTT 5{locked}", doctor.MQTT_5)
    told = error if isinstance(error, BrokerUnreachable) else not_reached(address, error)
    return doctor.unreachable(str(address), told.reason, isinstance(error, ssl.SSLError))
