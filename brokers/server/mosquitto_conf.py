"""mosquitto.conf for the broker of a site, for Mosquitto 2.0 and 2.1."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from brokers.config.topology import Bridge, topic_rules
from brokers.mqtt.publish_packet import MAX_REMAINING_BYTES

# Mosquitto allocates each packet twice, and glibc returns blocks over 128 KiB to the kernel at once, only to map and
# fault them in again for the next packet: two thirds of the broker's time (tests/bench/roundtrip.py). These let it keep
# some; other C libraries ignore them.
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
_SBIN = "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"  # where packages install it; not in every user's PATH
# For one client that does not read: the broker drops the rest, and the sources of those requests send them again. At
# QoS 0 only the count holds (tested on 2.0.11: the bytes do not), which with chunks of 512 KiB is 512 MB a client.
_MAX_QUEUED_MESSAGES = 1000
_MAX_QUEUED_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class ListenerSecurity:
    """TLS with certificates on both sides, and an access list."""

    certs_folder: Path  # made by `sparse certs`: ca.crt, tls.crt, tls.key
    acl_file: Path
    password_file: Path | None = None  # for clients that log in by password; None: each needs a certificate


@dataclass(frozen=True, slots=True)
class MosquittoConfig:
    """The settings that differ between sites; all others suit tensors and are the same everywhere."""

    port: int
    host: str = "127.0.0.1"  # empty: all addresses of the machine
    max_packet_bytes: int = MAX_REMAINING_BYTES
    bridges: tuple[Bridge, ...] = ()
    accepts_bridges: bool = False  # whether other brokers keep bridges to this one
    security: ListenerSecurity | None = None
    persistence_location: Path | None = None  # where sessions and retained messages survive a restart


def render(config: MosquittoConfig) -> str:
    """Return the text of mosquitto.conf: one listener, its limits and security, and the bridges to other sites."""
    lines = [f"listener {config.port} {config.host}".rstrip(), *_security(config.security), ""]
    if config.persistence_location is None:
        lines += ["persistence false"]
    else:
        lines += ["persistence true", f"persistence_location {config.persistence_location}/", "autosave_interval 60"]
    lines += [
        "set_tcp_nodelay true",
        f"max_packet_size {config.max_packet_bytes}",  # by default 2.1 disconnects clients above 2,000,000 bytes
        "max_inflight_messages 100",
        f"max_queued_messages {_MAX_QUEUED_MESSAGES}",
        f"max_queued_bytes {_MAX_QUEUED_BYTES}",
    ]
    if config.bridges or config.accepts_bridges:
        lines += ["queue_qos0_messages true"]  # while a bridge is down, QoS 0 is queued too, within the limits above
    lines += ["", "connection_messages false", "log_dest stderr", "log_type error", "log_type warning"]
    for bridge in config.bridges:
        lines += _bridge(bridge)
    return "\n".join([*lines, ""])


def _security(security: ListenerSecurity | None) -> list[str]:
    if security is None:
        return ["allow_anonymous true"]
    lines = [*_tls_files(security.certs_folder, ""), "tls_version tlsv1.2"]  # and later: TLS 1.3 where both have it
    if security.password_file is None:
        lines += ["require_certificate true", "use_identity_as_username true"]
    else:
        lines += [f"password_file {security.password_file}"]
    return [*lines, "allow_anonymous false", f"acl_file {security.acl_file}"]


def _tls_files(folder: Path, prefix: str) -> list[str]:
    return [
        f"{prefix}cafile {folder / 'ca.crt'}",
        f"{prefix}certfile {folder / 'tls.crt'}",
        f"{prefix}keyfile {folder / 'tls.key'}",
    ]


def _bridge(bridge: Bridge) -> list[str]:
    lines = [
        "",
        f"connection {bridge.name}",
        f"address {bridge.host}:{bridge.port}",
        "bridge_protocol_version mqttv50",  # the default, 3.1.1, loses Response Topic and all other properties
        f"remote_clientid {bridge.name}",
        f"local_clientid {bridge.name}.local",
        "cleansession false",
        "notifications false",
        "keepalive_interval 10",
        "restart_timeout 1 10",  # back-off in seconds; by default 5 to 30
        "bridge_attempt_unsubscribe false",
    ]
    if bridge.user is not None:
        lines.append(f"remote_username {bridge.user}")
    if bridge.password is not None:
        lines.append(f"remote_password {bridge.password}")
    if bridge.tls is not None:
        lines += _tls_files(bridge.tls, "bridge_")
    return lines + [f"topic {rule.topic_filter} {rule.direction} {rule.qos}" for rule in topic_rules(bridge.sides)]


def find_mosquitto() -> str | None:
    """Return the path of the mosquitto program, or None if it is not installed."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path=_SBIN)
