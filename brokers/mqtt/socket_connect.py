"""Connect to a broker address: a non-blocking socket, plain or TLS; and the errors of connecting, and of refusals.

The text of an error has the cause in one line, with what to do about it.
"""

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from brokers.errors import BadFile, BrokerUnreachable, RequestError
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


_CERTIFICATE_REQUIRED = "it requires a client certificate: name a folder with tls.crt and tls.key in SPARSE_TLS"
_CERTIFICATE_REJECTED = "it rejected our certificate, which may not be valid yet by its clock"
# TLS alerts from the broker (RFC 8446, section 6.2), by OpenSSL's names.
_ALERTS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": _CERTIFICATE_REQUIRED,
    "SSLV3_ALERT_HANDSHAKE_FAILURE": f"no TLS version or cipher in common; or {_CERTIFICATE_REQUIRED}",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the CA of our certificate: expected that of its ca.crt",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "our certificate has expired by its clock: renew it with `sparse certs`",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "our certificate has been revoked",
    "SSLV3_ALERT_BAD_CERTIFICATE": _CERTIFICATE_REJECTED,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": _CERTIFICATE_REJECTED,
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "our certificate is not a client certificate",
}
_NOT_TLS = ("WRONG_VERSION_NUMBER", "UNEXPECTED_EOF_WHILE_READING")  # answers to our handshake, by OpenSSL's names
# OpenSSL's verification errors of the broker's certificate: openssl-verification-options(1).
_HOST_MISMATCHES = (62, 64)
_CA_UNKNOWN = (
    "its certificate is not trusted: not signed by a known CA; "
    "expected that of ca.crt in the folder that SPARSE_TLS names"
)
_UNTRUSTED = {
    9: "its certificate is not valid yet: is this machine's clock right?",
    10: "its certificate has expired: renew it with `sparse certs`, or is this machine's clock wrong?",
    **dict.fromkeys((18, 19, 20, 21), _CA_UNKNOWN),
}
# Reason codes of CONNACK: MQTT 5.0 section 3.2.2.2.
UNSUPPORTED_VERSION, BAD_PASSWORD, NOT_AUTHORIZED = 0x84, 0x86, 0x87


class AuthenticationFailed(BrokerUnreachable):
    """The broker did not accept our credentials, or we not its certificate."""

    def __init__(self, address: str, reason: str, reason_code: int = 0) -> None:
        super().__init__(address, reason, reason_code)
        self.message = f"authentication with the broker at {address} failed: {reason}"


class OperationRefused(RequestError):
    """The broker refused a subscription or a publication."""

    def __init__(self, operation: str, topic: str, reason: str) -> None:
        message = f"the broker refused the {operation} {topic!r}: {reason}"
        if reason == "Not authorized":
            message += "; its access list does not allow this identity: check SPARSE_TLS, or the user in the address"
        super().__init__(type(self).__name__, message, topic=topic, reason=reason)


def connect_error(address: BrokerAddress, error: Exception) -> BrokerUnreachable:
    """Return the error for a socket that could not be connected, or whose TLS handshake failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return AuthenticationFailed(str(address), _describe_untrusted(address, error))
    if isinstance(error, ssl.SSLError) and error.reason in _ALERTS:
        return AuthenticationFailed(str(address), _ALERTS[error.reason])
    is_not_tls = isinstance(error, ssl.SSLEOFError) or getattr(error, "reason", "") in _NOT_TLS
    if isinstance(error, OSError) and error.errno and not isinstance(error, socket.gaierror | ssl.SSLError):
        reason = os.strerror(error.errno).lower()  # asyncio's own text repeats the address
    elif is_not_tls:
        reason = "its answer is not TLS"
    else:
        reason = str(getattr(error, "strerror", None) or error).lower()
    if address.is_tls and (isinstance(error, ConnectionResetError) or is_not_tls):
        reason += "; does it use TLS? A broker without TLS is at mqtt://"
    return BrokerUnreachable(str(address), reason)


def no_connack_error(address: BrokerAddress, error: Exception | None, reason: str) -> BrokerUnreachable:
    """Return the error for a connection that ended, by an error or for another reason, before the CONNACK."""
    if isinstance(error, ssl.SSLError) and error.reason in _ALERTS:
        return AuthenticationFailed(str(address), _ALERTS[error.reason])
    hint = ""
    if address.is_tls:
        hint = f" Perhaps {_CERTIFICATE_REQUIRED}"
    elif isinstance(error, ConnectionResetError):
        hint = " A broker with TLS is at mqtts://"
    return BrokerUnreachable(str(address), f"{reason}; is it an MQTT 5 broker?{hint}")


def connack_error(address: BrokerAddress, code: int, reason: str) -> BrokerUnreachable:
    """Return the error for a CONNACK with a failure."""
    if code not in (BAD_PASSWORD, NOT_AUTHORIZED):
        return BrokerUnreachable(str(address), f"it refused: {reason}", code)
    if address.user is None:
        advice = "name a user in its address, SCHEME://USER@HOST, and a file with the password in SPARSE_PASSWORD_FILE"
    elif address.password is None:
        advice = f"name a file with the password of {address.user!r} in SPARSE_PASSWORD_FILE"
    else:
        advice = f"is that the password of {address.user!r}?"
    return AuthenticationFailed(str(address), f"it refused: {reason}; {advice}", code)


def _describe_untrusted(address: BrokerAddress, error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in _HOST_MISMATCHES:
        host = address.host
        return f"its certificate is not for {host!r}: `sparse certs FILE --host SITE={host}` adds that name"
    return _UNTRUSTED.get(error.verify_code, f"its certificate is not trusted: {error.verify_message}")
