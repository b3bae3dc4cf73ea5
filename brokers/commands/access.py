"""`sparse broker access FILE SITE`: the access list of the broker of a site."""

from pathlib import Path
from typing import Annotated

import typer

from brokers.config.pipeline_file import load_pipeline
from brokers.errors import BadFile, did_you_mean
from brokers.security.acl import all_sites, check_usernames, render_acl


def command(
    file: Annotated[Path, typer.Argument(help="The pipeline file.")],
    site: Annotated[str, typer.Argument(help="The site of the broker.")],
) -> int:
    """Print the access list of a site's Mosquitto: the topics of each identity.

    The user names are those in the certificates of `sparse certs`, or of users with a password. The lists of several
    pipelines that share a broker may be concatenated.

    Example: sparse broker access street.toml cloud > access.list
    """
    pipeline = load_pipeline(file)
    check_usernames(pipeline)
    sites = all_sites(pipeline)
    if site not in sites:
        raise BadFile(str(file), f"no site {site!r}{did_you_mean(site, sites)}: expected one of {', '.join(sites)}")
    print(render_acl(pipeline, site), end="")  # noqa: T201 - the result
    return 0
