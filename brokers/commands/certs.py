"""`sparse certs FILE`: a development certificate authority, and certificates for all identities of a pipeline."""

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.errors import UsageError, did_you_mean
from brokers.security.acl import all_sites, check_usernames


def command(
    file: Annotated[Path, typer.Argument(help="The pipeline file.")],
    out: Annotated[Path, typer.Option(help="The output folder; pipelines may share its authority.")] = Path("certs"),
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long new certificates are valid.")] = 365,
    node: Annotated[list[str] | None, typer.Option(help="Only this identity; may be repeated.")] = None,
    host: Annotated[
        list[str] | None, typer.Option(help="SITE=NAME: a further host name of a site's broker; may be repeated.")
    ] = None,
    renew: Annotated[bool, typer.Option(help="Replace certificates that are still valid.")] = False,
) -> int:
    """Make a certificate for each client and broker of a pipeline.

    Each gets a folder with ca.crt, tls.crt and tls.key, as in a Kubernetes TLS secret: name it in SPARSE_TLS where the
    client runs. The authority that signs them is for development: its key is in a file. Valid certificates are kept.

    Example: sparse certs examples/street.toml --out certs
    """
    # Imported here: `--help` does not need cryptography.
    from brokers.security.certificates import ensure_certificates, pipeline_identities

    pipeline = load_pipeline(file)
    check_usernames(pipeline)
    identities = pipeline_identities(pipeline, _parse_hosts(pipeline, host or ()))
    if node:
        known = [each.name for each in identities]
        for name in node:
            if name not in known:
                message = f"--node {name}: no such identity{did_you_mean(name, known)}: expected {', '.join(known)}"
                raise UsageError("UnknownNode", message, name=name)
        identities = tuple(each for each in identities if each.name in node)
    certificates = ensure_certificates(out, identities, days=days, renew=renew)
    width = max(len(each.name) for each in certificates)
    for each in certificates:
        hosts = f", for {', '.join(each.hosts)}" if each.hosts else ""
        print(f"{each.action:<7} {each.name:<{width}}  until {each.expires:%Y-%m-%d}{hosts}")  # noqa: T201 - the result
    print(f"certificates are in {out}; keep {out / 'authority'} secret", file=sys.stderr)  # noqa: T201 - a hint
    return 0


def _parse_hosts(pipeline: Pipeline, options: Sequence[str]) -> dict[str, list[str]]:
    from brokers.security.certificates import normalize_host

    sites = all_sites(pipeline)
    hosts: defaultdict[str, list[str]] = defaultdict(list)
    for option in options:
        site, equals, name = option.partition("=")
        if not equals or not name or any(not letter.isprintable() or letter in " /" for letter in name):
            raise _host_error(option, "not a site and a host name")
        if site not in sites:
            raise _host_error(option, f"no site {site!r}{did_you_mean(site, sites)}")
        try:
            normalize_host(name)
        except ValueError:
            raise _host_error(option, f"{name!r} is not a host name") from None
        hosts[site].append(name)
    return hosts


def _host_error(option: str, problem: str) -> UsageError:
    message = f"--host {option}: {problem}: expected SITE=NAME, such as cloud=broker.example.org"
    return UsageError("BadHost", message, option=option)
