"""A development authority, and what it signs: a certificate for each identity of a pipeline. Touches no files.

Keys are of the curve P-256, which TLS 1.2 and 1.3 both know and which small devices compute quickly.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from brokers.config.pipeline_file import Pipeline
from brokers.mqtt.tls_files import SigningKey
from brokers.protocol.broker_url import parse_address
from brokers.security.principals import (
    MONITOR,
    OPERATOR,
    VIEWER,
    all_sites,
    broker_username,
    camera_username,
    source_username,
    stage_username,
)

CA_NAME = "Sparse development authority"
# It stays when certificates are made anew, so that nobody has to be told of another one.
CA_DAYS = 3650
# A small device's clock may be so far behind that of the machine where its certificate was made.
CLOCK_SKEW = timedelta(minutes=5)
# A broker is reached under these on its own machine.
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who gets a certificate. A broker is reached at its hosts; who only connects has none."""

    name: str
    hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CertificateKeyPair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: SigningKey = field(repr=False)

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        """Not encrypted, since nobody is there to type a passphrase."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def pipeline_identities(pipeline: Pipeline, hosts: Mapping[str, Sequence[str]]) -> tuple[Identity, ...]:
    """All of a pipeline; `hosts` are further names of sites' brokers, beside those in the file."""
    brokers = (
        Identity(broker_username(site), _hosts(pipeline, site, hosts.get(site, ()))) for site in all_sites(pipeline)
    )
    clients = [
        *(stage_username(pipeline, stage) for stage in pipeline.stage),
        source_username(pipeline),
        *(camera_username(camera) for site in pipeline.site for camera in site.cameras),
        VIEWER,
        MONITOR,
        OPERATOR,
    ]
    return (*brokers, *map(Identity, clients))


def _hosts(pipeline: Pipeline, site: str, more: Sequence[str]) -> tuple[str, ...]:
    stated = pipeline.configured_broker(site)
    address = parse_address(stated) if stated else None
    named = [address.host] if address and not address.is_unix_socket else []
    return tuple(dict.fromkeys([*named, *more, *_LOOPBACK]))


def create_ca(now: datetime, days: int = CA_DAYS) -> CertificateKeyPair:
    """A new authority, which is its own witness."""
    key = ec.generate_private_key(ec.SECP256R1())
    # No two are of one name: who believes in an earlier one is told that this one is unknown, not that a signature is
    # wrong.
    name = _name(f"{CA_NAME} {secrets.token_hex(4)}")
    builder = _begin(name, name, key, now, now + timedelta(days=days))
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return CertificateKeyPair(builder.add_extension(_usage(signs=True), critical=True).sign(key, SHA256()), key)


def issue_certificate(
    authority: CertificateKeyPair, identity: Identity, now: datetime, days: int
) -> CertificateKeyPair:
    """A new certificate, which ends with its authority at the latest."""
    key = ec.generate_private_key(ec.SECP256R1())
    end = min(now + timedelta(days=days), authority.certificate.not_valid_after_utc)
    builder = _begin(_name(identity.name), authority.certificate.subject, key, now, end)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(signs=False), critical=True)
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH, *([ExtendedKeyUsageOID.SERVER_AUTH] if identity.hosts else [])]
    builder = builder.add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    builder = builder.add_extension(_witness(authority.certificate), critical=False)
    if identity.hosts:
        names = x509.SubjectAlternativeName([_host(host) for host in identity.hosts])
        builder = builder.add_extension(names, critical=False)
    return CertificateKeyPair(builder.sign(authority.key, SHA256()), key)


def _begin(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, end: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(
        issuer, subject, key.public_key(), x509.random_serial_number(), now - CLOCK_SKEW, end
    )
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)


def _witness(authority: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """By what a certificate names the key that signed it: as that key's own certificate does."""
    try:
        theirs = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:  # not one that we made
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())  # type: ignore[arg-type]
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(theirs)


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host.encode("idna").decode())


def certificate_hosts(certificate: x509.Certificate) -> tuple[str, ...]:
    """The names and addresses that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in names)


def normalize_host(host: str) -> str:
    """A host as a certificate spells it; raises `ValueError` for what is no host."""
    return str(_host(host).value)


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the authority has signed it."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def is_ca(certificate: x509.Certificate) -> bool:
    """Whether it may sign others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False
