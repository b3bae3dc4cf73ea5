"""What an examination of a broker means for Sparse: from what was seen to a finding, and what mends it. Pure.

`FAIL` is what stops a pipeline or loses its messages, `warn` what only some need. Each mends by a line of
mosquitto.conf where there is one, and in words for other brokers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta

from brokers.dispatch.channel import HEADER_RESERVE_BYTES
from brokers.doctor.check_result import CheckResult, fail, format_bytes, ok, warn
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from brokers.protocol.chunking import CHUNK_BYTES, MESSAGE_LIMIT_BYTES
from brokers.protocol.transport import BrokerLimits, Properties

MIN_PACKET_BYTES = (64 << 10) + HEADER_RESERVE_BYTES  # docs/operations.md promises to work from here on
CHUNK_PACKET_BYTES = CHUNK_BYTES + HEADER_RESERVE_BYTES
SESSION_EXPIRY_S = 24 * 3600  # what an ingress asks for, with keep = "all"
MIN_RECEIVE_MAXIMUM = 10
_KEEPALIVE_S = 5  # a client of ours is heard of every 2 s
_SOON = timedelta(days=30)

FIX_ACCESS = "let this client read and write sparse/# (Mosquitto: in its acl_file)"
FIX_PACKET_SIZE = f"Mosquitto: max_packet_size {MAX_REMAINING_BYTES}; else: allow packets of {CHUNK_PACKET_BYTES} bytes"
FIX_SEE_LOG = "the broker's log says why: Mosquitto with `log_type all`"
FIX_QUEUE = "Mosquitto: max_queued_messages 1000; else: a longer queue for each client"
FIX_QOS = "Mosquitto: max_qos 2; else: allow QoS 1"
FIX_RETAIN = "Mosquitto: retain_available true; else: allow retained messages"
FIX_MQTT5 = (
    "Mosquitto 2.0 or later speaks MQTT 5 on every listener; the embedded broker has a port of its own for it; "
    "else: enable MQTT 5"
)
FIX_PASSWORD = (
    "name a user it knows, mqtts://USER@HOST:PORT, and a file with the password in SPARSE_PASSWORD_FILE; or, where "
    "only friends reach it, let anybody in (Mosquitto: allow_anonymous true)"
)
FIX_SHARED_SUBSCRIPTION = "Mosquitto has them, on by itself; else: enable shared subscriptions"
FIX_SESSION = "Mosquitto: no persistent_client_expiration, max_queued_messages 1000; else: let sessions last for 24 h"
FIX_WILL = "Mosquitto publishes them, where its acl_file lets the client write there; else: allow last wills"
FIX_PROPERTIES = "pass on the properties of MQTT 5 unchanged: no gateway or plugin in between that speaks 3.1.1"


def unreachable_result(address: str, reason: str, tls_failed: bool) -> CheckResult:
    """Where no broker of any version let us in; `secured`: it is TLS that failed."""
    if tls_failed:
        return fail(
            "TLS", f"{address}: {reason}", "Mosquitto: certfile and keyfile, of an authority that clients trust"
        )
    return fail(
        "reachable",
        f"no MQTT broker lets us in at {address}: {reason}",
        "`sparse broker` starts one; or another address",
    )


def announced_limits_results(limits: BrokerLimits) -> Iterator[CheckResult]:
    """Yield what the CONNACK says, before anything is tried."""
    yield packet_size_result(limits.max_packet_bytes)
    few = limits.receive_maximum < MIN_RECEIVE_MAXIMUM
    said = f"{limits.receive_maximum:,} publications of QoS 1 on the way at once (Receive Maximum)"
    yield (
        warn("in flight", f"only {said}", "Mosquitto: max_inflight_messages 100; else: a larger Receive Maximum")
        if few
        else ok("in flight", said)
    )
    if limits.max_qos < 1:
        yield fail("QoS", "only QoS 0: presence, results and tasks need QoS 1", FIX_QOS)
    if not limits.retain_available:
        yield fail("retained", "it takes no retained messages: nobody would know who is up", FIX_RETAIN)
    if not limits.wildcards_available:
        yield fail("wildcards", "no wildcard subscriptions: nobody would find workers", "enable wildcard subscriptions")
    if not limits.shared_available:
        yield fail(
            "shared", "no shared subscriptions: workers need one for their stage's front door", FIX_SHARED_SUBSCRIPTION
        )
    if limits.keepalive_s is not None and limits.keepalive_s < _KEEPALIVE_S:
        yield warn(
            "keep-alive",
            f"it ends clients that it has not heard of for {1.5 * limits.keepalive_s:g} s; ours speak every 2 s",
            "Mosquitto: max_keepalive 60; else: a longer Server Keep Alive",
        )


def packet_size_result(limit_bytes: int) -> CheckResult:
    what = "packet size"
    if limit_bytes >= MAX_REMAINING_BYTES:
        return ok(what, "no limit but MQTT's own is announced")
    said = f"{format_bytes(limit_bytes)} at most (Maximum Packet Size)"
    if limit_bytes < MIN_PACKET_BYTES:
        return fail(what, f"{said}, {format_bytes(MIN_PACKET_BYTES)} are needed", FIX_PACKET_SIZE)
    if limit_bytes < CHUNK_PACKET_BYTES:
        across = f"clients here cut smaller chunks; one across a bridge cannot know, and sends {CHUNK_PACKET_BYTES:,}"
        return warn(what, f"{said}: {across}", FIX_PACKET_SIZE)
    return ok(what, said)


def tls_result(version: str | None, expires: datetime | None, now: datetime, is_local: bool) -> CheckResult:
    """`version` is None where there is no TLS; `local` says that no network lies between."""
    what = "TLS"
    if version is None and is_local:
        return ok(what, "none, and none needed: the broker is on this machine")
    if version is None:
        return warn(
            what,
            "none: whoever is on the way reads all, and may write",
            "Mosquitto: cafile, certfile and keyfile in its listener; then mqtts://HOST:8883",
        )
    if expires is None:
        return ok(what, version)
    said = f"{version}, certificate until {expires:%Y-%m-%d}"
    if expires - now < _SOON:
        return warn(what, f"{said}: soon", "a new certificate, at the paths that certfile and keyfile name")
    return ok(what, said)


def delivery_result(qos0: bool, qos1: bool | None) -> CheckResult:
    """`qos1` is None where it was not tried."""
    what = "publish"
    if not qos0:
        return fail(what, "a publication of QoS 0 did not reach its subscriber", FIX_ACCESS)
    if qos1 is None:
        return ok(what, "QoS 0 arrives; QoS 1 was not tried")
    return ok(what, "QoS 0 and 1 arrive") if qos1 else fail(what, "QoS 1 does not arrive as such", FIX_QOS)


def retained_result(received: bool, flagged: bool, cleared: bool) -> CheckResult:
    what = "retained"
    if not received:
        return fail(what, "a retained message did not reach a late subscriber", FIX_RETAIN)
    if not flagged:
        return fail(what, "a retained message came without its mark: old looks like new", FIX_RETAIN)
    if not cleared:
        return fail(what, "a retained message stays when it is cleared: who left would seem up", FIX_RETAIN)
    return ok(what, "a late subscriber gets the record; once cleared, nobody does")


def will_result(after_s: float | None, cleared: bool) -> CheckResult:
    what = "last will"
    if after_s is None:
        return fail(what, "was not published when its client died", FIX_WILL)
    if not cleared:
        return fail(what, "was published, and the retained record is still there", FIX_WILL)
    return ok(what, f"clears a dead client's record after {1000 * after_s:.1f} ms")


def shared_subscription_result(sent: int, first: int, second: int) -> CheckResult:
    what = "shared"
    if first + second > sent:
        return fail(
            what, f"{sent} messages came {first + second} times: the group does not share", FIX_SHARED_SUBSCRIPTION
        )
    if first + second < sent:
        return fail(what, f"of {sent} messages to a group, {first + second} came", FIX_QUEUE)
    if not (first and second):
        return warn(
            what, f"all {sent} messages went to one of two: front doors will not scale", FIX_SHARED_SUBSCRIPTION
        )
    return ok(what, f"{sent} messages were dealt to two, {first} and {second}")


def changed_properties(sent: Properties, received: Properties) -> list[str]:
    """Return the names of the properties that did not come through; an expiry may have shrunk on the way."""
    names = {
        "Content Type": sent.content_type == received.content_type,
        "Correlation Data": sent.correlation_data == received.correlation_data,
        "Response Topic": sent.response_topic == received.response_topic,
        "user properties": sent.user_properties == received.user_properties,
        "Message Expiry": received.expiry_s is not None and 0 < received.expiry_s <= (sent.expiry_s or 0),
    }
    return [name for name, same in names.items() if not same]


def properties_result(lost: Sequence[str], check: str = "properties", fix: str = FIX_PROPERTIES) -> CheckResult:
    if not lost:
        return ok(check, "all come through as they were sent")
    return fail(check, f"lost or changed: {', '.join(lost)}", fix)


def largest_packet_result(announced_bytes: int, delivered: Mapping[int, bool]) -> CheckResult:
    """`tried` says of sizes of whole packets, rising, which came."""
    what = "largest"
    most = max((size for size, came in delivered.items() if came), default=0)
    first_lost = min((size for size, came in delivered.items() if not came), default=None)
    if first_lost is None:
        return ok(what, f"a packet of {format_bytes(most)} comes through")
    said = f"a packet of {format_bytes(first_lost)} is lost, one of {format_bytes(most)} comes"
    if announced_bytes >= CHUNK_PACKET_BYTES > most:
        return fail(
            what,
            f"{said}: senders go by what is announced, and send {format_bytes(CHUNK_PACKET_BYTES)}",
            FIX_PACKET_SIZE,
        )
    return warn(what, f"{said}: more was announced; whole frames at the ingress must be smaller", FIX_PACKET_SIZE)


def burst_result(sent: int, received: Sequence[int], chunk_bytes: int) -> CheckResult:
    """`came` are the numbers of the chunks that arrived at a reader that looked away meanwhile."""
    what = "burst"
    said = f"{sent} chunks of {format_bytes(chunk_bytes)}"
    if list(received) == list(range(sent)):
        return ok(what, f"{said} at QoS 0: all there, in order, for a reader that was busy")
    if len(received) < sent:
        return fail(what, f"of {said} at QoS 0 {len(received)} came: a large message would be lost", FIX_QUEUE)
    return fail(what, f"{said} at QoS 0 came out of order", "keep the order of a client's publications (MQTT 5.0, 4.6)")


def session_result(session_present: bool, sent: int, received: int, expiry_s: int | None) -> CheckResult:
    what = "session"
    need = 'an ingress with keep = "all" needs it'
    if not session_present:
        return warn(what, f"is forgotten when its client leaves; {need}", FIX_SESSION)
    if received < sent:
        return warn(
            what, f"of {sent} messages of QoS 1 to a client that was away {received} were kept; {need}", FIX_SESSION
        )
    if expiry_s is not None and expiry_s < SESSION_EXPIRY_S:
        return warn(what, f"is kept for {expiry_s} s only, {SESSION_EXPIRY_S} were asked for; {need}", FIX_SESSION)
    return ok(what, f"is kept for a client that is away, with all of {sent} messages of QoS 1")


def cut_results(sizes: Mapping[str, int], limit_bytes: int) -> Iterator[CheckResult]:
    """Yield whether what crosses each cut can be a message, and in how many chunks, where packets have a limit."""
    step = max(1, min(CHUNK_BYTES, limit_bytes - HEADER_RESERVE_BYTES))
    for what, size in sizes.items():
        said = f"{what}: {format_bytes(size)}"
        if size > MESSAGE_LIMIT_BYTES:
            mend = 'cut elsewhere, make smaller micro-batches, or set wire = "float16"'
            yield fail("cut", f"{said}, and a message has {format_bytes(MESSAGE_LIMIT_BYTES)} at most", mend)
        else:
            chunks = -(-size // step)
            yield ok("cut", f"{said}, in {chunks} chunk{'s' if chunks > 1 else ''}")


# Across a bridge: `way` is "device to cloud" ----------------------------------------------------------------------


def bridge_topics_fix(start: str, end: str) -> str:
    """Return what makes a message for `end` go there, by the words of the broker at `start`."""
    return (
        f"Mosquitto at {start}: topic sparse/{end}/+/+/in/+ out 0 and the rest of what `sparse broker config FILE "
        f"{start}` prints; see also what both brokers log"
    )


def bridge_result(direction: str, after_s: float | None, fix: str) -> CheckResult:
    what = "bridge"
    if after_s is None:
        return fail(what, f"{direction}: a message for the site behind it does not arrive", fix)
    return ok(what, f"{direction}: a message arrives after {1000 * after_s:.1f} ms")


def duplicates_result(direction: str, copies: int) -> CheckResult:
    """`copies` is how often the message that came most often came, at either broker."""
    what = "once"
    if copies > 1:
        return fail(
            what,
            f"{direction}: a message came {copies} times: the bridges make a loop, or there are two ways",
            "Mosquitto: one bridge between two sites, no topic line with `both`; `sparse broker config` prints them",
        )
    return ok(what, f"{direction}: each message comes once, at both brokers")


def bridge_properties_result(direction: str, lost: Sequence[str]) -> CheckResult:
    found = properties_result(
        lost, "properties", "Mosquitto: bridge_protocol_version mqttv50, in the bridge's connection"
    )
    return CheckResult(found.level, found.check, f"{direction}: {found.message}", found.fix)


def bridge_presence_result(direction: str, received: bool, end: str) -> CheckResult:
    what = "presence"
    if received:
        return ok(what, f"{direction}: a worker's retained record is there for a late subscriber")
    mend = f"Mosquitto: topic sparse/{end}/+/+/up/+ in 1 (out, where the bridge is kept by {end})"
    return fail(what, f"{direction}: a worker's record does not arrive: nobody would send to it", mend)


def bridge_will_result(direction: str, after_s: float | None, cleared: bool, end: str) -> CheckResult:
    what = "last will"
    if after_s is not None and cleared:
        return ok(what, f"{direction}: a dead worker's record is cleared after {1000 * after_s:.0f} ms")
    mend = f"Mosquitto: topic sparse/{end}/+/+/up/+ in 1, and retain_available true at both"
    return fail(what, f"{direction}: a dead worker's record stays: it would get work for a while", mend)


def bridge_chunk_result(direction: str, chunk_bytes: int, received: bool) -> CheckResult:
    what = "chunk"
    said = f"{direction}: a chunk of {format_bytes(chunk_bytes)}, as senders there make them,"
    return (
        ok(what, f"{said} arrives")
        if received
        else fail(what, f"{said} is lost", f"{FIX_PACKET_SIZE}; at both brokers")
    )
