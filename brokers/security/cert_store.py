"""The folder of `sparse certs`: the CA, and a folder for each identity. Existing files are replaced only on request."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from cryptography import x509

from brokers.errors import BadFile, UsageError
from brokers.mqtt.tls_files import (
    CA_FILE,
    CERT_FILE,
    KEY_FILE,
    check_validity,
    read_cert_and_key,
    read_certificate,
    unreadable_error,
    utc_now,
)
from brokers.process.files import atomic_path
from brokers.security.dev_ca import (
    CA_DAYS,
    CertificateKeyPair,
    Identity,
    SigningKey,
    certificate_hosts,
    create_ca,
    is_ca,
    is_signed_by,
    issue_certificate,
    normalize_host,
)

CA_FOLDER, CA_KEY_FILE = "authority", "ca.key"


@dataclass(frozen=True, slots=True)
class StoredCertificate:
    """The certificate of one identity, and what `ensure_certificates` did with it."""

    name: str
    action: Literal["made", "kept", "renewed"]
    expires: datetime
    hosts: tuple[str, ...]


def ensure_certificates(
    folder: Path, identities: Sequence[Identity], *, days: int, renew: bool = False
) -> list[StoredCertificate]:
    """Issue the certificates that are missing, or all of `identities` with `renew`; keep the others.

    Everything is checked before anything is written. Raises `BadFile`, or `UsageError` ("UnusableCertificate",
    "KeyMismatch", "NotYetValid", "Expired").
    """
    now = utc_now()
    ca_folder = folder / CA_FOLDER
    ca_exists = _exists(ca_folder, CA_FILE, CA_KEY_FILE)
    ca = read_ca(folder, now) if ca_exists else create_ca(now, max(days, CA_DAYS))
    existing = {} if renew else {each.name: _read(folder / each.name, each, ca, now) for each in identities}
    stored: list[StoredCertificate] = []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not ca_exists:
            _write(ca_folder, {CA_KEY_FILE: ca.key_pem, CA_FILE: ca.certificate_pem})
            stored.append(StoredCertificate(CA_FOLDER, "made", ca.certificate.not_valid_after_utc, ()))
        for identity in identities:
            action: Literal["made", "kept", "renewed"] = "kept"
            certificate = existing.get(identity.name)
            if certificate is None:
                home = folder / identity.name
                action = "renewed" if (home / CERT_FILE).exists() else "made"
                pair = issue_certificate(ca, identity, now, days)
                _write(home, {CA_FILE: ca.certificate_pem, KEY_FILE: pair.key_pem, CERT_FILE: pair.certificate_pem})
                certificate = pair.certificate
            expires, hosts = certificate.not_valid_after_utc, certificate_hosts(certificate)
            stored.append(StoredCertificate(identity.name, action, expires, hosts))
    except OSError as error:
        problem = f"cannot be written: {(error.strerror or str(error)).lower()}"
        raise BadFile(str(error.filename or folder), problem) from None
    return stored


def read_ca(folder: Path, now: datetime) -> CertificateKeyPair:
    """Return the CA in a folder of certificates; raise `BadFile`, or `UsageError` ("KeyMismatch", "NotYetValid")."""
    path, key_path = folder / CA_FOLDER / CA_FILE, folder / CA_FOLDER / CA_KEY_FILE
    certificate, key = read_cert_and_key(path, key_path)
    if not isinstance(key, SigningKey):
        raise BadFile(str(key_path), "expected an elliptic-curve key or an RSA key")
    if not is_ca(certificate):
        raise BadFile(str(path), "is not a CA certificate")
    if now > certificate.not_valid_after_utc:
        expired = f"expired at {certificate.not_valid_after_utc:%Y-%m-%d}"
        raise BadFile(str(path), f"{expired}: move {path.parent} away, then `--renew` makes a new CA and certificates")
    check_validity(path, certificate, now)
    return CertificateKeyPair(certificate, key)


def _read(home: Path, identity: Identity, ca: CertificateKeyPair, now: datetime) -> x509.Certificate | None:
    """Return the existing certificate of an identity, None if it has no files; raise for one that cannot be used."""
    if not _exists(home, CERT_FILE, KEY_FILE):
        return None
    path = home / CERT_FILE
    try:
        certificate, _ = read_cert_and_key(path, home / KEY_FILE)
        check_validity(path, certificate, now)
        trusted = read_certificate(home / CA_FILE)
    except BadFile as error:
        raise _unusable_error(str(error), identity) from None
    if trusted != ca.certificate or not is_signed_by(certificate, ca.certificate):
        raise _unusable_error(f"{path}: is not signed by the CA in {home.parent / CA_FOLDER}", identity)
    hosts = certificate_hosts(certificate)
    for host in identity.hosts:
        if normalize_host(host) not in hosts:
            raise _unusable_error(f"{path}: is not for the host {host!r}", identity)
    return certificate


def _unusable_error(problem: str, identity: Identity) -> UsageError:
    """The certificate may still be in use somewhere, so it is replaced only on request."""
    message = f"{problem}: `--renew --node {identity.name}` replaces it, `--renew` replaces all"
    return UsageError("UnusableCertificate", message, identity=identity.name)


def _exists(home: Path, *names: str) -> bool:
    """Return whether any of the files exists; raise `BadFile` if their folder is not a folder."""
    try:
        if home.exists() and not home.is_dir():
            raise BadFile(str(home), "is not a folder")
        return any((home / name).exists() for name in names)
    except OSError as error:
        raise unreadable_error(home, error) from None


def _write(home: Path, files: dict[str, bytes]) -> None:
    """Write files atomically, readable by their owner only; certificates, which are public, by all users."""
    home.mkdir(mode=0o700, exist_ok=True)
    for name, data in files.items():
        with atomic_path(home / name) as partial:
            partial.touch(mode=0o600)  # before a byte of a key is in it
            partial.write_bytes(data)
            if name.endswith(".crt"):
                partial.chmod(0o644)
