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
from brokers.mqtt.client_identity import identity_at
from brokers.mqtt.connect_errors import Refused
from brokers.mqtt.connection import Connection, Greeting
from brokers.mqtt.publish_packet import PublishHead
from brokers.mqtt.socket_connect import Tls, dial
from brokers.mqtt.socket_loop import ConnectionLost
from brokers.protocol.broker_url import BrokerAddress
from brokers.protocol.topics import examined
from brokers.protocol.transport import Buffer, Limits, Properties, Will

CONNECT_S = 10.0
HEAR_S = 3.0  # for what should come at once
EXPIRY_S = 60  # of retained messages and sessions, should this process be killed
_CLEAN_S = 5.0
_KEEPALIVE_S = 20
_RECEIVE_MAXIMUM = 64
_MAX_PACKET_BYTES = (256 << 20) - 1


@dataclass(frozen=True, slots=True)
class Heard:
    """A publication that came to a visitor."""

    topic: str
    properties: Properties
    payload: memoryview
    qos: int
    retain: bool


@dataclass(eq=False)
class Visitor:
    """One client. Its calls raise `ConnectionLost` as soon as the broker has ended the connection, and `Refused`."""

    connection: Connection
    secured: tuple[str, datetime | None] | None  # the version of TLS, and when the broker's certificate ends
    _heard: asyncio.Queue[Heard | None]

    @property
    def limits(self) -> Limits:
        return self.connection.limits

    @property
    def resumed(self) -> bool:
        """Whether the broker had kept the session."""
        return self.connection.resumed

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

    async def hear(self, within_s: float = HEAR_S) -> Heard | None:
        """Return the next publication; None when there is none in time."""
        try:
            async with asyncio.timeout(within_s):
                heard = await self._heard.get()
        except TimeoutError:
            return None
        if heard is None:
            self._heard.put_nowait(None)
            raise ConnectionLost(self.connection.lost.result())
        return heard

    async def hear_all(self, count: int, within_s: float = HEAR_S) -> list[Heard]:
        """Return the next ones, fewer when a pause of `within_s` comes first."""
        found: list[Heard] = []
        while len(found) < count and (heard := await self.hear(within_s)) is not None:
            found.append(heard)
        return found

    def look_away(self, away: bool) -> None:
        """Read nothing from now on, as a busy process does; or read on."""
        self.connection.hold(away)

    async def vanish(self) -> None:
        """Break the connection with no goodbye: the broker publishes the will."""
        await self.connection.abort("it vanished")


@dataclass(eq=False)
class Visit:
    """All that one examination does at one broker. Use it as an async context manager: its end takes all away."""

    address: BrokerAddress
    tls: Tls = Tls()
    name: str = field(default_factory=lambda: f"doctor-{secrets.token_hex(4)}")  # a site that no bridge carries
    qos: int = 1  # the highest that the broker takes of those that we use
    _retained: set[str] = field(default_factory=set)
    _sessions: set[str] = field(default_factory=set)

    @classmethod
    def to(cls, address: str) -> Visit:
        """A visit with the identity of this process; raise `BadAddress`, or what is wrong with that identity."""
        return cls(*identity_at(address))

    def topic(self, *levels: str) -> str:
        """A topic that nobody else reads or writes."""
        return examined(self.name, *levels)

    @contextlib.asynccontextmanager
    async def visitor(
        self, *, will: Will | None = None, session: str = "", session_expiry_s: int = EXPIRY_S
    ) -> AsyncIterator[Visitor]:
        """A client of any name, or the one of a session; raise `BrokerUnreachable`."""
        if session:
            self._sessions.add(session)
        found = await self._enter(will, session, session_expiry_s if session else 0)
        try:
            yield found
        finally:
            await found.connection.close()

    def clears(self, topic: str) -> None:
        """Have no retained message left on this topic when the visit is over."""
        self._retained.add(topic)

    async def retain(self, visitor: Visitor, topic: str, payload: bytes) -> None:
        """Publish a retained message that is gone when the visit is over."""
        self.clears(topic)
        await visitor.publish(topic, payload, Properties(expiry_s=EXPIRY_S), qos=self.qos, retain=True)

    async def _enter(self, will: Will | None, session: str, session_expiry_s: int) -> Visitor:
        connection: Connection | None = None
        heard: asyncio.Queue[Heard | None] = asyncio.Queue()

        def published(head: PublishHead, payload: memoryview) -> bool:
            heard.put_nowait(Heard(head.topic, head.properties, payload, head.qos, head.retain))
            return True

        client_id = session or f"{self.name}-{secrets.token_hex(4)}"
        greeting = Greeting(client_id, _KEEPALIVE_S, _MAX_PACKET_BYTES, _RECEIVE_MAXIMUM, will, session_expiry_s)
        try:
            async with asyncio.timeout(CONNECT_S):
                sock = await dial(self.address, self.tls)
                secured = _secured(sock) if isinstance(sock, ssl.SSLSocket) else None
                connection = Connection(sock, self.address, greeting, lambda _: None, published, lambda _, __: None)
                await connection.start()
        except BaseException as error:
            if connection is not None:
                await connection.abort("given up")
            if isinstance(error, TimeoutError):
                raise BrokerUnreachable(str(self.address), f"no answer within {CONNECT_S:g} s") from error
            raise
        connection.lost.add_done_callback(lambda _: heard.put_nowait(None))
        return Visitor(connection, secured, heard)

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
                async with self.visitor() as cleaner:
                    for topic in self._retained:
                        await cleaner.publish(topic, qos=self.qos, retain=True)
        for session in self._sessions:
            with _nothing_more_to_do():
                connection = (await self._enter(None, session, 0)).connection  # begins anew, and ends with its goodbye
                await connection.close()


@contextlib.contextmanager
def _nothing_more_to_do() -> Iterator[None]:
    """A broker that has gone, or no longer lets us in: what we left expires."""
    with contextlib.suppress(OSError, ConnectionLost, BrokerUnreachable, Refused):
        yield


def _secured(sock: ssl.SSLSocket) -> tuple[str, datetime | None]:
    ends = (sock.getpeercert() or {}).get("notAfter")
    until = datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC) if isinstance(ends, str) else None
    return sock.version() or "TLS", until
