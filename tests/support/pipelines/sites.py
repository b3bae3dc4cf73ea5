"""Several sites on one machine: the brokers and the links of a pipeline file, in the hands of a test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brokers.config.pipeline_file import load_pipeline
from brokers.server.link_emulator import LinkEmulator
from monitor.launch.sites import SiteBrokers, set_up_brokers
from tests.support.brokers.mqtt_packets import PacketCapture
from tests.support.environment.external_programs import require_dependency

# From the device: 1 ms to the cloudlet, 9 ms more to the cloud.
THREE_SITES = """
[[site]]
name = "device"
links = [{ to = "cloudlet", delay_ms = 1 }]

[[site]]
name = "cloudlet"
links = [{ to = "cloud", delay_ms = 9 }]

[[site]]
name = "cloud"
"""


@contextmanager
def start_sites(path: Path) -> Iterator[SiteBrokers]:
    """Start a Mosquitto for each site and a relay for each slow link; the file names the brokers from then on."""
    require_dependency("mosquitto")
    with set_up_brokers(load_pipeline(path), "mosquitto", None) as found:
        text = path.read_text()
        for site in found.brokers:
            head = f'[[site]]\nname = "{site}"\n'
            assert head in text
            text = text.replace(head, f'{head}broker = "{found.address(site)}"\n')
        path.write_text(text)
        yield found


def get_link(sites: SiteBrokers, site: str, peer: str) -> LinkEmulator:
    """The relay between two sites."""
    (found,) = [each.emulator for each in sites.links if (each.site, each.config.to) == (site, peer)]
    return found


def capture_link(relay: LinkEmulator) -> dict[str, PacketCapture]:
    """Read all that comes out of a relay from now on, by direction: to be asked before anything crosses."""
    heard: dict[str, PacketCapture] = defaultdict(PacketCapture)
    relay.tap = lambda way, piece: heard[way].feed(piece)
    return heard
