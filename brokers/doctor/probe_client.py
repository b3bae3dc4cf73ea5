"""MQTT clients for the checks of a broker, and the results of checks: how they are printed, and the fixes they name.

The clients connect once, use their own topics, and leave nothing behind. They do not reconnect, so that every
disconnection is seen. However the checks end, retained messages are cleared and sessions ended; what a killed process
could not remove expires within a minute.

"FAIL" stops a pipeline or loses its messages; "warn" matters to some pipelines. Fixes are lines of mosquitto.conf where
there are any, and a description for other brokers.
"""

import asyncio
import secrets
import socket
import ssl
import textwrap
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Literal, NamedTuple

from brokers.dispatch.channel import HEADER_RESERVE_BYTES
from brokers.errors import BrokerUnreachable
from brokers.mqtt.client import resolve_identity
from brokers.mqtt.connection import Connection, ConnectOptions, open_connection
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES, PublishHeader
from brokers.mqtt.socket_connect import OperationRefused, TlsConfig
from brokers.mqtt.socket_loop import ConnectionLost
from brokers.protocol.broker_url import BrokerAddress
from brokers.protocol.chunking import CHUNK_BYTES
from brokers.protocol.topics import doctor_topic
from brokers.protocol.transport import Properties, Will

CheckLevel = Literal["ok", "warn", "FAIL"]

LINE_WIDTH = 80  # of a terminal that was never resized
_LEVEL_WIDTH = 6
_CHECK_WIDTH = 13

