"""`sparse broker access FILE SITE`: who may do what at the broker of a site, as its access list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from brokers.config.pipeline_file import load_pipeline
from brokers.errors import BadFile, did_you_mean
from brokers.security.acl import render_acl
from brokers.security.principals import all_sites, check_usernames


def command(
    file: Annotated[Path, typer.Argument(help="The pipeline file.")],
    site: Annotated[str, typer.Argument(help="The site whose broker it is for.")],
) -> int:
    """Print the access list of a site's Mosquitto: who may do what, and nothing else.

    The names are those of the certificates that `sparse certs` makes, or of users with a password. Lists of several
    pipelines that share a broker may follow one another in one file.

    Example: sparse broker access street.toml cloud > access.list
    """
    pipeline = load_pipeline(file)
    check_usernames(pipeline)
    sites = all_sites(pipeline)
    if site not in sites:
        problem = f"no site {site!r}{did_you_mean(site, list(sites))}: it has {', '.join(sites)}"
        raise BadFile(str(file), problem)
    print(render_acl(pipeline, site), end="")  # noqa: T201 - the answer
    return 0
