"""TLS files with the names of a Kubernetes TLS secret, read and checked before a process connects."""

from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from brokers.errors import BadFile, UsageError

CA_FILE, CERT_FILE, KEY_FILE = "ca.crt", "tls.crt", "tls.key"
_RENEW = "`sparse certs FILE --renew --node NAME` renews one that it made"


def utc_now() -> datetime:
    return datetime.now(UTC)


def read_certificate(path: Path) -> x509.Certificate:
    """Return the first certificate in a PEM file; raise `BadFile`."""
    try:
        return x509.load_pem_x509_certificates(_read(path))[0]
    except ValueError:
        raise BadFile(str(path), "expected a PEM certificate") from None


def read_private_key(path: Path) -> PrivateKeyTypes:
    """Return the private key in a PEM file; raise `BadFile`, without any of the content."""
    try:
        return load_pem_private_key(_read(path), None)
    except TypeError:
        raise BadFile(str(path), "is encrypted with a passphrase: expected a key without one") from None
    except (ValueError, UnsupportedAlgorithm):
        raise BadFile(str(path), "expected a PEM private key") from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable_error(path, error) from None


def unreadable_error(path: Path, error: OSError) -> BadFile:
    return BadFile(str(path), f"cannot be read: {(error.strerror or str(error)).lower()}")


def read_cert_and_key(cert_path: Path, key_path: Path) -> tuple[x509.Certificate, PrivateKeyTypes]:
    """Return a certificate and its private key; raise `BadFile` or `UsageError` ("KeyMismatch")."""
    certificate, key = read_certificate(cert_path), read_private_key(key_path)
    if certificate.public_key() != key.public_key():
        message = f"{cert_path}: does not match the key in {key_path}: expected a certificate and its own key; {_RENEW}"
        raise UsageError("KeyMismatch", message, path=str(cert_path), key_path=str(key_path))
    return certificate, key


def check_validity(path: Path, certificate: x509.Certificate, now: datetime) -> None:
    """Raise `UsageError` ("NotYetValid", "Expired") for a certificate that is not valid at the time `now`."""
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < start:
        message = f"{path}: is valid from {_format(start)}, it is now {_format(now)}: is this machine's clock right?"
        raise UsageError("NotYetValid", message, path=str(path), valid_from=start, now=now)
    if now > end:
        message = f"{path}: expired at {_format(end)}, it is now {_format(now)}: {_RENEW}"
        raise UsageError("Expired", message, path=str(path), valid_until=end, now=now)


def _format(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M:%S} UTC"


def check_tls_folder(folder: Path) -> bool:
    """Check a folder with `ca.crt` and, to log in by certificate, `tls.crt` and `tls.key`.

    Returns whether it has these two. Raises `BadFile`, or `UsageError` as `read_cert_and_key` and `check_validity`.
    """
    try:
        is_folder = folder.is_dir()
        problem = "is not a folder" if folder.exists() else "no such folder"
    except OSError as error:  # a name that is too long, a parent folder without permission
        raise unreadable_error(folder, error) from None
    if not is_folder:
        raise BadFile(str(folder), f"{problem}: expected one with {CA_FILE}, {CERT_FILE} and {KEY_FILE}")
    now = utc_now()
    check_validity(folder / CA_FILE, read_certificate(folder / CA_FILE), now)
    cert_path, key_path = folder / CERT_FILE, folder / KEY_FILE
    if not cert_path.exists() and not key_path.exists():
        return False
    certificate, _ = read_cert_and_key(cert_path, key_path)
    check_validity(cert_path, certificate, now)
    return True
