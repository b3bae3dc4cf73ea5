"""`Transport` over MQTT 5: reconnects, and keeps subscriptions and waiting publications across connections.

`create_transport` makes one with the credentials of this process from the environment, so that no secret is on a
command line. `SPARSE_TLS` names a folder with `ca.crt`, the CA of the broker's certificate, and with `tls.crt` and
`tls.key`, our certificate; without these two we log in by password, or not at all. `SPARSE_PASSWORD_FILE` names a file
whose first line is the password of the user in the broker's address. Child processes inherit both.
"""

import asyncio
import contextlib
import logging
import os
import random
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from brokers.errors import BadFile, BrokerUnreachable, Disconnected, SparseError
from brokers.mqtt.connection import RECEIVE_MAXIMUM, Connection, ConnectOptions, open_connection
from brokers.mqtt.publish_packet import PublishHeader
from brokers.mqtt.socket_connect import AuthenticationFailed, TlsConfig
from brokers.mqtt.socket_loop import ConnectionLost
from brokers.mqtt.subscriptions import Subscription, Subscriptions, Unacked
from brokers.process.backoff import Backoff
from brokers.protocol.broker_url import BrokerAddress, parse_address
from brokers.protocol.transport import BrokerLimits, Buffer, BufferProvider, Delivery, Handler, Properties, Will

log = logging.getLogger(__name__)

BACKOFF_S = (0.1, 5.0)  # first and longest delay between attempts to reconnect
STABLE_S = 5.0  # a connection that lasted this long resets the back-off
RECONNECT_TIMEOUT_S = 10.0
TLS_VARIABLE = "SPARSE_TLS"
PASSWORD_VARIABLE = "SPARSE_PASSWORD_FILE"
PASSWORD_LIMIT_BYTES = 65_535  # a password has a two-byte length: MQTT 5.0 section 3.1.3.6

ReconnectCallback = Callable[[], Awaitable[None]]


