"""A folder of credentials, with the file names of a Kubernetes TLS secret: read, and checked before anything starts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from brokers.errors import BadFile, UsageError

# What an authority may sign with.
Signer = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
AUTHORITY, CERTIFICATE, KEY = "ca.crt", "tls.crt", "tls.key"
_ANEW = "`sparse certs FILE --renew --node NAME` makes one of ours anew"


@dataclass(eq=False)
class NotYetValid(UsageError):
    """A certificate whose time has not begun: most often, a clock that was never set."""

    path: str
    begins: datetime
    now: datetime

    def __str__(self) -> str:
        return (
            f"{self.path}: is valid from {shown(self.begins)} on, and here it is {shown(self.now)}: "
            "is this machine's clock right?"
        )


@dataclass(eq=False)
class Expired(UsageError):
    """A certificate whose time is over."""

    path: str
    ended: datetime
    now: datetime

    def __str__(self) -> str:
        return f"{self.path}: expired at {shown(self.ended)}, and here it is {shown(self.now)}: {_ANEW}"


@dataclass(eq=False)
class KeyMisfit(UsageError):
    """A certificate and a key that are not of one pair."""

    certificate: str
    key: str

    def __str__(self) -> str:
        return f"{self.certificate}: does not fit the key in {self.key}: expected the two of one identity; {_ANEW}"


def shown(moment: datetime) -> str:
    """A moment for a person, to the second."""
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def now() -> datetime:
    return datetime.now(UTC)


def read(path: Path) -> bytes:
    """The bytes of a file; raises `BadFile`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadFile(str(path), f"cannot be read: {(error.strerror or str(error)).lower()}") from None


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate in a PEM file; raises `BadFile`."""
    try:
        return x509.load_pem_x509_certificates(read(path))[0]
    except ValueError:
        raise BadFile(str(path), "expected a PEM certificate") from None


def read_key(path: Path) -> PrivateKeyTypes:
    """The private key in a PEM file; raises `BadFile`, which says nothing of what is in it."""
    try:
        return load_pem_private_key(read(path), None)
    except TypeError:
        raise BadFile(str(path), "is locked with a passphrase: expected a key without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise BadFile(str(path), "expected a PEM private key") from None


def read_pair(certificate: Path, key: Path) -> tuple[x509.Certificate, PrivateKeyTypes]:
    """A certificate and its key; raises `BadFile` or `KeyMisfit`."""
    found, secret = read_certificate(certificate), read_key(key)
    if found.public_key() != secret.public_key():
        raise KeyMisfit(str(certificate), str(key))
    return found, secret


def read_signer(certificate: Path, key: Path) -> tuple[x509.Certificate, Signer]:
    """The pair of an authority; raises `BadFile` or `KeyMisfit`."""
    found, secret = read_pair(certificate, key)
    if not isinstance(secret, Signer):
        raise BadFile(str(key), "expected a key of an elliptic curve, or an RSA key")
    return found, secret


def check_times(path: Path, certificate: x509.Certificate, moment: datetime) -> None:
    """Raise `NotYetValid` or `Expired` for a certificate that does not count at that moment."""
    if moment < certificate.not_valid_before_utc:
        raise NotYetValid(str(path), certificate.not_valid_before_utc, moment)
    if moment > certificate.not_valid_after_utc:
        raise Expired(str(path), certificate.not_valid_after_utc, moment)


def check_folder(folder: Path) -> bool:
    """Check a folder with `ca.crt` and, for who logs in by certificate, `tls.crt` and `tls.key`.

    Returns whether these two are there. Raises `BadFile`, `KeyMisfit`, `NotYetValid` or `Expired`.
    """
    try:
        there = folder.is_dir()
        problem = "is no folder" if folder.exists() else "no such folder"
    except OSError as error:  # a name that is too long, a folder above it that we may not enter
        raise BadFile(str(folder), f"cannot be read: {(error.strerror or str(error)).lower()}") from None
    if not there:
        raise BadFile(str(folder), f"{problem}: expected one with {AUTHORITY}, {CERTIFICATE} and {KEY}")
    moment = now()
    check_times(folder / AUTHORITY, read_certificate(folder / AUTHORITY), moment)
    certificate, key = folder / CERTIFICATE, folder / KEY
    if not certificate.exists() and not key.exists():
        return False
    found, _ = read_pair(certificate, key)
    check_times(certificate, found, moment)
    return True
