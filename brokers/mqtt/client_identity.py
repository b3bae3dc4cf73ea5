"""Credentials of this process for brokers, from the environment, so that no secret is on a command line.

`SPARSE_TLS` names a folder with `ca.crt`, the CA of the broker's certificate, and with `tls.crt` and `tls.key`, our
certificate; without these two we log in by password, or not at all. `SPARSE_PASSWORD_FILE` names a file whose first
line is the password of the user in the broker's address. Child processes inherit both.
"""

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
PASSWORD_LIMIT_BYTES = 65_535  # a password has a two-byte length: MQTT 5.0 section 3.1.3.6


def create_transport(address: str, *, client_id: str | None = None, session_expiry_s: int = 0) -> MqttTransport:
    """Return a transport to the broker at `address` with the credentials of this process, not yet connected.

    Raises `UsageError` for a malformed address and for credentials that cannot be used: see `check_tls_folder`.
    """
    broker, tls = resolve_identity(address)
    return MqttTransport(broker, client_id=client_id, tls=tls, session_expiry_s=session_expiry_s)


def resolve_identity(address: str) -> tuple[BrokerAddress, TlsConfig]:
    """Return the parsed address, with the password for its user, and the TLS files. Raises as `create_transport`."""
    broker = parse_address(address)
    password_path = os.environ.get(PASSWORD_VARIABLE)
    if password_path and broker.user is not None and broker.password is None:
        broker = replace(broker, password=read_password(Path(password_path)))
    return broker, load_tls_config(os.environ.get(TLS_VARIABLE, "")) if broker.is_tls else TlsConfig()


def load_tls_config(path: str) -> TlsConfig:
    """Return the checked TLS files of a folder; for "", the CAs of the system and no certificate."""
    if not path:
        return TlsConfig()
    # Imported here, because cryptography is slow to import and needed with TLS only.
    from brokers.mqtt.tls_files import CA_FILE, CERT_FILE, KEY_FILE, check_tls_folder

    folder = Path(path)
    if not check_tls_folder(folder):
        return TlsConfig(str(folder / CA_FILE))
    _warn_if_world_readable(folder / KEY_FILE)
    return TlsConfig(*(str(folder / name) for name in (CA_FILE, CERT_FILE, KEY_FILE)))


def read_password(path: Path) -> str:
    """Return the first line of a file; raise `BadFile`, without any of the content."""
    try:
        first_line = path.read_bytes().partition(b"\n")[0].removesuffix(b"\r")
        password = first_line.decode()
    except OSError as error:
        raise BadFile(str(path), f"cannot be read: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError:
        password = ""
    if not password or len(first_line) > PASSWORD_LIMIT_BYTES:
        problem = f"expected a password in its first line, of 1 to {PASSWORD_LIMIT_BYTES} bytes in UTF-8"
        raise BadFile(str(path), problem)
    _warn_if_world_readable(path)
    return password


def _warn_if_world_readable(path: Path) -> None:
    """Warn only: the folder around the file may well be readable by us alone."""
    if path.stat().st_mode & 0o004:
        log.warning("%s: all users of this machine can read it: `chmod 600` it", path)
