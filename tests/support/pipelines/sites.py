"""The brokers and links of a pipeline file with several sites, on one machine."""

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
    """Start a Mosquitto for each site and an emulator for each slow link, and add the addresses to the file."""
    require_dependency("mosquitto")
    with set_up_brokers(load_pipeline(path), "mosquitto", None) as sites:
        text = path.read_text()
        for site in sites.brokers:
            header = f'[[site]]\nname = "{site}"\n'
            assert header in text
            text = text.replace(header, f'{header}broker = "{sites.address(site)}"\n')
        path.write_text(text)
        yield sites


def get_link(sites: SiteBrokers, site: str, peer: str) -> LinkEmulator:
    """The link between two sites."""
    (emulator,) = [each.emulator for each in sites.links if (each.site, each.config.to) == (site, peer)]
    return emulator


def capture_link(link: LinkEmulator) -> dict[str, PacketCapture]:
    """Parse all bytes of a link from now on, by direction; must be called before a message crosses it."""
    captures: dict[str, PacketCapture] = defaultdict(PacketCapture)
    link.tap = lambda direction, data: captures[direction].feed(data)
    return captures
