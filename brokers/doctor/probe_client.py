"""A visit to a broker: clients that connect once, under topics of their own, and what they leave is taken away.

No reconnection hides what the broker does, and nothing outlives the visit, however it ends: retained messages are
cleared and sessions ended, and what a killed process could not clear expires within a minute.
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
RECEIVE_TIMEOUT_S = 3.0  # for what should come at once
CLEANUP_EXPIRY_S = 60  # of retained messages and sessions, should this process be killed
_CLEAN_S = 5.0


@dataclass(frozen=True, slots=True)
class ReceivedPublish:
    """A publication that came to a visitor."""

    topic: str
    properties: Properties
    payload: memoryview
    qos: int
    retain: bool


@dataclass(eq=False)
class ProbeClient:
    """One client. Its calls raise `ConnectionLost` as soon as the broker has ended the connection, and `OperationRefused`."""

    connection: Connection
    tls_info: tuple[str, datetime | None] | None  # the version of TLS, and when the broker's certificate ends
    _heard: asyncio.Queue[ReceivedPublish | None]

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
        pieces = (memoryview(payload),) if len(payload) else ()
        await self.connection.publish(topic, pieces, properties, qos=qos, retain=retain)

    async def receive(self, timeout_s: float = RECEIVE_TIMEOUT_S) -> ReceivedPublish | None:
        """Return the next publication; None when there is none in time."""
        try:
            async with asyncio.timeout(timeout_s):
                heard = await self._heard.get()
        except TimeoutError:
            return None
        if heard is None:
            self._heard.put_nowait(None)
            raise ConnectionLost(self.connection.lost.result())
        return heard

    async def receive_all(self, count: int, timeout_s: float = RECEIVE_TIMEOUT_S) -> list[ReceivedPublish]:
        """Return the next ones, fewer when a pause of `within_s` comes first."""
        found: list[ReceivedPublish] = []
        while len(found) < count and (heard := await self.receive(timeout_s)) is not None:
            found.append(heard)
        return found

    def set_reading_paused(self, paused: bool) -> None:
        """Read nothing from now on, as a busy process does; or read on."""
        self.connection.set_reading_paused(paused)

    async def abort(self) -> None:
        """Break the connection with no goodbye: the broker publishes the will."""
        await self.connection.abort("it vanished")


@dataclass(eq=False)
class BrokerProbe:
    """All that one examination does at one broker. Use it as an async context manager: its end takes all away."""

    address: BrokerAddress
    tls: TlsConfig = TlsConfig()
    name: str = field(default_factory=lambda: f"doctor-{secrets.token_hex(4)}")  # a site that no bridge carries
    qos: int = 1  # the highest that the broker takes of those that we use
    _retained: set[str] = field(default_factory=set)
    _sessions: set[str] = field(default_factory=set)

    @classmethod
    def from_address(cls, address: str) -> BrokerProbe:
        """A visit with the identity of this process; raise `BadAddress`, or what is wrong with that identity."""
        return cls(*resolve_identity(address))

    def topic(self, *levels: str) -> str:
        """A topic that nobody else reads or writes."""
        return doctor_topic(self.name, *levels)

    @contextlib.asynccontextmanager
    async def client(
        self, *, will: Will | None = None, session: str = "", session_expiry_s: int = CLEANUP_EXPIRY_S
    ) -> AsyncIterator[ProbeClient]:
        """A client of any name, or the one of a session; raise `BrokerUnreachable`."""
        if session:
            self._sessions.add(session)
        found = await self._enter(will, session, session_expiry_s if session else 0)
        try:
            yield found
        finally:
            await found.connection.close()

    def clear_on_exit(self, topic: str) -> None:
        """Have no retained message left on this topic when the visit is over."""
        self._retained.add(topic)

    async def publish_retained(self, client: ProbeClient, topic: str, payload: bytes) -> None:
        """Publish a retained message that is gone when the visit is over."""
        self.clear_on_exit(topic)
        await client.publish(topic, payload, Properties(expiry_s=CLEANUP_EXPIRY_S), qos=self.qos, retain=True)

    async def _enter(self, will: Will | None, session: str, session_expiry_s: int) -> ProbeClient:
        connection: Connection | None = None
        heard: asyncio.Queue[ReceivedPublish | None] = asyncio.Queue()

        def published(head: PublishHeader, payload: memoryview) -> bool:
            heard.put_nowait(ReceivedPublish(head.topic, head.properties, payload, head.qos, head.retain))
            return True

        client_id = session or f"{self.name}-{secrets.token_hex(4)}"
        greeting = ConnectOptions(client_id, will, session_expiry_s)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                sock = await connect_socket(self.address, self.tls)
                secured = _secured(sock) if isinstance(sock, ssl.SSLSocket) else None
                connection = Connection(sock, self.address, greeting, lambda _: None, published, lambda _, __: None)
                await connection.start()
        except BaseException as error:
            if connection is not None:
                await connection.abort("given up")
            if isinstance(error, TimeoutError):
                raise BrokerUnreachable(str(self.address), f"no answer within {CONNECT_TIMEOUT_S:g} s") from error
            raise
        connection.lost.add_done_callback(lambda _: heard.put_nowait(None))
        return ProbeClient(connection, secured, heard)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLEAN_S):
                await self._clean()

    async def _clean(self) -> None:
        with _nothing_more_to_do():
            if self._retained:
                async with self.client() as cleaner:
                    for topic in self._retained:
                        await cleaner.publish(topic, qos=self.qos, retain=True)
        for session in self._sessions:
            with _nothing_more_to_do():
                connection = (await self._enter(None, session, 0)).connection  # begins anew, and ends with its goodbye
                await connection.close()


@contextlib.contextmanager
def _nothing_more_to_do() -> Iterator[None]:
    """A broker that has gone, or no longer lets us in: what we left expires."""
    with contextlib.suppress(OSError, ConnectionLost, BrokerUnreachable, OperationRefused):
        yield


def _secured(sock: ssl.SSLSocket) -> tuple[str, datetime | None]:
    ends = (sock.getpeercert() or {}).get("notAfter")
    until = datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC) if isinstance(ends, str) else None
    return sock.version() or "TLS", until
