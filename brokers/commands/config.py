"""`sparse broker config FILE SITE`: the mosquitto.conf of the broker of a site."""

import ipaddress
import sys
from pathlib import Path
from typing import Annotated

import typer

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.config.schema import LinkTable, SiteTable
from brokers.config.topology import Bridge
from brokers.errors import BadFile
from brokers.mqtt.client import read_password
from brokers.protocol.broker_url import BrokerAddress, parse_address
from brokers.server.mosquitto_conf import ListenerSecurity, MosquittoConfig, render

_CONFIG_FOLDER = Path("/etc/mosquitto")


def command(
    file: Annotated[Path, typer.Argument(help="The pipeline file, with the broker addresses of its sites.")],
    site: Annotated[str, typer.Argument(help="The site of the broker.")],
    certs: Annotated[
        Path, typer.Option(help="The folder on its machine with ca.crt, tls.crt and tls.key: `sparse certs`.")
    ] = _CONFIG_FOLDER / "certs",
    access: Annotated[
        Path, typer.Option(help="The access list on its machine: `sparse broker access`.")
    ] = _CONFIG_FOLDER / "access.list",
    passwords: Annotated[
        Path | None, typer.Option(help="A file of mosquitto_passwd: passwords in place of client certificates.")
    ] = None,
    data: Annotated[
        Path, typer.Option(help="The folder for sessions and retained messages that survive a restart.")
    ] = Path("/var/lib/mosquitto"),
    open_: Annotated[
        bool, typer.Option("--open", help="Allow mqtt:// addresses that other machines can reach.")
    ] = False,
) -> int:
    """Print the mosquitto.conf of a site: listener, access control and bridges.

    For Mosquitto 2.0 and later. The pipeline file has the broker addresses of the site and of those that it links to;
    mqtts:// means TLS with certificates on both sides, and an access list.

    Example: sparse broker config street.toml cloud > mosquitto.conf
    """
    pipeline = load_pipeline(file)
    security = ListenerSecurity(certs, access, passwords)
    config = _make_config(pipeline, pipeline.find_site(site), security, data, allow_open=open_)
    print(f"# Site {site} of pipeline {pipeline.name}, for Mosquitto 2.0 and later: made by `sparse broker config`.")  # noqa: T201 - the result
    print(render(config), end="")  # noqa: T201 - the result
    if config.security is None:
        print(f"{pipeline.find_site(site).broker}: no access control, any client may do everything", file=sys.stderr)  # noqa: T201 - a hint
    if any(bridge.password for bridge in config.bridges):
        print("the output contains a password of a bridge: only the broker may read it", file=sys.stderr)  # noqa: T201 - a hint
    return 0


def _make_config(
    pipeline: Pipeline, site: SiteTable, security: ListenerSecurity, data: Path, *, allow_open: bool
) -> MosquittoConfig:
    address = _broker_address(pipeline, site)
    is_private = _is_private(address)
    key = f"site.{site.name}.broker"
    if not address.is_tls and not allow_open and not is_private:
        problem = f"{address} has no access control and other machines can reach it: expected mqtts://, or --open"
        raise BadFile(pipeline.path, problem, key)
    if security.password_file is not None and not address.is_tls:
        raise BadFile(pipeline.path, f"{address} sends passwords unencrypted: expected mqtts:// for --passwords", key)
    return MosquittoConfig(
        address.port,
        address.host if is_private else "",
        bridges=tuple(_make_bridge(pipeline, site, link, security.certs_folder) for link in site.links),
        accepts_bridges=any(link.to == site.name for other in pipeline.site for link in other.links),
        security=security if address.is_tls else None,
        persistence_location=data,
    )


def _broker_address(pipeline: Pipeline, site: SiteTable) -> BrokerAddress:
    if site.broker is None:
        raise BadFile(pipeline.path, "is missing: expected 'mqtts://HOST'", f"site.{site.name}.broker")
    return parse_address(site.broker)


def _make_bridge(pipeline: Pipeline, site: SiteTable, link: LinkTable, certs: Path) -> Bridge:
    remote = _broker_address(pipeline, pipeline.find_site(link.to))
    local = _broker_address(pipeline, site)
    if remote.is_unix_socket:
        raise BadFile(pipeline.path, f"a bridge cannot use a Unix socket, got {remote}", f"site.{link.to}.broker")
    if (local.host, local.port) == (remote.host, remote.port):
        problem = f"a broker cannot have a bridge to itself: sites {site.name!r} and {link.to!r} share {remote}"
        raise BadFile(pipeline.path, problem, f"site.{site.name}.links")
    password = None
    if link.password_file is not None:
        path = pipeline.folder / link.password_file
        password = read_password(path)
        if password != password.strip():
            raise BadFile(str(path), "the password begins or ends with a space, which mosquitto.conf does not allow")
    return Bridge(
        site.name,
        link.to,
        remote.host,
        remote.port,
        pipeline.topology.bridge_sides(site.name, link.to),
        user=link.user,
        password=password,
        tls=certs if remote.is_tls else None,
    )


def _is_private(address: BrokerAddress) -> bool:
    """Whether only this machine reaches the address."""
    if address.is_unix_socket or address.host == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.host).is_loopback
    except ValueError:
        return False
