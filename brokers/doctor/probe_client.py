"""MQTT clients for the checks of a broker: they connect once, use topics of their own, and leave nothing behind.

They do not reconnect, so that every disconnection is seen. However the checks end, retained messages are cleared and
sessions ended; what a killed process could not remove expires within a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from brokers.errors import BrokerUnreachable
from brokers.mqtt.client_identity import resolve_identity
from brokers.mqtt.connect_errors import OperationRefused
from brokers.mqtt.connection import Connection, ConnectOptions
from brokers.mqtt.publish_packet import PublishHeader
from brokers.mqtt.socket_connect import TlsConfig, connect_socket
from brokers.mqtt.socket_loop import ConnectionLost
from brokers.protocol.broker_url import BrokerAddress
from brokers.protocol.topics import doctor_topic
from brokers.protocol.transport import BrokerLimits, Buffer, Properties, Will

CONNECT_TIMEOUT_S = 10.0
RECEIVE_TIMEOUT_S = 3.0  # for a message that should arrive at once
CLEANUP_EXPIRY_S = 60  # of retained messages and sessions, in case this process is killed
_CLEANUP_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ReceivedPublish:
    """A message that a probe client received."""

    topic: str
    properties: Properties
    payload: memoryview
    qos: int
    retain: bool


@dataclass(eq=False)
class ProbeClient:
    """One connected client; methods raise `ConnectionLost` once it is disconnected, and `OperationRefused`."""

    connection: Connection
    tls_info: tuple[str, datetime | None] | None  # TLS version, and the end of the broker's certificate
    _received: asyncio.Queue[ReceivedPublish | None]  # None: disconnected

    @property
    def limits(self) -> BrokerLimits:
        return self.connection.limits

    @property
    def session_present(self) -> bool:
        """Whether the broker had kept the session."""
        return self.connection.session_present

    async def subscribe(self, topic_filter: str, qos: int = 0) -> None:
        await self.connection.subscribe(topic_filter, qos)

    async def publish(
        self,
        topic: str,
        payload: Buffer = b"",
        properties: Properties = Properties(),
        *,
        qos: int = 0,
        retain: bool = False,
    ) -> None:
        buffers = (memoryview(payload),) if len(payload) else ()
        await self.connection.publish(topic, buffers, properties, qos=qos, retain=retain)

    async def receive(self, timeout_s: float = RECEIVE_TIMEOUT_S) -> ReceivedPublish | None:
        """The next message; None if there is none in time."""
        try:
            async with asyncio.timeout(timeout_s):
                message = await self._received.get()
        except TimeoutError:
            return None
        if message is None:
            self._received.put_nowait(None)
            raise ConnectionLost(self.connection.lost.result())
        return message

    async def receive_all(self, count: int, timeout_s: float = RECEIVE_TIMEOUT_S) -> list[ReceivedPublish]:
        """The next `count` messages; fewer if none arrives for `timeout_s`."""
        messages: list[ReceivedPublish] = []
        while len(messages) < count and (message := await self.receive(timeout_s)) is not None:
            messages.append(message)
        return messages

    def set_reading_paused(self, paused: bool) -> None:
        """Stop reading from the socket, as a busy process does, or continue."""
        self.connection.set_reading_paused(paused)

    async def abort(self) -> None:
        """Close the connection without DISCONNECT: the broker publishes the will."""
        await self.connection.abort("aborted")


@dataclass(eq=False)
class BrokerProbe:
    """All clients, topics and sessions of the checks at one broker; an async context manager that removes them."""

    address: BrokerAddress
    tls: TlsConfig = TlsConfig()
    name: str = field(default_factory=lambda: f"doctor-{secrets.token_hex(4)}")  # a site that no bridge forwards
    qos: int = 1  # the highest that the broker supports, of 0 and 1
    _retained: set[str] = field(default_factory=set)
    _sessions: set[str] = field(default_factory=set)

    @classmethod
    def from_address(cls, address: str) -> BrokerProbe:
        """A probe with the identity of this process; raises `UsageError` for a bad address or identity."""
        return cls(*resolve_identity(address))

    def topic(self, *levels: str) -> str:
        """A topic that no other client uses."""
        return doctor_topic(self.name, *levels)

    @contextlib.asynccontextmanager
    async def client(
        self, *, will: Will | None = None, session: str = "", session_expiry_s: int = CLEANUP_EXPIRY_S
    ) -> AsyncIterator[ProbeClient]:
        """A new client, or the one of a session; raises `BrokerUnreachable`."""
        if session:
            self._sessions.add(session)
        client = await self._connect(will, session, session_expiry_s if session else 0)
        try:
            yield client
        finally:
            await client.connection.close()

    def clear_on_exit(self, topic: str) -> None:
        """Clear the retained message of this topic at the end."""
        self._retained.add(topic)

    async def publish_retained(self, client: ProbeClient, topic: str, payload: bytes) -> None:
        """Publish a retained message, to be cleared at the end."""
        self.clear_on_exit(topic)
        await client.publish(topic, payload, Properties(expiry_s=CLEANUP_EXPIRY_S), qos=self.qos, retain=True)

    async def _connect(self, will: Will | None, session: str, session_expiry_s: int) -> ProbeClient:
        connection: Connection | None = None
        received: asyncio.Queue[ReceivedPublish | None] = asyncio.Queue()

        def on_publish(header: PublishHeader, payload: memoryview) -> bool:
            received.put_nowait(ReceivedPublish(header.topic, header.properties, payload, header.qos, header.retain))
            return True

        client_id = session or f"{self.name}-{secrets.token_hex(4)}"
        options = ConnectOptions(client_id, will, session_expiry_s)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                sock = await connect_socket(self.address, self.tls)
                tls_info = _tls_info(sock) if isinstance(sock, ssl.SSLSocket) else None
                connection = Connection(sock, self.address, options, lambda _: None, on_publish, lambda _, __: None)
                await connection.start()
        except BaseException as error:
            if connection is not None:
                await connection.abort("not connected")
            if isinstance(error, TimeoutError):
                raise BrokerUnreachable(str(self.address), f"no answer within {CONNECT_TIMEOUT_S:g} s") from error
            raise
        connection.lost.add_done_callback(lambda _: received.put_nowait(None))
        return ProbeClient(connection, tls_info, received)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLEANUP_TIMEOUT_S):
                await self._clean_up()

    async def _clean_up(self) -> None:
        with _ignore_broker_errors():
            if self._retained:
                async with self.client() as client:
                    for topic in self._retained:
                        await client.publish(topic, qos=self.qos, retain=True)
        for session in self._sessions:
            with _ignore_broker_errors():
                client = await self._connect(None, session, 0)  # the session ends with this connection
                await client.connection.close()


@contextlib.contextmanager
def _ignore_broker_errors() -> Iterator[None]:
    """For cleaning up at a broker that may be gone: what cannot be removed expires."""
    with contextlib.suppress(OSError, ConnectionLost, BrokerUnreachable, OperationRefused):
        yield


def _tls_info(sock: ssl.SSLSocket) -> tuple[str, datetime | None]:
    """The TLS version, and the end of the broker's certificate."""
    not_after = (sock.getpeercert() or {}).get("notAfter")
    expires = datetime.fromtimestamp(ssl.cert_time_to_seconds(not_after), UTC) if isinstance(not_after, str) else None
    return sock.version() or "TLS", expires
