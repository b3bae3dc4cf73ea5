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
    AUTHORITY,
    CERTIFICATE,
    KEY,
    Expired,
    check_times,
    now,
    read_certificate,
    read_pair,
    read_signer,
)
from brokers.security.dev_ca import (
    AUTHORITY_DAYS,
    Identity,
    Pair,
    hosts_of,
    is_authority,
    issue,
    make_authority,
    signed_by,
    spelled,
)

AUTHORITY_FOLDER, AUTHORITY_KEY = "authority", "ca.key"


@dataclass(eq=False)
class Unfit(UsageError):
    """A certificate that is there and does not do; it is somebody's, so it stays until they say otherwise."""

    path: str
    problem: str
    name: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}: `--renew --node {self.name}` makes it anew, `--renew` makes all"


@dataclass(frozen=True, slots=True)
class Kept:
    """What became of one identity."""

    name: str
    what: Literal["made", "kept", "renewed"]
    until: datetime
    hosts: tuple[str, ...]


def keep(folder: Path, wanted: Sequence[Identity], *, days: int, renew: bool = False) -> list[Kept]:
    """Make what is missing, all of `wanted` with `renew`; keep the rest. All is checked before anything is written.

    Raises `BadFile`, `KeyMisfit`, `NotYetValid`, `Expired` or `Unfit`.
    """
    moment = now()
    place = folder / AUTHORITY_FOLDER
    found = _read_authority(place, moment)
    authority = found or make_authority(moment, max(days, AUTHORITY_DAYS))
    plans = [(each, None if renew else _read(folder / each.name, each, authority, moment)) for each in wanted]
    done: list[Kept] = []
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if found is None:
            _store(place, {AUTHORITY_KEY: authority.key_pem, AUTHORITY: authority.certificate_pem})
            done.append(Kept(AUTHORITY_FOLDER, "made", authority.certificate.not_valid_after_utc, ()))
        for identity, certificate in plans:
            home = folder / identity.name
            what: Literal["made", "kept", "renewed"] = "kept"
            if certificate is None:
                what = "renewed" if (home / CERTIFICATE).exists() else "made"
                pair = issue(authority, identity, moment, days)
                files = {AUTHORITY: authority.certificate_pem, KEY: pair.key_pem, CERTIFICATE: pair.certificate_pem}
                _store(home, files)
                certificate = pair.certificate
            done.append(Kept(identity.name, what, certificate.not_valid_after_utc, hosts_of(certificate)))
    except OSError as error:
        raise BadFile(str(error.filename or folder), f"cannot be written: {_plain(error)}") from None
    return done


def _plain(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _read_authority(place: Path, moment: datetime) -> Pair | None:
    """The authority that is there; None where there is none yet."""
    certificate, key = place / AUTHORITY, place / AUTHORITY_KEY
    if not _is_there(place, certificate, key):
        return None
    pair = Pair(*read_signer(certificate, key))
    if not is_authority(pair.certificate):
        raise BadFile(str(certificate), "is not the certificate of an authority")
    try:
        check_times(certificate, pair.certificate, moment)
    except Expired as error:
        raise BadFile(
            str(certificate), f"expired at {error.ended:%Y-%m-%d}: move {place} away, then `--renew` makes all anew"
        ) from None
    return pair


def _read(home: Path, identity: Identity, authority: Pair, moment: datetime) -> x509.Certificate | None:
    """The certificate that is there of an identity, if it does; None where nothing is."""
    certificate, key = home / CERTIFICATE, home / KEY
    if not _is_there(home, certificate, key):
        return None
    try:
        found, _ = read_pair(certificate, key)
        check_times(certificate, found, moment)
        believed = read_certificate(home / AUTHORITY)
    except BadFile as error:
        raise Unfit(error.path, error.problem, identity.name) from None
    if believed != authority.certificate or not signed_by(found, authority.certificate):
        raise Unfit(str(certificate), f"is not of the authority in {home.parent / AUTHORITY_FOLDER}", identity.name)
    missing = [host for host in identity.hosts if spelled(host) not in hosts_of(found)]
    if missing:
        raise Unfit(str(certificate), f"is not for the host {missing[0]!r}", identity.name)
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
