"""The configuration of the embedded broker: rumqttd, from the wheel `iotcore`, where nothing may be installed.

It keeps the transport's contract, two to three times slower than Mosquitto. What it cannot do:

* One listener speaks one version. An MQTT 3.1.1 client is refused on the MQTT 5 port; `plain_port` opens a second one
  for it, yet a 5 publication with properties never reaches a 3.1.1 subscriber.
* No bridges, no passwords here, no persistence.
* It keeps a log for each topic filter, read or not, and serves subscribers from it. The log is bounded; a subscriber
  that falls further behind than it loses the oldest.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

# For each filter: what may be on the way to its slowest reader, and what stays in memory after it. Two tensors of 64
# MiB. Readers in processes of their own kept up with 1 GiB sent without a pause; one that stops reading loses the
# oldest.
LOG_BYTES = 128 << 20
SEGMENT_BYTES = 32 << 20  # dropped whole; each ends with the packet that fills it, so large packets want few segments
MAX_PACKET_BYTES = 268_435_455  # MQTT's own limit: rumqttd does not announce another, it disconnects who is over it

# Run in a child: rumqttd has no way to stop. Its tracing marks every packet as an error, hence the level.
PROGRAM = """\
import logging, sys
logging.basicConfig(level=logging.WARNING)
logging.getLogger("rumqttd").setLevel(logging.CRITICAL)
from iotcore import IotCoreBroker
IotCoreBroker(config_path=sys.argv[1]).run_forever()
"""


@dataclass(frozen=True, slots=True)
class RumqttdConfig:
    """What can differ between sites."""

    port: int
    host: str = "127.0.0.1"
    mqtt311_port: int | None = None  # for MQTT 3.1.1 clients
    max_packet_bytes: int = MAX_PACKET_BYTES
    log_bytes: int = LOG_BYTES


def render(config: RumqttdConfig) -> str:
    """Return rumqttd's TOML."""
    segments = max(2, -(-config.log_bytes // SEGMENT_BYTES))
    router = f"""\
id = 0

[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = {SEGMENT_BYTES}
max_segment_count = {segments}
"""
    listeners = [_listener("v5", config.host, config.port, config.max_packet_bytes)]
    if config.mqtt311_port is not None:
        listeners.append(_listener("v4", config.host, config.mqtt311_port, config.max_packet_bytes))
    return router + "".join(listeners)


def _listener(version: str, host: str, port: int, max_packet_bytes: int) -> str:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"""
[{version}.1]
name = "{version}"
listen = "{address}"
next_connection_delay_ms = 1

[{version}.1.connections]
connection_timeout_ms = 10000
max_payload_size = {max_packet_bytes}
max_inflight_count = 200
dynamic_filters = true
"""


def command(config_path: str) -> list[str]:
    """Return the command that runs it; -P and -I keep a folder named iotcore from shadowing the wheel."""
    return [sys.executable, "-I", "-c", PROGRAM, config_path]
