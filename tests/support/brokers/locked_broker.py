"""A Mosquitto with locked doors, as `sparse certs` and the access list of a pipeline make them; and who comes to it."""

from __future__ import annotations

import getpass
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from brokers.config.bridge_rules import Bridge
from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.mqtt.client import MqttTransport
from brokers.mqtt.socket_connect import Tls
from brokers.mqtt.tls_files import now, read_signer
from brokers.security.acl import render_access
from brokers.security.cert_store import keep
from brokers.security.dev_ca import Identity, Pair, identities, issue
from brokers.security.principals import all_sites, broker_name
from brokers.server import mosquitto_conf as mosquitto
from brokers.server.mosquitto_conf import Locks, MosquittoConfig
from tests.support.brokers.ports import free_port
from tests.support.environment.external_programs import need
from tests.support.pipelines.processes import eventually


@dataclass(frozen=True)
class Door:
    """A locked broker that runs."""

    port: int
    certs: Path
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> str:
        return f"mqtts://localhost:{self.port}"

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def denied(self) -> list[str]:
        """What it has refused, in its own words."""
        return [line for line in self.said().splitlines() if "Denied" in line]

    def used(self) -> set[tuple[str, str, str]]:
        """Who has done what with which topic: ("camera.door", "write", "sparse/..."); bridges are left out."""
        said = self.said()
        users = dict(re.findall(r" as (\S+) \(p\d, c\d, k\d+, u'([^']+)'\)", said))
        lines = re.findall(r"(Received PUBLISH from|Sending PUBLISH to) (\S+) \(d\d, q\d, r\d, m\d+, '([^']+)'", said)
        verbs = {"Received PUBLISH from": "write", "Sending PUBLISH to": "read"}
        return {(users[client], verbs[what], topic) for what, client, topic in lines if client in users}

    def line(self, name: str | Path) -> MqttTransport:
        """A transport of this identity, or with the credentials in this folder; not yet connected."""
        return MqttTransport(self.address, tls=tls_of(self.certs / name))


def authority_of(certs: Path) -> Pair:
    """The authority in a folder of certificates."""
    return Pair(*read_signer(certs / "authority" / "ca.crt", certs / "authority" / "ca.key"))


def forge(
    certs: Path,
    name: str,
    *,
    hosts: tuple[str, ...] = (),
    authority: Pair | None = None,
    begin_days: float = 0,
    days: int = 30,
) -> Path:
    """Credentials that `sparse certs` would not make: of any name, authority and time; their folder."""
    begin = now() + timedelta(days=begin_days)
    pair = issue(authority or authority_of(certs), Identity(name, hosts), begin, days)
    folder = certs / f"forged-{len(list(certs.iterdir()))}"
    folder.mkdir()
    (folder / "tls.crt").write_bytes(pair.certificate_pem)
    (folder / "tls.key").write_bytes(pair.key_pem)
    (folder / "tls.key").chmod(0o600)
    (folder / "ca.crt").write_bytes((certs / "authority" / "ca.crt").read_bytes())
    return folder


def tls_of(folder: Path) -> Tls:
    return Tls(str(folder / "ca.crt"), str(folder / "tls.crt"), str(folder / "tls.key"))


def certs_for(folder: Path, pipeline: Pipeline, days: int = 30) -> Path:
    """Certificates for all of a pipeline."""
    keep(folder, identities(pipeline, {}), days=days)
    return folder


@contextmanager
def locked(
    folder: Path,
    file: Path | Pipeline,
    site: str = "local",
    *,
    port: int | None = None,
    bridges: tuple[Bridge, ...] = (),
    passwords: Path | None = None,
    more_access: str = "",
    credentials: Path | None = None,
) -> Iterator[Door]:
    """The broker of a site, with certificates in `folder/certs`; its log has all that it refuses.

    `credentials` are its own in place of those, `more_access` is put behind its access list.
    """
    need("mosquitto")
    pipeline = load_pipeline(file) if isinstance(file, Path) else file
    certs = certs_for(folder / "certs", pipeline)
    port = port or free_port()
    # It may be started again: its log goes on in another file.
    began = f"{site}-{port}-{len(list(folder.iterdir()))}"
    access, config, log = (folder / f"{began}.{ending}" for ending in ("acl", "conf", "log"))
    access.write_text(render_access(pipeline, site) + more_access)
    access.chmod(0o600)
    locks = Locks(credentials or certs / broker_name(site), access, passwords)
    rendered = mosquitto.render(
        MosquittoConfig(port, bridges=bridges, bridged=len(all_sites(pipeline)) > 1, locks=locks)
    )
    # Else, started by root, it becomes another user, who may not read the test's folder.
    config.write_text(f"user {getpass.getuser()}\n{rendered}log_type all\nconnection_messages true\n")
    with log.open("wb") as said:
        process = subprocess.Popen([mosquitto.find() or "", "-c", str(config)], stderr=said)
    try:
        eventually("the locked broker", lambda: f"on port {port}" in log.read_text() or process.poll() is not None, 20)
        assert process.poll() is None, log.read_text()
        yield Door(port, certs, log, process)
    finally:
        process.terminate()
        process.wait(20)


def hashed(path: Path, passwords: Mapping[str, str]) -> Path:
    """A Mosquitto's password_file."""
    path.touch(mode=0o600)
    path.write_text("".join(f"{user}:{password}\n" for user, password in passwords.items()))
    subprocess.run([need("mosquitto_passwd"), "-U", path], check=True)  # hashed where they are, not on a command line
    return path
