"""What an examination of a broker means for Sparse: from what was seen to a finding, and what mends it. Pure.

`FAIL` is what stops a pipeline or loses its messages, `warn` what only some need. Each mends by a line of
mosquitto.conf where there is one, and in words for other brokers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta

from brokers.dispatch.channel import HEAD_ROOM_BYTES
from brokers.doctor.check_result import Finding, fail, in_bytes, ok, warn
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES
from brokers.protocol.chunking import CHUNK_BYTES, MESSAGE_LIMIT_BYTES
from brokers.protocol.transport import Limits, Properties

SMALLEST_PACKET_BYTES = (64 << 10) + HEAD_ROOM_BYTES  # docs/operations.md promises to work from here on
USUAL_PACKET_BYTES = CHUNK_BYTES + HEAD_ROOM_BYTES
SESSION_S = 24 * 3600  # what an ingress asks for, with keep = "all"
FEW_IN_FLIGHT = 10
_KEEPALIVE_S = 5  # a client of ours is heard of every 2 s
_SOON = timedelta(days=30)

ACCESS = "let this client read and write sparse/# (Mosquitto: in its acl_file)"
PACKETS = f"Mosquitto: max_packet_size {MAX_REMAINING_BYTES}; else: allow packets of {USUAL_PACKET_BYTES} bytes"
LOGS = "the broker's log says why: Mosquitto with `log_type all`"
QUEUE = "Mosquitto: max_queued_messages 1000; else: a longer queue for each client"
QOS = "Mosquitto: max_qos 2; else: allow QoS 1"
RETAIN = "Mosquitto: retain_available true; else: allow retained messages"
MQTT_5 = (
    "Mosquitto 2.0 or later speaks MQTT 5 on every listener; the embedded broker has a port of its own for it; "
    "else: enable MQTT 5"
)
PASSWORD = (
    "name a user it knows, mqtts://USER@HOST:PORT, and a file with the password in SPARSE_PASSWORD_FILE; or, where "
    "only friends reach it, let anybody in (Mosquitto: allow_anonymous true)"
)
SHARED = "Mosquitto has them, on by itself; else: enable shared subscriptions"
KEPT = "Mosquitto: no persistent_client_expiration, max_queued_messages 1000; else: let sessions last for 24 h"
WILL = "Mosquitto publishes them, where its acl_file lets the client write there; else: allow last wills"
PROPERTIES = "pass on the properties of MQTT 5 unchanged: no gateway or plugin in between that speaks 3.1.1"


def unreachable(address: str, reason: str, secured: bool) -> Finding:
    """Where no broker of any version let us in; `secured`: it is TLS that failed."""
    if secured:
        return fail(
            "TLS", f"{address}: {reason}", "Mosquitto: certfile and keyfile, of an authority that clients trust"
        )
    return fail(
        "reachable",
        f"no MQTT broker lets us in at {address}: {reason}",
        "`sparse broker` starts one; or another address",
    )


def announced(limits: Limits) -> Iterator[Finding]:
    """Yield what the CONNACK says, before anything is tried."""
    yield packet_limit(limits.max_packet_bytes)
    few = limits.receive_maximum < FEW_IN_FLIGHT
    said = f"{limits.receive_maximum:,} publications of QoS 1 on the way at once (Receive Maximum)"
    yield (
        warn("in flight", f"only {said}", "Mosquitto: max_inflight_messages 100; else: a larger Receive Maximum")
        if few
        else ok("in flight", said)
    )
    if limits.max_qos < 1:
        yield fail("QoS", "only QoS 0: presence, results and tasks need QoS 1", QOS)
    if not limits.retain:
        yield fail("retained", "it takes no retained messages: nobody would know who is up", RETAIN)
    if not limits.wildcards:
        yield fail("wildcards", "no wildcard subscriptions: nobody would find workers", "enable wildcard subscriptions")
    if not limits.shared:
        yield fail("shared", "no shared subscriptions: workers need one for their stage's front door", SHARED)
    if limits.keepalive_s is not None and limits.keepalive_s < _KEEPALIVE_S:
        yield warn(
            "keep-alive",
            f"it ends clients that it has not heard of for {1.5 * limits.keepalive_s:g} s; ours speak every 2 s",
            "Mosquitto: max_keepalive 60; else: a longer Server Keep Alive",
        )


def packet_limit(limit_bytes: int) -> Finding:
    what = "packet size"
    if limit_bytes >= MAX_REMAINING_BYTES:
        return ok(what, "no limit but MQTT's own is announced")
    said = f"{in_bytes(limit_bytes)} at most (Maximum Packet Size)"
    if limit_bytes < SMALLEST_PACKET_BYTES:
        return fail(what, f"{said}, {in_bytes(SMALLEST_PACKET_BYTES)} are needed", PACKETS)
    if limit_bytes < USUAL_PACKET_BYTES:
        across = f"clients here cut smaller chunks; one across a bridge cannot know, and sends {USUAL_PACKET_BYTES:,}"
        return warn(what, f"{said}: {across}", PACKETS)
    return ok(what, said)


def tls(version: str | None, ends: datetime | None, now: datetime, local: bool) -> Finding:
    """`version` is None where there is no TLS; `local` says that no network lies between."""
    what = "TLS"
    if version is None and local:
        return ok(what, "none, and none needed: the broker is on this machine")
    if version is None:
        return warn(
            what,
            "none: whoever is on the way reads all, and may write",
            "Mosquitto: cafile, certfile and keyfile in its listener; then mqtts://HOST:8883",
        )
    if ends is None:
        return ok(what, version)
    said = f"{version}, certificate until {ends:%Y-%m-%d}"
    if ends - now < _SOON:
        return warn(what, f"{said}: soon", "a new certificate, at the paths that certfile and keyfile name")
    return ok(what, said)


def delivery(qos0: bool, qos1: bool | None) -> Finding:
    """`qos1` is None where it was not tried."""
    what = "publish"
    if not qos0:
        return fail(what, "a publication of QoS 0 did not reach its subscriber", ACCESS)
    if qos1 is None:
        return ok(what, "QoS 0 arrives; QoS 1 was not tried")
    return ok(what, "QoS 0 and 1 arrive") if qos1 else fail(what, "QoS 1 does not arrive as such", QOS)


def retained(came: bool, flagged: bool, cleared: bool) -> Finding:
    what = "retained"
    if not came:
        return fail(what, "a retained message did not reach a late subscriber", RETAIN)
    if not flagged:
        return fail(what, "a retained message came without its mark: old looks like new", RETAIN)
    if not cleared:
        return fail(what, "a retained message stays when it is cleared: who left would seem up", RETAIN)
    return ok(what, "a late subscriber gets the record; once cleared, nobody does")


def will(after_s: float | None, gone: bool) -> Finding:
    what = "last will"
    if after_s is None:
        return fail(what, "was not published when its client died", WILL)
    if not gone:
        return fail(what, "was published, and the retained record is still there", WILL)
    return ok(what, f"clears a dead client's record after {1000 * after_s:.1f} ms")


def shared(sent: int, first: int, second: int) -> Finding:
    what = "shared"
    if first + second > sent:
        return fail(what, f"{sent} messages came {first + second} times: the group does not share", SHARED)
    if first + second < sent:
        return fail(what, f"of {sent} messages to a group, {first + second} came", QUEUE)
    if not (first and second):
        return warn(what, f"all {sent} messages went to one of two: front doors will not scale", SHARED)
    return ok(what, f"{sent} messages were dealt to two, {first} and {second}")


def differences(sent: Properties, came: Properties) -> list[str]:
    """Return the names of the properties that did not come through; an expiry may have shrunk on the way."""
    names = {
        "Content Type": sent.content_type == came.content_type,
        "Correlation Data": sent.correlation == came.correlation,
        "Response Topic": sent.response_topic == came.response_topic,
        "user properties": sent.user == came.user,
        "Message Expiry": came.expiry_s is not None and 0 < came.expiry_s <= (sent.expiry_s or 0),
    }
    return [name for name, same in names.items() if not same]


def properties(lost: Sequence[str], what: str = "properties", mend: str = PROPERTIES) -> Finding:
    if not lost:
        return ok(what, "all come through as they were sent")
    return fail(what, f"lost or changed: {', '.join(lost)}", mend)


def largest(announced_bytes: int, tried: Mapping[int, bool]) -> Finding:
    """`tried` says of sizes of whole packets, rising, which came."""
    what = "largest"
    most = max((size for size, came in tried.items() if came), default=0)
    first_lost = min((size for size, came in tried.items() if not came), default=None)
    if first_lost is None:
        return ok(what, f"a packet of {in_bytes(most)} comes through")
    said = f"a packet of {in_bytes(first_lost)} is lost, one of {in_bytes(most)} comes"
    if announced_bytes >= USUAL_PACKET_BYTES > most:
        return fail(what, f"{said}: senders go by what is announced, and send {in_bytes(USUAL_PACKET_BYTES)}", PACKETS)
    return warn(what, f"{said}: more was announced; whole frames at the ingress must be smaller", PACKETS)


def burst(sent: int, came: Sequence[int], chunk_bytes: int) -> Finding:
    """`came` are the numbers of the chunks that arrived at a reader that looked away meanwhile."""
    what = "burst"
    said = f"{sent} chunks of {in_bytes(chunk_bytes)}"
    if list(came) == list(range(sent)):
        return ok(what, f"{said} at QoS 0: all there, in order, for a reader that was busy")
    if len(came) < sent:
        return fail(what, f"of {said} at QoS 0 {len(came)} came: a large message would be lost", QUEUE)
    return fail(what, f"{said} at QoS 0 came out of order", "keep the order of a client's publications (MQTT 5.0, 4.6)")


def session(resumed: bool, sent: int, came: int, lasts_s: int | None) -> Finding:
    what = "session"
    need = 'an ingress with keep = "all" needs it'
    if not resumed:
        return warn(what, f"is forgotten when its client leaves; {need}", KEPT)
    if came < sent:
        return warn(what, f"of {sent} messages of QoS 1 to a client that was away {came} were kept; {need}", KEPT)
    if lasts_s is not None and lasts_s < SESSION_S:
        return warn(what, f"is kept for {lasts_s} s only, {SESSION_S} were asked for; {need}", KEPT)
    return ok(what, f"is kept for a client that is away, with all of {sent} messages of QoS 1")


def cuts(sizes: Mapping[str, int], limit_bytes: int) -> Iterator[Finding]:
    """Yield whether what crosses each cut can be a message, and in how many chunks, where packets have a limit."""
    step = max(1, min(CHUNK_BYTES, limit_bytes - HEAD_ROOM_BYTES))
    for what, size in sizes.items():
        said = f"{what}: {in_bytes(size)}"
        if size > MESSAGE_LIMIT_BYTES:
            mend = 'cut elsewhere, make smaller micro-batches, or set wire = "float16"'
            yield fail("cut", f"{said}, and a message has {in_bytes(MESSAGE_LIMIT_BYTES)} at most", mend)
        else:
            chunks = -(-size // step)
            yield ok("cut", f"{said}, in {chunks} chunk{'s' if chunks > 1 else ''}")


# Across a bridge: `way` is "device to cloud" ----------------------------------------------------------------------


def bridge_rules(start: str, end: str) -> str:
    """Return what makes a message for `end` go there, by the words of the broker at `start`."""
    return (
        f"Mosquitto at {start}: topic sparse/{end}/+/+/in/+ out 0 and the rest of what `sparse broker config FILE "
        f"{start}` prints; see also what both brokers log"
    )


def bridged(way: str, after_s: float | None, mend: str) -> Finding:
    what = "bridge"
    if after_s is None:
        return fail(what, f"{way}: a message for the site behind it does not arrive", mend)
    return ok(what, f"{way}: a message arrives after {1000 * after_s:.1f} ms")


def once(way: str, copies: int) -> Finding:
    """`copies` is how often the message that came most often came, at either broker."""
    what = "once"
    if copies > 1:
        return fail(
            what,
            f"{way}: a message came {copies} times: the bridges make a loop, or there are two ways",
            "Mosquitto: one bridge between two sites, no topic line with `both`; `sparse broker config` prints them",
        )
    return ok(what, f"{way}: each message comes once, at both brokers")


def properties_across(way: str, lost: Sequence[str]) -> Finding:
    found = properties(lost, "properties", "Mosquitto: bridge_protocol_version mqttv50, in the bridge's connection")
    return Finding(found.level, found.what, f"{way}: {found.said}", found.mend)


def births(way: str, came: bool, end: str) -> Finding:
    what = "presence"
    if came:
        return ok(what, f"{way}: a worker's retained record is there for a late subscriber")
    mend = f"Mosquitto: topic sparse/{end}/+/+/up/+ in 1 (out, where the bridge is kept by {end})"
    return fail(what, f"{way}: a worker's record does not arrive: nobody would send to it", mend)


def will_across(way: str, after_s: float | None, gone: bool, end: str) -> Finding:
    what = "last will"
    if after_s is not None and gone:
        return ok(what, f"{way}: a dead worker's record is cleared after {1000 * after_s:.0f} ms")
    mend = f"Mosquitto: topic sparse/{end}/+/+/up/+ in 1, and retain_available true at both"
    return fail(what, f"{way}: a dead worker's record stays: it would get work for a while", mend)


def chunk_across(way: str, chunk_bytes: int, came: bool) -> Finding:
    what = "chunk"
    said = f"{way}: a chunk of {in_bytes(chunk_bytes)}, as senders there make them,"
    return ok(what, f"{said} arrives") if came else fail(what, f"{said} is lost", f"{PACKETS}; at both brokers")
