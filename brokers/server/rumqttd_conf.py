"""Configuration of the embedded broker: rumqttd, from the wheel `iotcore`, for machines without Mosquitto.

It passes the contract tests of the transport, and is two to three times slower than Mosquitto. Its limits:

* MQTT 5 only: a listener serves one version, and a publication with properties never reaches a 3.1.1 subscriber.
* No bridges, no passwords, no persistence.
* It keeps a bounded log per topic filter, read or not, and serves subscribers from it. A subscriber that falls behind
  by more than the log loses the oldest publications.
"""

import sys

# Per topic filter: publications that its slowest reader has yet to receive. Two tensors of 64 MiB; readers in other
# processes kept up with 1 GiB sent without a pause.
_LOG_BYTES = 128 << 20
_SEGMENT_BYTES = 32 << 20  # dropped whole; each ends with the packet that fills it, so large packets need few segments

# Run in a child process, because rumqttd cannot be stopped. It logs every packet as an error, hence the level.
_PROGRAM = """\
import logging, sys
logging.basicConfig(level=logging.WARNING)
logging.getLogger("rumqttd").setLevel(logging.CRITICAL)
from iotcore import IotCoreBroker
IotCoreBroker(config_path=sys.argv[1]).run_forever()
"""


def render(host: str, port: int, max_packet_bytes: int) -> str:
    """Return rumqttd's TOML. It does not announce `max_packet_bytes`, it disconnects clients that exceed it."""
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return f"""\
id = 0

[router]
id = 0
max_connections = 1000
max_outgoing_packet_count = 200
max_segment_size = {_SEGMENT_BYTES}
max_segment_count = {_LOG_BYTES // _SEGMENT_BYTES}

[v5.1]
name = "v5"
listen = "{address}"
next_connection_delay_ms = 1

[v5.1.connections]
connection_timeout_ms = 10000
max_payload_size = {max_packet_bytes}
max_inflight_count = 200
dynamic_filters = true
"""


def command(config_path: str) -> list[str]:
    """Return the command that runs the broker; -I keeps a local folder named iotcore from shadowing the wheel."""
    return [sys.executable, "-I", "-c", _PROGRAM, config_path]
