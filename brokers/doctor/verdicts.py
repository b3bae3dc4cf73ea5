"""The verdicts of the doctor: from what a check observed to a `CheckResult`, with the setting that fixes it.

"FAIL" stops a pipeline or loses its messages; "warn" matters to some pipelines. Fixes are lines of mosquitto.conf where
there are any, and a description for other brokers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta

from brokers.dispatch.channel import HEADER_RESERVE_BYTES
from brokers.doctor.check_result import CheckResult, fail, format_bytes, ok, warn
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from brokers.protocol.chunking import CHUNK_BYTES, MESSAGE_LIMIT_BYTES
from brokers.protocol.transport import BrokerLimits, Properties

MIN_PACKET_BYTES = (64 << 10) + HEADER_RESERVE_BYTES  # the least that docs/operations.md promises to work with
CHUNK_PACKET_BYTES = CHUNK_BYTES + HEADER_RESERVE_BYTES
SESSION_EXPIRY_S = 24 * 3600  # requested by an ingress with keep = "all"
MIN_RECEIVE_MAXIMUM = 10
_MIN_KEEPALIVE_S = 5  # our clients send a packet every 2 s
_CERTIFICATE_WARNING = timedelta(days=30)

FIX_ACCESS = "allow this client to read and write sparse/# (Mosquitto: in its acl_file)"
FIX_PACKET_SIZE = f"Mosquitto: max_packet_size {MAX_REMAINING_BYTES}; else: allow packets of {CHUNK_PACKET_BYTES} bytes"
FIX_SEE_LOG = "see the broker's log: Mosquitto with `log_type all`"
FIX_QUEUE = "Mosquitto: max_queued_messages 1000; else: a longer queue for each client"
FIX_QOS = "Mosquitto: max_qos 2; else: allow QoS 1"
FIX_RETAIN = "Mosquitto: retain_available true; else: allow retained messages"
FIX_MQTT5 = (
    "Mosquitto 2.0 and later speaks MQTT 5 on every listener, the embedded broker on a port of its own; else: "
    "enable MQTT 5"
)
FIX_PASSWORD = (
    "add a user name to the address, mqtts://USER@HOST:PORT, and name a file with the password in "
    "SPARSE_PASSWORD_FILE; on a trusted network, anonymous clients may be allowed (Mosquitto: allow_anonymous true)"
)
FIX_SHARED_SUBSCRIPTION = "Mosquitto has them by default; else: enable shared subscriptions"
FIX_SESSION = "Mosquitto: no persistent_client_expiration, max_queued_messages 1000; else: keep sessions for 24 h"
FIX_WILL = "Mosquitto: allow the client to write there in its acl_file; else: allow last wills"
FIX_PROPERTIES = "forward the MQTT 5 properties unchanged: no gateway or plugin in between may use MQTT 3.1.1"
FIX_BRIDGE_LOOP = (
    "Mosquitto: one bridge between two sites, and no topic line with `both`; `sparse broker config` prints the "
    "right ones"
)


def unreachable_result(address: str, reason: str, tls_failed: bool) -> CheckResult:
    """No MQTT broker of any version accepted the connection."""
    if tls_failed:
        return fail(
            "TLS", f"{address}: {reason}", "Mosquitto: certfile and keyfile, signed by an authority that clients trust"
        )
    message = f"no MQTT broker accepts a connection at {address}: {reason}"
    return fail("reachable", message, "start one with `sparse broker`, or use another address")


# Announced in the CONNACK ---------------------------------------------------------------------------------------------


def announced_limits_results(limits: BrokerLimits) -> Iterator[CheckResult]:
    """Yield the verdicts on the limits that the broker announces when a client connects."""
    yield packet_size_result(limits.max_packet_bytes)
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
        yield fail(
            "wildcards", "no wildcard subscriptions: finding workers needs them", "enable wildcard subscriptions"
        )
    if not limits.shared_available:
        message = "no shared subscriptions: the shared task topics of stages need them"
        yield fail("shared", message, FIX_SHARED_SUBSCRIPTION)
    if limits.keepalive_s is not None and limits.keepalive_s < _MIN_KEEPALIVE_S:
        yield warn(
            "keep-alive",
            f"clients are disconnected after {1.5 * limits.keepalive_s:g} s without a packet; ours send one every 2 s",
            "Mosquitto: max_keepalive 60; else: a longer Server Keep Alive",
        )


def packet_size_result(limit_bytes: int) -> CheckResult:
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


def tls_result(version: str | None, expires: datetime | None, now: datetime, is_local: bool) -> CheckResult:
    """`version` is None without TLS; `is_local`: the broker is on this machine."""
    if version is None and is_local:
        return ok("TLS", "none, and none needed: the broker is on this machine")
    if version is None:
        return warn(
            "TLS",
            "none: everyone on the network path can read and forge messages",
            "Mosquitto: cafile, certfile and keyfile in its listener; then mqtts://HOST:8883",
        )
    if expires is None:
        return ok("TLS", version)
    message = f"{version}, certificate valid until {expires:%Y-%m-%d}"
    if expires - now < _CERTIFICATE_WARNING:
        return warn("TLS", f"{message}: soon", "renew the certificate that certfile and keyfile name")
    return ok("TLS", message)


# Tried at one broker --------------------------------------------------------------------------------------------------


def delivery_result(qos0: bool, qos1: bool | None) -> CheckResult:
    """`qos1` is None where it was not tried."""
    if not qos0:
        return fail("publish", "a message of QoS 0 did not reach its subscriber", FIX_ACCESS)
    if qos1 is None:
        return ok("publish", "QoS 0 arrives; QoS 1 was not tried")
    return ok("publish", "QoS 0 and 1 arrive") if qos1 else fail("publish", "QoS 1 does not arrive as QoS 1", FIX_QOS)


def retained_result(received: bool, flagged: bool, cleared: bool) -> CheckResult:
    if not received:
        return fail("retained", "a retained message did not reach a later subscriber", FIX_RETAIN)
    if not flagged:
        return fail("retained", "a retained message arrived without its flag: old records look new", FIX_RETAIN)
    if not cleared:
        return fail("retained", "a retained message cannot be cleared: workers that left look up", FIX_RETAIN)
    return ok("retained", "a later subscriber gets the record, until it is cleared")


def will_result(after_s: float | None, cleared: bool) -> CheckResult:
    """`after_s` is None if the last will was not published."""
    if after_s is None:
        return fail("last will", "not published when its client died", FIX_WILL)
    if not cleared:
        return fail("last will", "published, but the retained record is still there", FIX_WILL)
    return ok("last will", f"clears the record of a dead client after {1000 * after_s:.1f} ms")


def shared_subscription_result(sent: int, first: int, second: int) -> CheckResult:
    """`first` and `second` are the messages that the two subscribers of a group received."""
    received = first + second
    if received > sent:
        message = f"{sent} messages to a group arrived {received} times: each subscriber gets its own copy"
        return fail("shared", message, FIX_SHARED_SUBSCRIPTION)
    if received < sent:
        return fail("shared", f"of {sent} messages to a group {received} arrived", FIX_QUEUE)
    if not (first and second):
        message = f"all {sent} messages went to one of two subscribers: more workers on a shared task topic do not help"
        return warn("shared", message, FIX_SHARED_SUBSCRIPTION)
    return ok("shared", f"{sent} messages were distributed over two subscribers, {first} and {second}")


def changed_properties(sent: Properties, received: Properties) -> list[str]:
    """The names of the properties that did not arrive unchanged; an expiry may have become shorter on the way."""
    unchanged = {
        "Content Type": sent.content_type == received.content_type,
        "Correlation Data": sent.correlation_data == received.correlation_data,
        "Response Topic": sent.response_topic == received.response_topic,
        "user properties": sent.user_properties == received.user_properties,
        "Message Expiry": received.expiry_s is not None and 0 < received.expiry_s <= (sent.expiry_s or 0),
    }
    return [name for name, same in unchanged.items() if not same]


def properties_result(changed: Sequence[str], prefix: str = "", fix: str = FIX_PROPERTIES) -> CheckResult:
    if changed:
        return fail("properties", f"{prefix}lost or changed: {', '.join(changed)}", fix)
    return ok("properties", f"{prefix}all arrive unchanged")


def largest_packet_result(announced_bytes: int, delivered: Mapping[int, bool]) -> CheckResult:
    """`delivered` says which sizes of whole packets arrived."""
    check = "large packet"
    largest = max((size for size, arrived in delivered.items() if arrived), default=0)
    lost = min((size for size, arrived in delivered.items() if not arrived), default=None)
    if lost is None:
        return ok(check, f"a packet of {format_bytes(largest)} arrives")
    message = f"a packet of {format_bytes(lost)} is lost, one of {format_bytes(largest)} arrives"
    if announced_bytes >= CHUNK_PACKET_BYTES > largest:
        message = f"{message}: senders rely on the announced limit, and send {format_bytes(CHUNK_PACKET_BYTES)}"
        return fail(check, message, FIX_PACKET_SIZE)
    message = f"{message}, below the announced limit: whole frames at the ingress must be smaller"
    return warn(check, message, FIX_PACKET_SIZE)


def burst_result(sent: int, received: Sequence[int], chunk_bytes: int) -> CheckResult:
    """`received` are the numbers of the chunks that reached a subscriber that had stopped reading meanwhile."""
    chunks = f"{sent} chunks of {format_bytes(chunk_bytes)}"
    if list(received) == list(range(sent)):
        return ok("burst", f"{chunks} at QoS 0 all reach a busy subscriber, in order")
    if len(received) < sent:
        message = f"of {chunks} at QoS 0 only {len(received)} reach a busy subscriber: large messages would be lost"
        return fail("burst", message, FIX_QUEUE)
    message = f"{chunks} at QoS 0 arrive out of order"
    return fail("burst", message, "keep the order of the messages of a client (MQTT 5.0, section 4.6)")


def session_result(session_present: bool, sent: int, received: int, expiry_s: int | None) -> CheckResult:
    """`received` messages for a disconnected client were delivered later; `expiry_s`: as granted by the broker."""
    need = 'an ingress with keep = "all" needs it'
    if not session_present:
        return warn("session", f"not kept when its client disconnects; {need}", FIX_SESSION)
    if received < sent:
        message = f"of {sent} messages of QoS 1 to a disconnected client {received} were kept; {need}"
        return warn("session", message, FIX_SESSION)
    if expiry_s is not None and expiry_s < SESSION_EXPIRY_S:
        return warn("session", f"kept for {expiry_s} s, of {SESSION_EXPIRY_S} s requested; {need}", FIX_SESSION)
    return ok("session", f"kept for a disconnected client, with all of {sent} messages of QoS 1")


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


# Tried across a bridge; `direction` is such as "device to cloud" ------------------------------------------------------


def bridge_topics_fix(start: str, end: str) -> str:
    """The topic lines at the broker of `start` that forward messages for `end`."""
    return (
        f"Mosquitto at {start}: topic sparse/{end}/+/+/in/+ out 0, and the other lines that `sparse broker config FILE "
        f"{start}` prints; see also the logs of both brokers"
    )


def bridge_result(direction: str, after_s: float | None, fix: str) -> CheckResult:
    """`after_s` is None if no message arrived."""
    if after_s is None:
        return fail("bridge", f"{direction}: messages for the site are not forwarded", fix)
    return ok("bridge", f"{direction}: a message arrives after {1000 * after_s:.1f} ms")


def duplicates_result(direction: str, copies: int) -> CheckResult:
    """`copies` is how often the most repeated message arrived, at either broker."""
    if copies > 1:
        message = f"{direction}: a message arrived {copies} times: the bridges make a loop, or there are two of them"
        return fail("duplicates", message, FIX_BRIDGE_LOOP)
    return ok("duplicates", f"{direction}: each message arrives once, at both brokers")


def bridge_properties_result(direction: str, changed: Sequence[str]) -> CheckResult:
    fix = "Mosquitto: bridge_protocol_version mqttv50, in the bridge's connection"
    return properties_result(changed, f"{direction}: ", fix)


def bridge_presence_result(direction: str, received: bool, start: str) -> CheckResult:
    """`start` is the site of the worker whose record was published."""
    if received:
        return ok("presence", f"{direction}: a later subscriber gets a worker's retained record")
    fix = f"Mosquitto: topic sparse/{start}/+/+/up/+ in 1 (out, if {start} runs the bridge)"
    return fail("presence", f"{direction}: a worker's record does not arrive: it would get no tasks", fix)


def bridge_will_result(direction: str, after_s: float | None, cleared: bool, start: str) -> CheckResult:
    """`after_s` is None if the record was not cleared for subscribers."""
    if after_s is not None and cleared:
        return ok("last will", f"{direction}: the record of a dead worker is cleared after {1000 * after_s:.0f} ms")
    fix = f"Mosquitto: topic sparse/{start}/+/+/up/+ in 1, and retain_available true at both brokers"
    return fail("last will", f"{direction}: the record of a dead worker stays: it would still get tasks", fix)


def bridge_chunk_result(direction: str, chunk_bytes: int, received: bool) -> CheckResult:
    chunk = f"{direction}: a chunk of {format_bytes(chunk_bytes)}, the size that senders use there,"
    if received:
        return ok("chunk", f"{chunk} arrives")
    return fail("chunk", f"{chunk} is lost", f"{FIX_PACKET_SIZE}; at both brokers")
