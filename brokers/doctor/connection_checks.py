"""The checks of the connection to a broker, and of the limits that the broker announces in its CONNACK."""

import asyncio
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from brokers.dispatch.channel import HEADER_RESERVE_BYTES
from brokers.doctor.probe_client import (
    CHUNK_PACKET_BYTES,
    FIX_PACKET_SIZE,
    FIX_QOS,
    FIX_RETAIN,
    FIX_SHARED_SUBSCRIPTION,
    BrokerProbe,
    CheckResult,
    fail,
    format_bytes,
    ok,
    warn,
)
from brokers.errors import BrokerUnreachable
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from brokers.mqtt.socket_connect import BAD_PASSWORD, NOT_AUTHORIZED
from brokers.protocol.chunking import CHUNK_BYTES, MESSAGE_LIMIT_BYTES
from brokers.protocol.transport import BrokerLimits

MIN_PACKET_BYTES = (64 << 10) + HEADER_RESERVE_BYTES  # the least that docs/operations.md promises to work with
MIN_RECEIVE_MAXIMUM = 10
_MIN_KEEPALIVE_S = 5  # our clients send a packet every 2 s
_CERTIFICATE_WARNING = timedelta(days=30)

# CONNECT of MQTT 3.1.1 with the client id "doctor" and a clean session (MQTT 3.1.1, section 3.1).
_MQTT311_CONNECT = b"\x10\x12\x00\x04MQTT\x04\x02\x00\x0a\x00\x06doctor"
_MQTT311_ACCEPTED = 0  # return codes of its CONNACK (table 3.1); all others are not of this version
_MQTT311_NOT_AUTHORIZED = (4, 5)
MQTT311_TIMEOUT_S = 5.0


async def check_connection(probe: BrokerProbe) -> tuple[list[CheckResult], BrokerLimits | None]:
    """Connect, and check the limits that the broker announces; None in their place if it accepts no connection."""
    begin_s = time.monotonic()
    try:
        async with probe.client() as client:
            duration_ms = 1000 * (time.monotonic() - begin_s)
            tls_info = client.tls_info
            limits = client.limits
    except BrokerUnreachable as error:
        return [await _explain_refusal(probe, error)], None
    probe.qos = min(1, limits.max_qos)
    is_local = probe.address.is_unix_socket or probe.address.host in ("localhost", "127.0.0.1", "::1")
    return [
        ok("MQTT 5", f"{probe.address} accepts a connection after {duration_ms:.0f} ms"),
        tls_result(tls_info, datetime.now(UTC), is_local),
        *announced_limits_results(limits),
    ], limits


async def _explain_refusal(probe: BrokerProbe, error: BrokerUnreachable) -> CheckResult:
    """Why an MQTT 5 client cannot connect: access control, an older version of MQTT, or no broker at all."""
    address = probe.address
    if error.reason_code in (BAD_PASSWORD, NOT_AUTHORIZED):
        user = f"user {address.user!r}" if address.user else "clients without a user name"
        return fail(
            "password",
            f"{address} does not accept {user}",
            "add a user name to the address, mqtts://USER@HOST:PORT, and name a file with the password in "
            "SPARSE_PASSWORD_FILE; on a trusted network, anonymous clients may be allowed (Mosquitto: "
            "allow_anonymous true)",
        )
    code = await _connect_mqtt311(probe)
    if code is not None:
        access = "; it also requires a user name and password" if code in _MQTT311_NOT_AUTHORIZED else ""
        return fail(
            "MQTT 5",
            f"{address} supports only MQTT 3.1.1, Sparse needs MQTT 5{access}",
            "Mosquitto 2.0 and later speaks MQTT 5 on every listener, the embedded broker on a separate port; else: "
            "enable MQTT 5",
        )
    if isinstance(error.__cause__, ssl.SSLError):
        fix = "Mosquitto: certfile and keyfile, signed by an authority that clients trust"
        return fail("TLS", f"{address}: {error.reason}", fix)
    message = f"no MQTT broker accepts a connection at {address}: {error.reason}"
    return fail("reachable", message, "start one with `sparse broker`, or use another address")


async def _connect_mqtt311(probe: BrokerProbe) -> int | None:
    """The return code for an anonymous client of MQTT 3.1.1; None if the broker does not speak it."""
    address = probe.address
    with suppress(OSError, TimeoutError, EOFError):
        async with asyncio.timeout(MQTT311_TIMEOUT_S):
            if address.is_unix_socket:
                reader, writer = await asyncio.open_unix_connection(address.host)
            else:
                context = probe.tls.create_context() if address.is_tls else None
                reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context)
            try:
                writer.write(_MQTT311_CONNECT)
                connack = await reader.readexactly(4)
            finally:
                writer.close()
                await writer.wait_closed()
        if connack[:2] == b"\x20\x02" and connack[3] in (_MQTT311_ACCEPTED, *_MQTT311_NOT_AUTHORIZED):
            return connack[3]
    return None


