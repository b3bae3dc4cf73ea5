"""A development CA, the certificates that it issues for each client and broker of a pipeline, and the folder with them.

Keys are on the curve P-256, which TLS 1.2 and 1.3 both support and which is fast on small devices. Existing files are
replaced only on request.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from brokers.config.pipeline_file import Pipeline
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
from brokers.protocol.broker_url import parse_address
from brokers.security.acl import all_sites, broker_username, client_usernames

CA_DAYS = 3650  # it stays when certificates are renewed, so that no machine needs a new ca.crt
CLOCK_SKEW = timedelta(minutes=5)  # how far the clock of a small device may be behind the one of the CA's machine
_LOOPBACK = ("localhost", "127.0.0.1", "::1")  # hosts of every broker, on its own machine

E = TypeVar("E", bound=x509.ExtensionType)
SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True)
class Identity:
    """The subject of a certificate; `hosts` are the names and addresses of a broker, empty for a client."""

    name: str
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CertificateKeyPair:
    """A certificate and its private key."""

    certificate: x509.Certificate
    key: SigningKey = field(repr=False)

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """Not encrypted: processes start without a user who could type a passphrase."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def pipeline_identities(pipeline: Pipeline, hosts: Mapping[str, Sequence[str]]) -> tuple[Identity, ...]:
    """Return the identities of a pipeline; `hosts` adds host names to sites' brokers, beside those in the file."""
    brokers = []
    for site in all_sites(pipeline):
        configured = pipeline.configured_broker(site)
        address = parse_address(configured) if configured else None
        own = [address.host] if address and not address.is_unix_socket else []
        names = dict.fromkeys([*own, *hosts.get(site, ()), *_LOOPBACK])
        brokers.append(Identity(broker_username(site), tuple(names)))
    return (*brokers, *map(Identity, client_usernames(pipeline)))


def create_ca(now: datetime, days: int = CA_DAYS) -> CertificateKeyPair:
    """Create a self-signed CA. Its name is unique, so that clients of another one report an unknown CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _common_name(f"Sparse development authority {secrets.token_hex(4)}")
    builder = _builder(name, name, key, now, now + timedelta(days=days), is_ca=True)
    return CertificateKeyPair(builder.sign(key, SHA256()), key)


def issue_certificate(ca: CertificateKeyPair, identity: Identity, now: datetime, days: int) -> CertificateKeyPair:
    """Issue a certificate, which expires with its CA at the latest."""
    key = ec.generate_private_key(ec.SECP256R1())
    end = min(now + timedelta(days=days), ca.certificate.not_valid_after_utc)
    builder = _builder(_common_name(identity.name), ca.certificate.subject, key, now, end, is_ca=False)
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if identity.hosts else [])]
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    own_id = _extension(ca.certificate, x509.SubjectKeyIdentifier)
    if own_id is not None:
        authority_id = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own_id)
    else:  # a CA that was not made by `create_ca`
        authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    builder = builder.add_extension(authority_id, critical=False)
    if identity.hosts:
        names = x509.SubjectAlternativeName([_general_name(host) for host in identity.hosts])
        builder = builder.add_extension(names, critical=False)
    return CertificateKeyPair(builder.sign(ca.key, SHA256()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, end: datetime, *, is_ca: bool
) -> x509.CertificateBuilder:
    public_key, serial = key.public_key(), x509.random_serial_number()
    builder = x509.CertificateBuilder(issuer, subject, public_key, serial, now - CLOCK_SKEW, end)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    constraints = x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None)
    usage = x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )
    return builder.add_extension(constraints, critical=True).add_extension(usage, critical=True)


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host.encode("idna").decode())


def normalize_host(host: str) -> str:
    """Return a host as certificates spell it; raise `ValueError` if it is not a host name or address."""
    return str(_general_name(host).value)


def certificate_hosts(certificate: x509.Certificate) -> tuple[str, ...]:
    """Return the host names and addresses that a certificate is for."""
    return tuple(str(name.value) for name in _extension(certificate, x509.SubjectAlternativeName) or ())


def is_signed_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Return whether the CA has signed a certificate."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


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
                identity_folder = folder / identity.name
                action = "renewed" if (identity_folder / CERT_FILE).exists() else "made"
                pair = issue_certificate(ca, identity, now, days)
                _write(
                    identity_folder,
                    {CA_FILE: ca.certificate_pem, KEY_FILE: pair.key_pem, CERT_FILE: pair.certificate_pem},
                )
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
    constraints = _extension(certificate, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise BadFile(str(path), "is not a CA certificate")
    if now > certificate.not_valid_after_utc:
        expired = f"expired at {certificate.not_valid_after_utc:%Y-%m-%d}"
        raise BadFile(str(path), f"{expired}: move {path.parent} away, then `--renew` makes a new CA and certificates")
    check_validity(path, certificate, now)
    return CertificateKeyPair(certificate, key)


def _read(identity_folder: Path, identity: Identity, ca: CertificateKeyPair, now: datetime) -> x509.Certificate | None:
    """Return the existing certificate of an identity, None if it has no files; raise for one that cannot be used."""
    if not _exists(identity_folder, CERT_FILE, KEY_FILE):
        return None
    path = identity_folder / CERT_FILE
    try:
        certificate, _ = read_cert_and_key(path, identity_folder / KEY_FILE)
        check_validity(path, certificate, now)
        trusted = read_certificate(identity_folder / CA_FILE)
    except BadFile as error:
        raise _unusable_error(str(error), identity) from None
    if trusted != ca.certificate or not is_signed_by(certificate, ca.certificate):
        raise _unusable_error(f"{path}: is not signed by the CA in {identity_folder.parent / CA_FOLDER}", identity)
    hosts = certificate_hosts(certificate)
    for host in identity.hosts:
        if normalize_host(host) not in hosts:
            raise _unusable_error(f"{path}: is not for the host {host!r}", identity)
    return certificate


def _unusable_error(problem: str, identity: Identity) -> UsageError:
    """The certificate may still be in use somewhere, so it is replaced only on request."""
    message = f"{problem}: `--renew --node {identity.name}` replaces it, `--renew` replaces all"
    return UsageError("UnusableCertificate", message, identity=identity.name)


def _exists(identity_folder: Path, *names: str) -> bool:
    """Return whether any of the files exists; raise `BadFile` if their folder is not a folder."""
    try:
        if identity_folder.exists() and not identity_folder.is_dir():
            raise BadFile(str(identity_folder), "is not a folder")
        return any((identity_folder / name).exists() for name in names)
    except OSError as error:
        raise unreadable_error(identity_folder, error) from None


def _write(identity_folder: Path, files: dict[str, bytes]) -> None:
    """Write files atomically, readable by their owner only; certificates, which are public, by all users."""
    identity_folder.mkdir(mode=0o700, exist_ok=True)
    for name, data in files.items():
        with atomic_path(identity_folder / name) as partial:
            partial.touch(mode=0o600)  # before a byte of a key is in it
            partial.write_bytes(data)
            if name.endswith(".crt"):
                partial.chmod(0o644)
