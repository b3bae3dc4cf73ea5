"""Connect to a broker address: a non-blocking socket with buffers that suit tensors, plain or TLS."""

import asyncio
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from brokers.errors import BadFile
from brokers.protocol.broker_url import BrokerAddress

# Measured with tests/bench/roundtrip.py: 256 KiB to 4 MiB are equally fast on loopback, and a small buffer stays in the
# CPU cache. On a slow uplink, data in the buffer is stale by the time it leaves. The kernel doubles the size, which is
# enough for 20 MB/s at a round trip of 50 ms. SO_RCVBUF is not set: it would switch off the kernel's own tuning, which
# reaches larger sizes.
SEND_BUFFER_BYTES = 512 << 10


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Paths of the PEM files for `mqtts://`: trusted CAs (None: those of the system), client certificate and key."""

    cafile: str | None = None
    certfile: str | None = None
    keyfile: str | None = None

    def create_context(self) -> ssl.SSLContext:
        """Return the context for a client; raise `BadFile` for a file that is missing or is not PEM."""
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
    """Connect to the first address of the host that answers. Raises `OSError` or `BadFile`; has no time limit."""
    if address.is_unix_socket:
        return await _connect(socket.AF_UNIX, address.host)
    loop = asyncio.get_running_loop()
    last_error: OSError | None = None
    context = tls.create_context() if address.is_tls else None
    for family, _, _, _, host_port in await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM):
        try:
            sock = await _connect(family, host_port)
        except OSError as error:
            last_error = error
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock if context is None else await _handshake(sock, context, address.host)
    raise last_error or OSError("the host name has no address")


async def _connect(family: int, target: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        await asyncio.get_running_loop().sock_connect(sock, target)  # type: ignore[arg-type]
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
                await _wait_ready(sock.fileno(), loop.add_reader, loop.remove_reader)
            except ssl.SSLWantWriteError:
                await _wait_ready(sock.fileno(), loop.add_writer, loop.remove_writer)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


async def _wait_ready(
    descriptor: int, add: Callable[[int, Callable[[], None]], object], remove: Callable[[int], object]
) -> None:
    ready = asyncio.Event()
    add(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        remove(descriptor)
