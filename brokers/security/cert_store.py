"""What `sparse certs` keeps on disk: the authority, and a folder for each identity. Nothing is overwritten unasked."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
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
    Expired,
    check_validity,
    read_ca,
    read_cert_and_key,
    read_certificate,
    utc_now,
)
from brokers.security.dev_ca import (
    CA_DAYS,
    CertificateKeyPair,
    Identity,
    certificate_hosts,
    create_ca,
    is_ca,
    is_signed_by,
    issue_certificate,
    normalize_host,
)

CA_FOLDER, CA_KEY_FILE = "authority", "ca.key"


@dataclass(eq=False)
class UnusableCertificate(UsageError):
    """A certificate that is there and does not do; it is somebody's, so it stays until they say otherwise."""

    path: str
    problem: str
    name: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}: `--renew --node {self.name}` makes it anew, `--renew` makes all"


@dataclass(frozen=True, slots=True)
class StoredCertificate:
    """What became of one identity."""

    name: str
    action: Literal["made", "kept", "renewed"]
    expires: datetime
    hosts: tuple[str, ...]


def ensure_certificates(
    folder: Path, identities: Sequence[Identity], *, days: int, renew: bool = False
) -> list[StoredCertificate]:
    """Make what is missing, all of `wanted` with `renew`; keep the rest. All is checked before anything is written.

    Raises `BadFile`, `KeyMisfit`, `NotYetValid`, `Expired` or `UnusableCertificate`.
    """
    moment = utc_now()
    place = folder / CA_FOLDER
    found = _read_authority(place, moment)
    authority = found or create_ca(moment, max(days, CA_DAYS))
    plans = [(each, None if renew else _read(folder / each.name, each, authority, moment)) for each in identities]
    done: list[StoredCertificate] = []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if found is None:
            _store(place, {CA_KEY_FILE: authority.key_pem, CA_FILE: authority.certificate_pem})
            done.append(StoredCertificate(CA_FOLDER, "made", authority.certificate.not_valid_after_utc, ()))
        for identity, certificate in plans:
            home = folder / identity.name
            what: Literal["made", "kept", "renewed"] = "kept"
            if certificate is None:
                what = "renewed" if (home / CERT_FILE).exists() else "made"
                pair = issue_certificate(authority, identity, moment, days)
                files = {CA_FILE: authority.certificate_pem, KEY_FILE: pair.key_pem, CERT_FILE: pair.certificate_pem}
                _store(home, files)
                certificate = pair.certificate
            done.append(
                StoredCertificate(identity.name, what, certificate.not_valid_after_utc, certificate_hosts(certificate))
            )
    except OSError as error:
        raise BadFile(str(error.filename or folder), f"cannot be written: {_plain(error)}") from None
    return done


def _plain(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _read_authority(place: Path, moment: datetime) -> CertificateKeyPair | None:
    """The authority that is there; None where there is none yet."""
    certificate, key = place / CA_FILE, place / CA_KEY_FILE
    if not _is_there(place, certificate, key):
        return None
    pair = CertificateKeyPair(*read_ca(certificate, key))
    if not is_ca(pair.certificate):
        raise BadFile(str(certificate), "is not the certificate of an authority")
    try:
        check_validity(certificate, pair.certificate, moment)
    except Expired as error:
        raise BadFile(
            str(certificate), f"expired at {error.ended:%Y-%m-%d}: move {place} away, then `--renew` makes all anew"
        ) from None
    return pair


def _read(home: Path, identity: Identity, authority: CertificateKeyPair, moment: datetime) -> x509.Certificate | None:
    """The certificate that is there of an identity, if it does; None where nothing is."""
    certificate, key = home / CERT_FILE, home / KEY_FILE
    if not _is_there(home, certificate, key):
        return None
    try:
        found, _ = read_cert_and_key(certificate, key)
        check_validity(certificate, found, moment)
        believed = read_certificate(home / CA_FILE)
    except BadFile as error:
        raise UnusableCertificate(error.path, error.problem, identity.name) from None
    if believed != authority.certificate or not is_signed_by(found, authority.certificate):
        raise UnusableCertificate(
            str(certificate), f"is not of the authority in {home.parent / CA_FOLDER}", identity.name
        )
    missing = [host for host in identity.hosts if normalize_host(host) not in certificate_hosts(found)]
    if missing:
        raise UnusableCertificate(str(certificate), f"is not for the host {missing[0]!r}", identity.name)
    return found


def _is_there(place: Path, *files: Path) -> bool:
    """Whether any of the files is; raises `BadFile` where their folder is none."""
    try:
        if place.exists() and not place.is_dir():
            raise BadFile(str(place), "is no folder")
        return any(file.exists() for file in files)
    except OSError as error:
        raise BadFile(str(place), f"cannot be read: {_plain(error)}") from None


def _store(home: Path, files: dict[str, bytes]) -> None:
    """Write files that only their owner can read, each at once or not at all."""
    home.mkdir(mode=0o700, exist_ok=True)
    for name, data in files.items():
        path = home / name
        begun = home / f".{name}.{secrets.token_hex(4)}"
        try:
            with open(begun, "xb", opener=lambda place, flags: os.open(place, flags, 0o600)) as file:
                file.write(data)
            if path.suffix == ".crt":
                begun.chmod(0o644)  # told to everybody who connects, anyhow
            begun.replace(path)
        finally:
            with suppress(FileNotFoundError):
                begun.unlink()