class MqttTransport:
    """A `Transport` over MQTT 5 to the broker at `address`.

    With `session_expiry_s` and a fixed `client_id`, the broker keeps the QoS 1 subscriptions, and the publications for
    them, for that long after a disconnection, and delivers them to the next client with that id. Two clients that run
    with one id at the same time disconnect each other again and again: both log a warning, nothing is lost, but many
    publications are delivered twice.
    """

    def __init__(
        self,
        address: str | BrokerAddress,
        *,
        client_id: str | None = None,
        tls: TlsConfig = TlsConfig(),
        session_expiry_s: int = 0,
    ) -> None:
        """Raise `UsageError` ("BadAddress") for a malformed address. Nothing is sent before `connect`.

        `client_id` is random by default.
        """
        if session_expiry_s and client_id is None:
            raise ValueError("a session needs a fixed client_id")
        broker = parse_address(address) if isinstance(address, str) else address
        client_id = client_id or f"sparse-{secrets.token_hex(6)}"
        self._options = ConnectOptions(broker, tls, client_id, session_expiry_s=session_expiry_s)
        self._subscriptions = Subscriptions()
        self._unacked = Unacked(RECEIVE_MAXIMUM)
        self._orders_acks = bool(session_expiry_s)  # whether acknowledgements can be late, so that order matters
        self._callbacks: list[ReconnectCallback] = []
        self._connection: Connection | None = None  # the newest that is or was subscribed
        self._changed = asyncio.Event()  # set and replaced when `_connection` or `_closing` changes
        self._keeper: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        return str(self._options.address)

    @property
    def limits(self) -> BrokerLimits:
        return BrokerLimits(0) if self._connection is None else self._connection.limits

    @property
    def is_connected(self) -> bool:
        return self._connection is not None and not self._connection.lost.done()

    async def connect(self, *, will: Will | None = None, timeout_s: float = 10.0) -> None:
        if self._keeper is not None or self._closing is not None:
            raise RuntimeError("a transport is connected once")
        self._options = replace(self._options, will=will)
        self._connection = await self._open(timeout_s)
        self._keeper = asyncio.create_task(self._keep_connected(self._connection), name=f"connection to {self.address}")
        self._notify_changed()

    def on_reconnect(self, callback: ReconnectCallback) -> None:
        self._callbacks.append(callback)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name=f"disconnect from {self.address}")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._notify_changed()
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait((self._keeper,))
        if self._connection is not None:
            await self._connection.close()

    async def _keep_connected(self, connection: Connection) -> None:
        """Reconnect each time the connection is lost, until cancelled."""
        loop = asyncio.get_running_loop()
        backoff = Backoff(*BACKOFF_S)
        connected_s = loop.time()
        while True:
            reason = await asyncio.shield(connection.lost)
            if loop.time() - connected_s >= STABLE_S:
                backoff.reset()
            elif connection.session_present:
                reason += f"; does another client use the client id {self._options.client_id}?"
            log.warning("connection to %s lost: %s; reconnecting", self.address, reason)
            self._connection = connection = await self._reconnect(backoff)
            log.warning("connected to %s again", self.address)
            connected_s = loop.time()
            self._notify_changed()
            await self._run_callbacks(connection)

    async def _reconnect(self, backoff: Backoff) -> Connection:
        """Try until a connection is open. No error ends this task, because all waiting publications depend on it."""
        while True:
            await asyncio.sleep(backoff.next_s() * random.uniform(0.5, 1.0))  # jitter: many clients reconnect at once
            try:
                return await self._open(RECONNECT_TIMEOUT_S)
            except AuthenticationFailed as error:  # needs the user, who may already have replaced the credentials
                log.warning("%s", error)
            except BrokerUnreachable as error:
                log.info("%s", error)
            except SparseError as error:  # a subscription is refused now, a certificate is being replaced
                log.warning("cannot reconnect to %s yet: %s", self.address, error)
            except Exception:
                log.exception("cannot reconnect to %s yet", self.address)

    async def _open(self, timeout_s: float) -> Connection:
        """Connect and subscribe to everything; raise `BrokerUnreachable`, `OperationRefused` or `BadFile`."""

        def create(sock: socket.socket) -> Connection:
            return Connection(sock, self._options, self._get_buffer, self._on_publish, self._on_connected)

        async def subscribe_all(connection: Connection) -> None:
            for subscription in self._subscriptions:
                if connection.session_present:
                    connection.resubscribe(subscription.topic_filter, subscription.qos)
                else:
                    await connection.subscribe(subscription.topic_filter, subscription.qos)

        return await open_connection(self._options, create, timeout_s, subscribe_all)

    async def _run_callbacks(self, connection: Connection) -> None:
        """Run the callbacks, but not beyond the end of the connection: they may wait for the next one."""

        async def run_all() -> None:
            for callback in self._callbacks:
                try:
                    await callback()
                except Exception:
                    log.exception("a callback after the reconnection to %s failed", self.address)

        task = asyncio.create_task(run_all(), name=f"reconnected to {self.address}")
        try:
            await asyncio.wait((task, connection.lost), return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
            await asyncio.wait((task,))

    def _notify_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def subscribe(
        self,
        topic_filter: str,
        handler: Handler,
        *,
        qos: int = 0,
        buffer_provider: BufferProvider | None = None,
        manual_ack: bool = False,
    ) -> None:
        self._subscriptions.add(Subscription(topic_filter, handler, qos, buffer_provider, manual_ack))
        self._orders_acks = self._orders_acks or manual_ack
        if self._keeper is None:
            return  # `connect` subscribes
        try:
            await self._run_connected(lambda connection: connection.subscribe(topic_filter, qos))
        except BaseException:
            self._subscriptions.remove(topic_filter)
            raise

    async def unsubscribe(self, topic_filter: str) -> None:
        subscribed = topic_filter in self._subscriptions
        self._subscriptions.remove(topic_filter)
        if subscribed and self._connection is not None:
            with contextlib.suppress(ConnectionLost):  # the next connection will not subscribe to it
                await self._connection.unsubscribe(topic_filter)

    async def publish(
        self,
        topic: str,
        payload: Sequence[Buffer] | Buffer = b"",
        properties: Properties = Properties(),
        *,
        qos: int = 0,
        retain: bool = False,
    ) -> None:
        await self._run_connected(lambda current: current.publish(topic, payload, properties, qos=qos, retain=retain))

    async def _run_connected(self, operation: Callable[[Connection], Awaitable[None]]) -> None:
        """Run an operation on the connection; repeat it on the next one if the connection ends before it is done."""
        while True:
            if self._closing is not None:
                raise Disconnected(self.address, "it was closed")
            if self._connection is None or self._connection.lost.done():
                await self._changed.wait()
                continue
            with contextlib.suppress(ConnectionLost):
                await operation(self._connection)
                return

    def _on_connected(self, connection: Connection) -> None:
        if self._keeper is not None and self._options.session_expiry_s and not connection.session_present:
            message = "%s no longer has the session %s; the publications it held are lost"
            log.warning(message, self.address, self._options.client_id)
        self._unacked.attach(connection, connection.session_present)

    def _get_buffer(self, header: PublishHeader) -> memoryview | None:
        for subscription in self._subscriptions.matching(header.topic):
            buffer = subscription.get_buffer(header.topic, header.properties, header.payload_bytes)
            if buffer is not None:
                return buffer
        return None

    def _on_publish(self, header: PublishHeader, payload: memoryview) -> bool:
        """Call the handlers; return whether the connection is to acknowledge the publication at once."""
        subscriptions = self._subscriptions.matching(header.topic)
        delivery = Delivery(header.topic, header.properties, payload, header.retain, header.dup)
        if not self._orders_acks or header.qos != 1:
            for subscription in subscriptions:
                subscription.deliver(delivery)
            return True
        handlers = sum(subscription.manual_ack for subscription in subscriptions)
        publish = self._unacked.add(header, payload, handlers)
        if publish is not None:  # else it is redelivered, and still pending here
            ack = partial(self._unacked.ack, publish)
            for subscription in subscriptions:
                subscription.deliver(replace(delivery, ack=ack) if subscription.manual_ack else delivery)
        return False


def create_transport(address: str, *, client_id: str | None = None, session_expiry_s: int = 0) -> MqttTransport:
    """Return a transport to the broker at `address` with the credentials of this process, not yet connected.

    Raises `UsageError` for a malformed address and for credentials that cannot be used: see `check_tls_folder`.
    """
    broker, tls = resolve_identity(address)
    return MqttTransport(broker, client_id=client_id, tls=tls, session_expiry_s=session_expiry_s)


def resolve_identity(address: str) -> tuple[BrokerAddress, TlsConfig]:
    """Return the parsed address, with the password for its user, and the TLS files. Raises as `create_transport`."""
    broker = parse_address(address)
    password_path = os.environ.get(PASSWORD_VARIABLE)
    if password_path and broker.user is not None and broker.password is None:
        broker = replace(broker, password=read_password(Path(password_path)))
    return broker, load_tls_config(os.environ.get(TLS_VARIABLE, "")) if broker.is_tls else TlsConfig()


def load_tls_config(path: str) -> TlsConfig:
    """Return the checked TLS files of a folder; for "", the CAs of the system and no certificate."""
    if not path:
        return TlsConfig()
    # Imported here, because cryptography is slow to import and needed with TLS only.
    from brokers.mqtt.tls_files import CA_FILE, CERT_FILE, KEY_FILE, check_tls_folder

    folder = Path(path)
    if not check_tls_folder(folder):
        return TlsConfig(str(folder / CA_FILE))
    _warn_if_world_readable(folder / KEY_FILE)
    return TlsConfig(*(str(folder / name) for name in (CA_FILE, CERT_FILE, KEY_FILE)))


def read_password(path: Path) -> str:
    """Return the first line of a file; raise `BadFile`, without any of the content."""
    try:
        first_line = path.read_bytes().partition(b"\n")[0].removesuffix(b"\r")
        password = first_line.decode()
    except OSError as error:
        raise BadFile(str(path), f"cannot be read: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        password = ""
    if not password or len(first_line) > PASSWORD_LIMIT_BYTES:
        problem = f"expected a password in its first line, of 1 to {PASSWORD_LIMIT_BYTES} bytes in UTF-8"
        raise BadFile(str(path), problem)
    _warn_if_world_readable(path)
    return password


def _warn_if_world_readable(path: Path) -> None:
    """Warn only: the folder around the file may well be readable by us alone."""
    if path.stat().st_mode & 0o004:
        log.warning("%s: all users of this machine can read it: `chmod 600` it", path)
