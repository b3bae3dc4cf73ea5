"""Who this process is to a broker: from the environment, so that no secret stands on a command line.

`SPARSE_TLS` names a folder with `ca.crt`, by which a broker is believed, and `tls.crt` and `tls.key`, by which the
broker believes us; without these two we log in by password, or not at all. `SPARSE_PASSWORD_FILE` names a file whose
first line is the password of the user in the broker's address. Child processes inherit both.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from brokers.errors import BadFile
from brokers.mqtt.client import MqttTransport
from brokers.mqtt.socket_connect import TlsConfig
from brokers.protocol.broker_url import BrokerAddress, parse_address

log = logging.getLogger(__name__)

TLS_VARIABLE = "SPARSE_TLS"
PASSWORD_VARIABLE = "SPARSE_PASSWORD_FILE"
# MQTT 5, section 3.1.3.6: a password has a length of two bytes.
PASSWORD_LIMIT_BYTES = 65_535


def create_transport(address: str, *, client_id: str | None = None, session_expiry_s: int = 0) -> MqttTransport:
    """A transport to the broker at `address` with the identity of this process, not yet connected.

    Raises `BadAddress`, and for what the environment names `BadFile`, `KeyMisfit`, `NotYetValid` or `Expired`.
    """
    place, tls = resolve_identity(address)
    return MqttTransport(place, client_id=client_id, tls=tls, session_expiry_s=session_expiry_s)


def resolve_identity(address: str) -> tuple[BrokerAddress, TlsConfig]:
    """Where a broker is, with the password that we have for it, and the credentials that it takes. Raises as above."""
    place = with_password(parse_address(address))
    return place, load_tls_config(os.environ.get(TLS_VARIABLE, "")) if place.is_tls else TlsConfig()


def load_tls_config(named: str) -> TlsConfig:
    """The credentials in a folder, checked; of none, the system's authorities and no certificate."""
    if not named:
        return TlsConfig()
    # Only here: whoever speaks without TLS does without.
    from brokers.mqtt.tls_files import CA_FILE, CERT_FILE, KEY_FILE, check_tls_folder

    folder = Path(named)
    cafile, certificate, key = (str(folder / name) for name in (CA_FILE, CERT_FILE, KEY_FILE))
    if not check_tls_folder(folder):
        return TlsConfig(cafile)
    _warn_if_open(Path(key))
    return TlsConfig(cafile, certificate, key)


def with_password(address: BrokerAddress) -> BrokerAddress:
    """The address with the password of its user, if a file has it and the address itself has none."""
    named = os.environ.get(PASSWORD_VARIABLE)
    if not named or address.user is None or address.password is not None:
        return address
    return replace(address, password=read_password(Path(named)))


def read_password(path: Path) -> str:
    """The first line of a file; raises `BadFile`, which says nothing of what is in it."""
    try:
        first = path.read_bytes().partition(b"\n")[0].removesuffix(b"\r")
        password = first.decode()
    except OSError as error:
        raise BadFile(str(path), f"cannot be read: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        password = ""
    if not password or len(first) > PASSWORD_LIMIT_BYTES:
        raise BadFile(
            str(path), f"expected a password in its first line, of 1 to {PASSWORD_LIMIT_BYTES} bytes in UTF-8"
        )
    _warn_if_open(path)
    return password


def _warn_if_open(path: Path) -> None:
    """Say that everybody may read a secret; it may lie in a folder that only we can enter, so it is used."""
    if path.stat().st_mode & 0o004:
        log.warning("%s: everybody on this machine may read it: `chmod 600` it", path)
