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
SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
CA_FILE, CERT_FILE, KEY_FILE = "ca.crt", "tls.crt", "tls.key"
_ANEW = "`sparse certs FILE --renew --node NAME` makes one of ours anew"


@dataclass(eq=False)
class NotYetValid(UsageError):
    """A certificate whose time has not begun: most often, a clock that was never set."""

    path: str
    begins: datetime
    now: datetime

    def __str__(self) -> str:
        return (
            f"{self.path}: is valid from {format_utc(self.begins)} on, and here it is {format_utc(self.now)}: "
            "is this machine's clock right?"
        )


@dataclass(eq=False)
class Expired(UsageError):
    """A certificate whose time is over."""

    path: str
    ended: datetime
    now: datetime

    def __str__(self) -> str:
        return f"{self.path}: expired at {format_utc(self.ended)}, and here it is {format_utc(self.now)}: {_ANEW}"


@dataclass(eq=False)
class KeyMismatch(UsageError):
    """A certificate and a key that are not of one pair."""

    certificate: str
    key: str

    def __str__(self) -> str:
        return f"{self.certificate}: does not fit the key in {self.key}: expected the two of one identity; {_ANEW}"


def format_utc(moment: datetime) -> str:
    """A moment for a person, to the second."""
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def utc_now() -> datetime:
    return datetime.now(UTC)


def read_file(path: Path) -> bytes:
    """The bytes of a file; raises `BadFile`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadFile(str(path), f"cannot be read: {(error.strerror or str(error)).lower()}") from None


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate in a PEM file; raises `BadFile`."""
    try:
        return x509.load_pem_x509_certificates(read_file(path))[0]
    except ValueError:
        raise BadFile(str(path), "expected a PEM certificate") from None


def read_private_key(path: Path) -> PrivateKeyTypes:
    """The private key in a PEM file; raises `BadFile`, which says nothing of what is in it."""
    try:
        return load_pem_private_key(read_file(path), None)
    except TypeError:
        raise BadFile(str(path), "is locked with a passphrase: expected a key without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise BadFile(str(path), "expected a PEM private key") from None


def read_cert_and_key(certificate: Path, key: Path) -> tuple[x509.Certificate, PrivateKeyTypes]:
    """A certificate and its key; raises `BadFile` or `KeyMismatch`."""
    found, secret = read_certificate(certificate), read_private_key(key)
    if found.public_key() != secret.public_key():
        raise KeyMismatch(str(certificate), str(key))
    return found, secret


def read_ca(certificate: Path, key: Path) -> tuple[x509.Certificate, SigningKey]:
    """The pair of an authority; raises `BadFile` or `KeyMismatch`."""
    found, secret = read_cert_and_key(certificate, key)
    if not isinstance(secret, SigningKey):
        raise BadFile(str(key), "expected a key of an elliptic curve, or an RSA key")
    return found, secret


def check_validity(path: Path, certificate: x509.Certificate, moment: datetime) -> None:
    """Raise `NotYetValid` or `Expired` for a certificate that does not count at that moment."""
    if moment < certificate.not_valid_before_utc:
        raise NotYetValid(str(path), certificate.not_valid_before_utc, moment)
    if moment > certificate.not_valid_after_utc:
        raise Expired(str(path), certificate.not_valid_after_utc, moment)


def check_tls_folder(folder: Path) -> bool:
    """Check a folder with `ca.crt` and, for who logs in by certificate, `tls.crt` and `tls.key`.

    Returns whether these two are there. Raises `BadFile`, `KeyMismatch`, `NotYetValid` or `Expired`.
    """
    try:
        there = folder.is_dir()
        problem = "is no folder" if folder.exists() else "no such folder"
    except OSError as error:  # a name that is too long, a folder above it that we may not enter
        raise BadFile(str(folder), f"cannot be read: {(error.strerror or str(error)).lower()}") from None
    if not there:
        raise BadFile(str(folder), f"{problem}: expected one with {CA_FILE}, {CERT_FILE} and {KEY_FILE}")
    moment = utc_now()
    check_validity(folder / CA_FILE, read_certificate(folder / CA_FILE), moment)
    certificate, key = folder / CERT_FILE, folder / KEY_FILE
    if not certificate.exists() and not key.exists():
        return False
    found, _ = read_cert_and_key(certificate, key)
    check_validity(certificate, found, moment)
    return True