CHUNK_PACKET_BYTES = CHUNK_BYTES + HEADER_RESERVE_BYTES
FIX_PACKET_SIZE = f"Mosquitto: max_packet_size {MAX_REMAINING_BYTES}; else: allow packets of {CHUNK_PACKET_BYTES} bytes"
FIX_QOS = "Mosquitto: max_qos 2; else: allow QoS 1"
FIX_RETAIN = "Mosquitto: retain_available true; else: allow retained messages"
FIX_SHARED_SUBSCRIPTION = "Mosquitto has them by default; else: enable shared subscriptions"


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check; `fix` says what to change, and is empty only if the result is ok."""

    level: CheckLevel
    check: str
    message: str
    fix: str = ""
    broker: str = ""  # address of the broker, for `--json` with two brokers

    def to_lines(self) -> list[str]:
        """The result in lines of at most 80 characters, the fix last."""
        indent = " " * (_LEVEL_WIDTH + _CHECK_WIDTH)
        head = f"{self.level:<{_LEVEL_WIDTH}}{self.check:<{_CHECK_WIDTH}}"
        lines = _wrap(self.message, head, indent)
        return lines + _wrap(self.fix, f"{indent}-> ", f"{indent}   ") if self.fix else lines


ok = partial(CheckResult, "ok")
warn = partial(CheckResult, "warn")
fail = partial(CheckResult, "FAIL")


def is_usable(results: Iterable[CheckResult]) -> bool:
    """Whether no check failed; warnings do not count."""
    return all(result.level != "FAIL" for result in results)


def format_bytes(count: int) -> str:
    """A size: in KiB or MiB if that is exact, else in bytes."""
    for unit, size in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size and count % size == 0:
            return f"{count // size} {unit}"
    return f"{count:,} bytes"


def _wrap(text: str, first: str, rest: str) -> list[str]:
    lines = textwrap.wrap(
        text, LINE_WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=True, break_on_hyphens=False
    )
    return lines or [first.rstrip()]


CONNECT_TIMEOUT_S = 10.0
RECEIVE_TIMEOUT_S = 3.0  # for a message that should arrive at once
CLEANUP_EXPIRY_S = 60  # of retained messages and sessions, in case this process is killed
_CLEANUP_TIMEOUT_S = 5.0
# While cleaning up at a broker that may be gone: what cannot be removed expires.
_IGNORED_ERRORS = (OSError, ConnectionLost, BrokerUnreachable, OperationRefused)


class ReceivedPublish(NamedTuple):
    """A message that a probe client received."""

    header: PublishHeader
    payload: memoryview


class ProbeClient(Connection):
    """A connection that queues what it receives; methods raise `ConnectionLost` once it has ended.

    `tls_info` is the TLS version, and the end of the broker's certificate.
    """

    def __init__(self, sock: socket.socket, options: ConnectOptions) -> None:
        self._received: asyncio.Queue[ReceivedPublish | None] = asyncio.Queue()  # None: disconnected
        super().__init__(sock, options, lambda _: None, self._on_received, lambda _: None)
        self.lost.add_done_callback(lambda _: self._received.put_nowait(None))
        self.tls_info: tuple[str, datetime | None] | None = None
        if isinstance(sock, ssl.SSLSocket):
            not_after = (sock.getpeercert() or {}).get("notAfter")
            expires_s = ssl.cert_time_to_seconds(not_after) if isinstance(not_after, str) else None
            expires = None if expires_s is None else datetime.fromtimestamp(expires_s, UTC)
            self.tls_info = (sock.version() or "TLS", expires)

    def _on_received(self, header: PublishHeader, payload: memoryview) -> bool:
        self._received.put_nowait(ReceivedPublish(header, payload))
        return True

    async def receive(self, timeout_s: float = RECEIVE_TIMEOUT_S) -> ReceivedPublish | None:
        """The next message; None after a time-out."""
        try:
            async with asyncio.timeout(timeout_s):
                message = await self._received.get()
        except TimeoutError:
            return None
        if message is None:
            self._received.put_nowait(None)
            raise ConnectionLost(self.lost.result())
        return message

    async def receive_all(self, count: int, timeout_s: float = RECEIVE_TIMEOUT_S) -> list[ReceivedPublish]:
        """The next `count` messages; fewer if none arrives for `timeout_s`."""
        messages: list[ReceivedPublish] = []
        while len(messages) < count and (message := await self.receive(timeout_s)) is not None:
            messages.append(message)
        return messages


@dataclass(eq=False)
class BrokerProbe:
    """All clients, topics and sessions of the checks at one broker; `site` is only known if a bridge is checked."""

    address: BrokerAddress
    tls: TlsConfig = TlsConfig()
    site: str = ""
    name: str = field(default_factory=lambda: f"doctor-{secrets.token_hex(4)}")  # a site that no bridge forwards
    qos: int = 1  # the highest that the broker supports, of 0 and 1
    _retained: set[str] = field(default_factory=set)
    _sessions: set[str] = field(default_factory=set)

    def topic(self, *levels: str) -> str:
        """A topic that no other client uses."""
        return doctor_topic(self.name, *levels)

    @asynccontextmanager
    async def client(
        self, *, will: Will | None = None, session: str = "", session_expiry_s: int = CLEANUP_EXPIRY_S
    ) -> AsyncIterator[ProbeClient]:
        """A new client, or the one of a session; raises `BrokerUnreachable`."""
        if session:
            self._sessions.add(session)
        client_id = session or f"{self.name}-{secrets.token_hex(4)}"
        options = ConnectOptions(self.address, self.tls, client_id, will, session_expiry_s if session else 0)
        client = await open_connection(options, lambda sock: ProbeClient(sock, options), CONNECT_TIMEOUT_S)
        try:
            yield client
        finally:
            await client.close()

    def clear_on_exit(self, topic: str) -> None:
        self._retained.add(topic)

    async def publish_record(self, client: ProbeClient, topic: str) -> None:
        """Publish a retained message, to be cleared at the end."""
        self.clear_on_exit(topic)
        await client.publish(topic, b"record", Properties(expiry_s=CLEANUP_EXPIRY_S), qos=self.qos, retain=True)

    async def clean_up(self) -> None:
        """Clear all retained messages, and end all sessions."""
        with suppress(*_IGNORED_ERRORS):
            if self._retained:
                async with self.client() as client:
                    for topic in self._retained:
                        await client.publish(topic, qos=self.qos, retain=True)
        for session in self._sessions:
            with suppress(*_IGNORED_ERRORS):
                async with self.client(session=session, session_expiry_s=0):
                    pass  # the session ends with this connection


@asynccontextmanager
async def open_probe(address: str, site: str = "") -> AsyncIterator[BrokerProbe]:
    """A probe with the identity of this process, which is cleaned up at the end.

    Raises `UsageError` for a bad address or identity.
    """
    probe = BrokerProbe(*resolve_identity(address), site)
    try:
        yield probe
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLEANUP_TIMEOUT_S):
                await probe.clean_up()
