"""From an address to a connected, non-blocking socket that suits tensors."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from brokers.errors import BadFile
from brokers.protocol.broker_url import BrokerAddress

# Measured with tests/bench/roundtrip.py: from 256 KiB to 4 MiB equally fast on loopback (a small one stays in the
# cache), and what waits here is stale by the time it leaves, on a slow uplink. The kernel doubles it: 20 MB/s at a
# round trip of 50 ms. The receive buffer is left to the kernel, whose own tuning goes further than SO_RCVBUF may, and
# which SO_RCVBUF would switch off.
SEND_BUFFER_BYTES = 512 << 10


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """The certificates for `mqtts://`: whom to believe, who we are. Paths of PEM files; None: the system's CAs."""

    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None

    def create_context(self) -> ssl.SSLContext:
        """Return the context for a client; raise `BadFile` for a file that is missing or holds something else."""
        path = self.cafile or ""
        try:
            context = ssl.create_default_context(cafile=self.cafile)
            if self.certfile is not None:
                path = self.certfile
                context.load_cert_chain(self.certfile, self.keyfile)
        except OSError as error:  # ssl.SSLError is one
            raise BadFile(path, f"expected a PEM certificate: {error.strerror or error}") from error
        return context


async def connect_socket(address: BrokerAddress, tls: TlsConfig) -> socket.socket:
    """Connect to the first of the host's addresses that answers; raise OSError when none does. Has no time limit."""
    if address.is_unix_socket:
        return await _connect(socket.AF_UNIX, address.host)
    loop = asyncio.get_running_loop()
    problem: OSError | None = None
    context = tls.create_context() if address.is_tls else None
    for family, _, _, _, place in await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
        try:
            sock = await _connect(family, place)
        except OSError as error:
            problem = error
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock if context is None else await _handshake(sock, context, address.host)
    raise problem or OSError("the name has no address")


async def _connect(family: int, place: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        await asyncio.get_running_loop().sock_connect(sock, place)  # type: ignore[arg-type]
    except BaseException:
        sock.close()
        raise
    return sock


async def _handshake(plain: socket.socket, context: ssl.SSLContext, host: str) -> ssl.SSLSocket:
    loop = asyncio.get_running_loop()
    sock = context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
    try:
        while True:
            try:
                sock.do_handshake()
            except ssl.SSLWantReadError:
                await _ready(sock.fileno(), loop.add_reader, loop.remove_reader)
            except ssl.SSLWantWriteError:
                await _ready(sock.fileno(), loop.add_writer, loop.remove_writer)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


async def _ready(
    descriptor: int, add: Callable[[int, Callable[[], None]], object], remove: Callable[[int], object]
) -> None:
    ready = asyncio.get_running_loop().create_future()
    add(descriptor, lambda: None if ready.done() else ready.set_result(None))
    with contextlib.ExitStack() as stack:
        stack.callback(remove, descriptor)
        await ready
