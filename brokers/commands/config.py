"""`sparse broker config FILE SITE`: the mosquitto.conf of a site, for wherever its broker runs."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path
from typing import Annotated

import typer

from brokers.config.bridge_rules import Bridge
from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.config.schema import LinkTable, SiteTable
from brokers.errors import BadFile, UsageError, did_you_mean
from brokers.mqtt.client_identity import read_password
from brokers.protocol.broker_url import BrokerAddress, parse_address
from brokers.server.mosquitto_conf import ListenerSecurity, MosquittoConfig, render

_HOME = Path("/etc/mosquitto")


class UnsecuredBroker(UsageError):
    """A broker that anybody who reaches it could use."""

    def __init__(self, file: str, site: str, address: str) -> None:
        super().__init__(
            "UnsecuredBroker",
            f"{file}: site {site!r}: {address} lets everybody in who reaches it: expected mqtts://, "
            "or --open where only friends reach it",
        )


def command(
    file: Annotated[Path, typer.Argument(help="The pipeline file; its sites say where their brokers are.")],
    site: Annotated[str, typer.Argument(help="The site whose broker it is for.")],
    certs: Annotated[
        Path, typer.Option(help="Where that machine has ca.crt, tls.crt and tls.key of the broker: `sparse certs`.")
    ] = _HOME / "certs",
    access: Annotated[
        Path, typer.Option(help="Where that machine has the access list, of `sparse broker access`.")
    ] = _HOME / "access.list",
    passwords: Annotated[
        Path | None, typer.Option(help="A file of mosquitto_passwd: clients then need a password, no certificate.")
    ] = None,
    data: Annotated[
        Path, typer.Option(help="Where the broker keeps sessions and retained messages over a restart.")
    ] = Path("/var/lib/mosquitto"),
    open_: Annotated[bool, typer.Option("--open", help="No locks: an address with mqtt:// that others reach.")] = False,
) -> int:
    """Print the whole mosquitto.conf of a site: its listener, limits, locks, and bridges.

    For Mosquitto 2.0 and later. The file says where the brokers are: of the site, and of those that it links to.
    mqtts:// means TLS, certificates on both sides, and an access list.

    Example: sparse broker config street.toml cloud > mosquitto.conf
    """
    pipeline = load_pipeline(file)
    table = find_site(pipeline, site)
    address = site_broker_address(pipeline, table)
    if not address.is_tls and not open_ and not _is_private(address):
        raise UnsecuredBroker(str(file), site, str(address))
    if passwords is not None and not address.is_tls:
        raise BadFile(str(file), f"{address} has no TLS: passwords would cross the network in clear", "site")
    config = _config(pipeline, table, address, ListenerSecurity(certs, access, passwords), data)
    print(f"# Site {site} of pipeline {pipeline.name}, for Mosquitto 2.0 and later: made by `sparse broker config`.")  # noqa: T201 - the answer
    print(render(config), end="")  # noqa: T201 - the answer
    if config.security is None:
        print(f"no locks: {address} says mqtt://, and whoever reaches it may do everything", file=sys.stderr)  # noqa: T201 - for a person
    if any(bridge.password for bridge in config.bridges):
        print("it holds the password of a bridge: let nobody but the broker read it", file=sys.stderr)  # noqa: T201 - for a person
    return 0


def _config(
    pipeline: Pipeline, site: SiteTable, address: BrokerAddress, locks: ListenerSecurity, data: Path
) -> MosquittoConfig:
    return MosquittoConfig(
        address.port,
        address.host if _is_private(address) else "",
        bridges=tuple(make_bridge(pipeline, site, link, locks.certs_folder) for link in site.links),
        accepts_bridges=any(link.to == site.name for other in pipeline.site for link in other.links),
        security=locks if address.is_tls else None,
        persistence_location=data,
    )


def find_site(pipeline: Pipeline, name: str) -> SiteTable:
    """Return the `[[site]]` of that name, or raise one line that says which there are."""
    names = [site.name for site in pipeline.site]
    if name not in names:
        raise BadFile(
            pipeline.path, f"no site {name!r}{did_you_mean(name, names)}: it has {', '.join(names) or 'none'}"
        )
    return pipeline.site[names.index(name)]


def site_broker_address(pipeline: Pipeline, site: SiteTable) -> BrokerAddress:
    """Return where the broker of a site is, or raise one line that says that the file does not tell."""
    if site.broker is None:
        raise BadFile(pipeline.path, f"site {site.name!r} has no address: expected broker = 'mqtts://HOST'", "site")
    return parse_address(site.broker)


def make_bridge(pipeline: Pipeline, site: SiteTable, link: LinkTable, certs: Path) -> Bridge:
    """Return the bridge of a link, as the broker of `site` is told of it."""
    there = site_broker_address(pipeline, find_site(pipeline, link.to))
    if there.is_unix_socket:
        raise BadFile(pipeline.path, f"site {link.to!r}: no bridge leads to a Unix socket, {there}", "site")
    here = site_broker_address(pipeline, site)
    if (here.host, here.port) == (there.host, there.port):  # it would send every message to itself, without end
        raise BadFile(
            pipeline.path, f"sites {site.name!r} and {link.to!r} share {there}: it keeps no bridge to itself", "site"
        )
    return Bridge(
        site.name,
        link.to,
        there.host,
        there.port,
        pipeline.topology.bridge_sides(site.name, link.to),
        user=link.user,
        password=_password(pipeline.folder / link.password_file) if link.password_file is not None else None,
        tls=certs if there.is_tls else None,
    )


def _password(path: Path) -> str:
    password = read_password(path)
    if password != password.strip():
        raise BadFile(str(path), "Mosquitto takes no password that begins or ends with a space")
    return password


def _is_private(address: BrokerAddress) -> bool:
    """Whether only this machine reaches it."""
    if address.is_unix_socket or address.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return False