def tls_result(tls_info: tuple[str, datetime | None] | None, now: datetime, is_local: bool) -> CheckResult:
    """`tls_info` is the version, and the end of the broker's certificate; `is_local`: it is on this machine."""
    if tls_info is None and is_local:
        return ok("TLS", "none, and none needed: the broker is on this machine")
    if tls_info is None:
        return warn(
            "TLS",
            "none: everyone on the network path can read and forge messages",
            "Mosquitto: cafile, certfile and keyfile in its listener; then mqtts://HOST:8883",
        )
    version, expires = tls_info
    if expires is None:
        return ok("TLS", version)
    message = f"{version}, certificate valid until {expires:%Y-%m-%d}"
    if expires - now < _CERTIFICATE_WARNING:
        return warn("TLS", f"{message}: soon", "renew the certificate that certfile and keyfile name")
    return ok("TLS", message)


def announced_limits_results(limits: BrokerLimits) -> Iterator[CheckResult]:
    """Yield the verdicts on the limits that the broker announces when a client connects."""
    yield _packet_size_result(limits.max_packet_bytes)
    in_flight = f"{limits.receive_maximum:,} messages of QoS 1 in flight (Receive Maximum)"
    if limits.receive_maximum < MIN_RECEIVE_MAXIMUM:
        fix = "Mosquitto: max_inflight_messages 100; else: a larger Receive Maximum"
        yield warn("in flight", f"only {in_flight}", fix)
    else:
        yield ok("in flight", in_flight)
    if limits.max_qos < 1:
        yield fail("QoS", "only QoS 0: presence, results and tasks need QoS 1", FIX_QOS)
    if not limits.retain_available:
        yield fail("retained", "no retained messages: presence records need them", FIX_RETAIN)
    if not limits.wildcards_available:
        fix = "enable wildcard subscriptions"
        yield fail("wildcards", "no wildcard subscriptions: finding workers needs them", fix)
    if not limits.shared_available:
        message = "no shared subscriptions: the shared task topics of stages need them"
        yield fail("shared", message, FIX_SHARED_SUBSCRIPTION)
    if limits.keepalive_s is not None and limits.keepalive_s < _MIN_KEEPALIVE_S:
        silence_s = 1.5 * limits.keepalive_s
        message = f"clients are disconnected after {silence_s:g} s without a packet; ours send one every 2 s"
        yield warn("keep-alive", message, "Mosquitto: max_keepalive 60; else: a longer Server Keep Alive")


def _packet_size_result(limit_bytes: int) -> CheckResult:
    check = "packet size"
    if limit_bytes >= MAX_REMAINING_BYTES:
        return ok(check, "no limit but that of MQTT is announced")
    limit = f"{format_bytes(limit_bytes)} at most (Maximum Packet Size)"
    if limit_bytes < MIN_PACKET_BYTES:
        return fail(check, f"{limit}: {format_bytes(MIN_PACKET_BYTES)} are needed", FIX_PACKET_SIZE)
    if limit_bytes < CHUNK_PACKET_BYTES:
        message = (
            f"{limit}: clients of this broker send smaller chunks, but clients behind a bridge do not know the limit "
            f"and send {CHUNK_PACKET_BYTES:,} bytes"
        )
        return warn(check, message, FIX_PACKET_SIZE)
    return ok(check, limit)


def cut_results(sizes: Mapping[str, int], limit_bytes: int) -> Iterator[CheckResult]:
    """Yield whether the tensors at each cut fit a message, and the number of its chunks."""
    chunk_bytes = max(1, min(CHUNK_BYTES, limit_bytes - HEADER_RESERVE_BYTES))
    for name, size in sizes.items():
        if size > MESSAGE_LIMIT_BYTES:
            message = f"{name}: {format_bytes(size)}, and a message has at most {format_bytes(MESSAGE_LIMIT_BYTES)}"
            yield fail("cut", message, 'cut elsewhere, use smaller micro-batches, or set wire = "float16"')
        else:
            chunks = -(-size // chunk_bytes)
            yield ok("cut", f"{name}: {format_bytes(size)}, in {chunks} chunk{'s' if chunks > 1 else ''}")
