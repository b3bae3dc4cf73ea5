"""A Mosquitto with TLS and the access list of a pipeline, and credentials for its clients."""

from __future__ import annotations

import getpass
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.config.topology import Bridge
from brokers.mqtt.client import MqttTransport
from brokers.mqtt.socket_connect import TlsConfig
from brokers.mqtt.tls_files import utc_now
from brokers.security.acl import all_sites, broker_username, render_acl
from brokers.security.certificates import (
    CertificateKeyPair,
    Identity,
    ensure_certificates,
    issue_certificate,
    pipeline_identities,
    read_ca,
)
from brokers.server import mosquitto_conf as mosquitto
from brokers.server.mosquitto_conf import ListenerSecurity, MosquittoConfig
from tests.support.brokers.ports import free_port
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.processes import eventually


@dataclass(frozen=True)
class SecureBroker:
    """A running broker with access control."""

    port: int
    certs: Path
    log_file: Path
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return f"mqtts://localhost:{self.port}"

    def read_log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def denied_lines(self) -> list[str]:
        """The lines of its log about denied requests."""
        return [line for line in self.read_log().splitlines() if "Denied" in line]

    def accesses(self) -> set[tuple[str, str, str]]:
        """User, "read" or "write", and topic of all messages in its log, except those of bridges."""
        text = self.read_log()
        users = dict(re.findall(r" as (\S+) \(p\d, c\d, k\d+, u'([^']+)'\)", text))
        lines = re.findall(r"(Received PUBLISH from|Sending PUBLISH to) (\S+) \(d\d, q\d, r\d, m\d+, '([^']+)'", text)
        verbs = {"Received PUBLISH from": "write", "Sending PUBLISH to": "read"}
        return {(users[client], verbs[verb], topic) for verb, client, topic in lines if client in users}

    def create_transport(self, name: str | Path) -> MqttTransport:
        """A transport, not yet connected, with the credentials of this identity or in this folder."""
        return MqttTransport(self.address, tls=tls_from_folder(self.certs / name))


def forge_credentials(
    certs: Path,
    name: str,
    *,
    hosts: tuple[str, ...] = (),
    ca: CertificateKeyPair | None = None,
    valid_from_days: float = 0,
    valid_days: int = 30,
) -> Path:
    """Create credentials of any name, authority and time, which `sparse certs` does not; returns their folder."""
    begin = utc_now() + timedelta(days=valid_from_days)
    pair = issue_certificate(ca or read_ca(certs, utc_now()), Identity(name, hosts), begin, valid_days)
    folder = certs / f"forged-{len(list(certs.iterdir()))}"
    folder.mkdir()
    (folder / "tls.crt").write_bytes(pair.certificate_pem)
    (folder / "tls.key").write_bytes(pair.key_pem)
    (folder / "tls.key").chmod(0o600)
    (folder / "ca.crt").write_bytes((certs / "authority" / "ca.crt").read_bytes())
    return folder


def tls_from_folder(folder: Path) -> TlsConfig:
    return TlsConfig(str(folder / "ca.crt"), str(folder / "tls.crt"), str(folder / "tls.key"))


def create_pipeline_certs(folder: Path, pipeline: Pipeline, valid_days: int = 30) -> Path:
    """Create the certificates of all identities of a pipeline."""
    ensure_certificates(folder, pipeline_identities(pipeline, {}), days=valid_days)
    return folder


@contextmanager
def start_secure_broker(
    folder: Path,
    pipeline_or_file: Path | Pipeline,
    site: str = "local",
    *,
    port: int | None = None,
    bridges: tuple[Bridge, ...] = (),
    password_file: Path | None = None,
    extra_acl: str = "",
    credentials: Path | None = None,
) -> Iterator[SecureBroker]:
    """Start the broker of a site with the certificates in `folder/certs`, or with `credentials`.

    `extra_acl` is appended to its access list.
    """
    require_dependency("mosquitto")
    pipeline = load_pipeline(pipeline_or_file) if isinstance(pipeline_or_file, Path) else pipeline_or_file
    certs = create_pipeline_certs(folder / "certs", pipeline)
    port = port or free_port()
    # A broker that is started again writes another log.
    stem = f"{site}-{port}-{len(list(folder.iterdir()))}"
    access, config, log = (folder / f"{stem}.{ending}" for ending in ("acl", "conf", "log"))
    access.write_text(render_acl(pipeline, site) + extra_acl)
    access.chmod(0o600)
    locks = ListenerSecurity(credentials or certs / broker_username(site), access, password_file)
    rendered = mosquitto.render(
        MosquittoConfig(port, bridges=bridges, accepts_bridges=len(all_sites(pipeline)) > 1, security=locks)
    )
    # Started by root, it would switch to a user who cannot read the folder.
    config.write_text(f"user {getpass.getuser()}\n{rendered}log_type all\nconnection_messages true\n")
    with log.open("wb") as file:
        process = subprocess.Popen([mosquitto.find_mosquitto() or "", "-c", str(config)], stderr=file)
    try:
        eventually("the broker", lambda: f"on port {port}" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield SecureBroker(port, certs, log, process)
    finally:
        process.terminate()
        process.wait(60)


def write_password_file(path: Path, passwords: Mapping[str, str]) -> Path:
    """Write a password file of Mosquitto."""
    path.touch(mode=0o600)
    path.write_text("".join(f"{user}:{password}\n" for user, password in passwords.items()))
    subprocess.run([require_dependency("mosquitto_passwd"), "-U", path], check=True)  # hashes the file
    return path
