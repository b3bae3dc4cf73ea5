"""Several sites on one machine: the brokers and the links of a pipeline file, in the hands of a test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brokers.config.pipeline_file import load_pipeline
from brokers.server.link_emulator import Relay
from monitor.launch.sites import RunSites, find_sites
from tests.support.brokers.mqtt_packets import Wire
from tests.support.environment.external_programs import need

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
def sites_up(path: Path) -> Iterator[RunSites]:
    """Start a Mosquitto for each site and a relay for each slow link; the file names the brokers from then on."""
    need("mosquitto")
    with find_sites(load_pipeline(path), "mosquitto", None) as found:
        text = path.read_text()
        for site in found.brokers:
            head = f'[[site]]\nname = "{site}"\n'
            assert head in text
            text = text.replace(head, f'{head}broker = "{found.address(site)}"\n')
        path.write_text(text)
        yield found


def link(sites: RunSites, site: str, to: str) -> Relay:
    """The relay between two sites."""
    (found,) = [each.relay for each in sites.links if (each.site, each.table.to) == (site, to)]
    return found


def listen(relay: Relay) -> dict[str, Wire]:
    """Read all that comes out of a relay from now on, by direction: to be asked before anything crosses."""
    heard: dict[str, Wire] = defaultdict(Wire)
    relay.tap = lambda way, piece: heard[way].feed(piece)
    return heard
