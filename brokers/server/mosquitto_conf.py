"""The configuration of a Mosquitto for one site, right for 2.0 and for 2.1. Pure; `site.py` starts one."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from brokers.config.bridge_rules import Bridge, topic_rules

# 2.1 and later disconnect a client whose packet is over 2,000,000 bytes unless told otherwise; 2.0 has no limit. Say
# MQTT's own.
MAX_PACKET_BYTES = 268_435_455
# Mosquitto allocates each packet twice, and glibc gives pieces over 128 KiB back to the kernel at once, to fetch and
# fault them in again for the next packet: two thirds of the broker's time (tests/bench/roundtrip.py). Let it keep some.
# Other C libraries ignore these.
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
_SBIN = (
    "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"  # where packages put it, and where many users' PATH does not look
)
# Seconds between a bridge's attempts to connect: first, and at most. The default begins with 5 and goes up to 30.
_BRIDGE_WAIT_S = (1, 10)


@dataclass(frozen=True, slots=True)
class ListenerSecurity:
    """Who may come in, and what they may do there: TLS with certificates on both sides, and an access list."""

    certs_folder: Path  # a folder of `sparse certs`: ca.crt, tls.crt, tls.key
    acl_file: Path
    password_file: Path | None = None  # for clients without a certificate of their own; else each needs one


@dataclass(frozen=True, slots=True)
class MosquittoConfig:
    """What can differ between sites; the rest suits tensors and is the same everywhere."""

    port: int
    host: str = "127.0.0.1"  # empty: every address of the machine
    max_packet_bytes: int = MAX_PACKET_BYTES
    # For one client that does not read: the broker drops what is past this, and the owner of a request sends it again.
    # The count is what holds for QoS 0 (tried on 2.0.11: the bytes do not), so with chunks of 512 KiB it is 512 MB for
    # a client.
    max_queued_messages: int = 1000
    max_queued_bytes: int = 512 << 20
    max_inflight_messages: int = 100
    bridges: tuple[Bridge, ...] = ()
    accepts_bridges: bool = False  # whether others keep bridges to this one
    security: ListenerSecurity | None = None
    persistence_location: Path | None = (
        None  # where sessions and retained messages outlive the broker; None: they do not
    )


def render(config: MosquittoConfig) -> str:
    """Return mosquitto.conf: one listener, its limits, its locks, and the bridges to other sites."""
    return "\n".join([*_listener(config), "", *_limits(config), "", *_log(), *_bridges(config), ""])


def _listener(config: MosquittoConfig) -> list[str]:
    lines = [f"listener {config.port} {config.host}".rstrip()]
    locks = config.security
    if locks is None:
        return [*lines, "allow_anonymous true"]
    lines += [
        f"cafile {locks.certs_folder / 'ca.crt'}",
        f"certfile {locks.certs_folder / 'tls.crt'}",
        f"keyfile {locks.certs_folder / 'tls.key'}",
        "tls_version tlsv1.2",  # and later: TLS 1.3 where both have it
    ]
    if locks.password_file is None:
        lines += ["require_certificate true", "use_identity_as_username true"]
    else:
        lines += [f"password_file {locks.password_file}"]
    return [*lines, "allow_anonymous false", f"acl_file {locks.acl_file}"]


def _limits(config: MosquittoConfig) -> list[str]:
    kept = ["persistence false"]
    if config.persistence_location is not None:
        kept = ["persistence true", f"persistence_location {config.persistence_location}/", "autosave_interval 60"]
    return [
        *kept,
        "set_tcp_nodelay true",
        f"max_packet_size {config.max_packet_bytes}",
        f"max_inflight_messages {config.max_inflight_messages}",
        f"max_queued_messages {config.max_queued_messages}",
        f"max_queued_bytes {config.max_queued_bytes}",
        # What a bridge could not deliver while its link was down goes when it is back: within the bounds above.
        *(["queue_qos0_messages true"] if config.bridges or config.accepts_bridges else []),
    ]


def _log() -> list[str]:
    return ["connection_messages false", "log_dest stderr", "log_type error", "log_type warning"]


def _bridges(config: MosquittoConfig) -> list[str]:
    return [line for bridge in config.bridges for line in _bridge(bridge)]


def _bridge(bridge: Bridge) -> list[str]:
    first_s, longest_s = _BRIDGE_WAIT_S
    lines = [
        "",
        f"connection {bridge.name}",
        f"address {bridge.host}:{bridge.port}",
        "bridge_protocol_version mqttv50",  # else it speaks 3.1.1, and Response Topic and all properties are lost
        f"remote_clientid {bridge.name}",
        f"local_clientid {bridge.name}.local",
        "cleansession false",
        "notifications false",
        "keepalive_interval 10",
        f"restart_timeout {first_s} {longest_s}",
        "bridge_attempt_unsubscribe false",
    ]
    if bridge.user is not None:
        lines.append(f"remote_username {bridge.user}")
    if bridge.password is not None:
        lines.append(f"remote_password {bridge.password}")
    if bridge.tls is not None:
        lines += [
            f"bridge_cafile {bridge.tls / 'ca.crt'}",
            f"bridge_certfile {bridge.tls / 'tls.crt'}",
            f"bridge_keyfile {bridge.tls / 'tls.key'}",
        ]
    return lines + [f"topic {rule.topic_filter} {rule.direction} {rule.qos}" for rule in topic_rules(bridge.sides)]


def find_mosquitto() -> str | None:
    """Return the path of the mosquitto program, or None where it is not installed."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path=_SBIN)
