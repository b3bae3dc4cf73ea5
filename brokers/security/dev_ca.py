"""A development CA, and the certificates that it issues: one for each client and broker of a pipeline. Writes no files.

Keys are on the curve P-256, which TLS 1.2 and 1.3 both support and which is fast on small devices.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from brokers.config.pipeline_file import Pipeline
from brokers.protocol.broker_url import parse_address
from brokers.security.principals import all_sites, broker_username, client_usernames

CA_DAYS = 3650  # it stays when certificates are renewed, so that no machine needs a new ca.crt
CLOCK_SKEW = timedelta(minutes=5)  # how far the clock of a small device may be behind the one of the CA's machine
_LOOPBACK = ("localhost", "127.0.0.1", "::1")  # hosts of every broker, on its own machine

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
    brokers = (
        Identity(broker_username(site), _broker_hosts(pipeline, site, hosts.get(site, ())))
        for site in all_sites(pipeline)
    )
    return (*brokers, *map(Identity, client_usernames(pipeline)))


def _broker_hosts(pipeline: Pipeline, site: str, more: Sequence[str]) -> tuple[str, ...]:
    configured = pipeline.configured_broker(site)
    address = parse_address(configured) if configured else None
    hosts = [address.host] if address and not address.is_unix_socket else []
    return tuple(dict.fromkeys([*hosts, *more, *_LOOPBACK]))


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
    builder = builder.add_extension(_authority_key_id(ca.certificate), critical=False)
    if identity.hosts:
        names = x509.SubjectAlternativeName([_general_name(host) for host in identity.hosts])
        builder = builder.add_extension(names, critical=False)
    return CertificateKeyPair(builder.sign(ca.key, SHA256()), key)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    now: datetime,
    end: datetime,
    *,
    is_ca: bool,
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


def _authority_key_id(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """Return the identifier of the CA's key, as the CA's own certificate has it."""
    try:
        own = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:  # a CA that was not made by `create_ca`
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key())  # type: ignore[arg-type]
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)


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
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in names)


def is_ca(certificate: x509.Certificate) -> bool:
    """Return whether a certificate may sign others."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False


def is_signed_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Return whether the CA has signed a certificate."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
