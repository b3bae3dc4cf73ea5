"""Why a broker is not reached, or does not have us, in plain words, with what to do about it. Pure."""

from __future__ import annotations

import os
import socket
import ssl
from dataclasses import dataclass

from brokers.errors import BrokerUnreachable, RequestError
from brokers.protocol.broker_url import BrokerAddress

_WANTS_CERTIFICATE = "it wants a certificate: name a folder with tls.crt and tls.key in SPARSE_TLS"
_DOUBTS_CERTIFICATE = "it does not take our certificate, which may not be valid yet by its clock"
# What the other side says as it ends a handshake (RFC 8446, section 6.2), by OpenSSL's names.
_ALERTS = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": _WANTS_CERTIFICATE,
    "SSLV3_ALERT_HANDSHAKE_FAILURE": f"we agree on no way to speak TLS; if {_WANTS_CERTIFICATE}",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not know the authority of our certificate: expected that of its own ca.crt",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "our certificate has expired, by its clock: make it anew with `sparse certs`",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "our certificate has been revoked",
    "SSLV3_ALERT_BAD_CERTIFICATE": _DOUBTS_CERTIFICATE,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": _DOUBTS_CERTIFICATE,
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "our certificate is not one for clients",
}
# Why we do not believe the other side, by OpenSSL's numbers (openssl-verification-options(1)).
_NOT_YET_VALID, _EXPIRED, _NAME, _ADDRESS = 9, 10, 62, 64
_UNKNOWN_AUTHORITY = {18, 19, 20, 21}
# Reason codes of a CONNACK: MQTT 5, section 3.2.2.2. The last two speak of who we are.
UNSUPPORTED_VERSION, BAD_PASSWORD, NOT_AUTHORIZED = 0x84, 0x86, 0x87


class ConnackRefused(BrokerUnreachable):
    """A broker heard our CONNECT and will not have us now; `reason_code` is from its CONNACK."""

    def __init__(self, address: str, reason: str, reason_code: int) -> None:
        super().__init__(address, reason)
        self.reason_code = reason_code


class AuthenticationFailed(BrokerUnreachable):
    """A broker is there, and does not let us in; or we do not believe that it is the one (then `reason_code` is 0)."""

    def __init__(self, address: str, reason: str, reason_code: int = 0) -> None:
        super().__init__(address, reason)
        self.message = f"no way into the broker at {address}: {reason}"
        self.reason_code = reason_code


@dataclass(eq=False)
class OperationRefused(RequestError):
    """The broker answered a subscription or a publication with a failure."""

    what: str
    topic: str
    reason: str

    def __str__(self) -> str:
        advice = "; its access list does not let this identity there: is SPARSE_TLS, or the user, the right one?"
        said = f"the broker refused the {self.what} {self.topic!r}: {self.reason}"
        return said + advice if self.reason == "Not authorized" else said


def connect_error(address: BrokerAddress, error: Exception) -> BrokerUnreachable:
    """Why there is no connection."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return AuthenticationFailed(str(address), _disbelief(address, error))
    if isinstance(error, ssl.SSLError) and error.reason in _ALERTS:
        return AuthenticationFailed(str(address), _ALERTS[error.reason])
    if address.is_tls and (isinstance(error, ConnectionResetError) or _breaks_tls(error)):
        return BrokerUnreachable(
            str(address), f"{describe_os_error(error)}; does it speak TLS? One that does not is at mqtt://"
        )
    return BrokerUnreachable(str(address), describe_os_error(error))


def no_connack_error(address: BrokerAddress, error: Exception | None, said: str) -> BrokerUnreachable:
    """Why a connection ended before the broker answered; `said` where there was no error of the system's."""
    if isinstance(error, ssl.SSLError) and error.reason in _ALERTS:
        return AuthenticationFailed(str(address), _ALERTS[error.reason])
    if address.is_tls:
        return BrokerUnreachable(str(address), f"{said}; is it an MQTT 5 broker? Perhaps {_WANTS_CERTIFICATE}")
    hint = " One that speaks TLS is at mqtts://" if isinstance(error, ConnectionResetError) else ""
    return BrokerUnreachable(str(address), f"{said}; is it an MQTT 5 broker?{hint}")


def connack_error(address: BrokerAddress, code: int, reason: str) -> BrokerUnreachable:
    """Why the broker's answer was no."""
    if code not in (BAD_PASSWORD, NOT_AUTHORIZED):
        return ConnackRefused(str(address), f"it refused: {reason}", code)
    if address.user is None:
        advice = "name a user in its address, SCHEME://USER@HOST, and a file with the password in SPARSE_PASSWORD_FILE"
    elif address.password is None:
        advice = f"name a file with the password of {address.user!r} in SPARSE_PASSWORD_FILE"
    else:
        advice = f"is that the password of {address.user!r}?"
    return AuthenticationFailed(str(address), f"it refused: {reason}; {advice}", code)


def describe_os_error(error: Exception) -> str:
    """What an error of the system says, in few words."""
    if isinstance(error, OSError) and error.errno and not isinstance(error, socket.gaierror | ssl.SSLError):
        return os.strerror(error.errno).lower()  # asyncio puts the address in front, which the line has already
    if _breaks_tls(error):
        return "what it said is not TLS"
    return str(getattr(error, "strerror", None) or error).lower()


def _breaks_tls(error: Exception) -> bool:
    return isinstance(error, ssl.SSLEOFError) or getattr(error, "reason", "") in (
        "WRONG_VERSION_NUMBER",
        "UNEXPECTED_EOF_WHILE_READING",
    )


def _disbelief(address: BrokerAddress, error: ssl.SSLCertVerificationError) -> str:
    host = f"{address.host!r}"
    if error.verify_code in (_NAME, _ADDRESS):
        return (
            f"its certificate is for other names than {host}: `sparse certs FILE --host SITE={address.host}` adds one"
        )
    if error.verify_code in _UNKNOWN_AUTHORITY:
        return (
            "its certificate is not trusted: no authority that we know has signed it; "
            "expected that of ca.crt in the folder that SPARSE_TLS names"
        )
    if error.verify_code == _NOT_YET_VALID:
        return "its certificate is not valid yet: is this machine's clock right?"
    if error.verify_code == _EXPIRED:
        return "its certificate has expired: make it anew with `sparse certs`; or is this machine's clock wrong?"
    return f"its certificate is not trusted: {error.verify_message}"
