"""The configuration of a Mosquitto for one site, right for 2.0 and for 2.1. Pure; `site.py` starts it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

# 2.1 and later disconnect a client whose packet is over 2,000,000 bytes unless told otherwise; 2.0 has no limit. Say
# MQTT's own.
MAX_PACKET_BYTES = 268_435_455
# Mosquitto allocates each packet twice, and glibc gives pieces over 128 KiB back to the kernel at once, to fetch and
# fault them in again for the next packet: two thirds of the broker's time (tests/bench/roundtrip.py). Let it keep some.
# Other C libraries ignore these.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
_SBIN = (
    "/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"  # where packages put it, and where many users' PATH does not look
)


@dataclass(frozen=True, slots=True)
class MosquittoConfig:
    """What can differ between sites; the rest suits tensors and is the same everywhere."""

    port: int
    host: str = "127.0.0.1"
    max_packet_bytes: int = MAX_PACKET_BYTES
    # For one client that does not read: the broker drops what is past this, and the owner of a request sends it again.
    # The count is what holds for QoS 0 (tried on 2.0.11: the bytes do not), so with chunks of 512 KiB it is 512 MB for
    # a client.
    max_queued_messages: int = 1000
    max_queued_bytes: int = 512 << 20
    max_inflight_messages: int = 100


def render(config: MosquittoConfig) -> str:
    """Return mosquitto.conf: one open listener, nothing kept on disk, trouble only to standard error."""
    return f"""\
listener {config.port} {config.host}
allow_anonymous true
persistence false
set_tcp_nodelay true
max_packet_size {config.max_packet_bytes}
max_inflight_messages {config.max_inflight_messages}
max_queued_messages {config.max_queued_messages}
max_queued_bytes {config.max_queued_bytes}
connection_messages false
log_dest stderr
log_type error
log_type warning
"""


def find() -> str | None:
    """Return the path of the mosquitto program, or None where it is not installed."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path=_SBIN)
