"""`sparse certs FILE`: a development authority, and a certificate for each who comes to a pipeline's brokers."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.errors import UsageError, did_you_mean
from brokers.security.principals import all_sites, check_usernames


@dataclass(eq=False)
class BadHost(UsageError):
    """A value of `--host` that cannot be used."""

    given: str
    problem: str

    def __str__(self) -> str:
        return f"--host {self.given}: {self.problem}: expected SITE=NAME, such as cloud=broker.example.org"


@dataclass(eq=False)
class UnknownNode(UsageError):
    """A value of `--node` that is no identity of the pipeline."""

    given: str
    known: list[str]

    def __str__(self) -> str:
        return f"--node {self.given}: no such identity{did_you_mean(self.given, self.known)}: {', '.join(self.known)}"


def command(
    file: Annotated[Path, typer.Argument(help="The pipeline file.")],
    out: Annotated[Path, typer.Option(help="The folder; one authority may serve many pipelines.")] = Path("certs"),
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long a new certificate counts.")] = 365,
    node: Annotated[list[str] | None, typer.Option(help="Only this identity; may be given again.")] = None,
    host: Annotated[
        list[str] | None, typer.Option(help="SITE=NAME: a further name of that site's broker; may be given again.")
    ] = None,
    renew: Annotated[bool, typer.Option(help="Make certificates anew that are there already.")] = False,
) -> int:
    """Make a certificate for each who comes to a pipeline's brokers.

    A folder for each, with ca.crt, tls.crt and tls.key, as in a Kubernetes TLS secret: name it in SPARSE_TLS where its
    bearer runs. The authority that signs them is for development: its key lies in a file. What is there and valid is
    kept.

    Example: sparse certs examples/street.toml --out certs
    """
    # Only here: `--help` does without.
    from brokers.security.cert_store import ensure_certificates
    from brokers.security.dev_ca import pipeline_identities

    pipeline = load_pipeline(file)
    check_usernames(pipeline)
    wanted = pipeline_identities(pipeline, _hosts(pipeline, host or ()))
    if node:
        known = [each.name for each in wanted]
        for name in node:
            if name not in known:
                raise UnknownNode(name, known)
        wanted = tuple(each for each in wanted if each.name in node)
    done = ensure_certificates(out, wanted, days=days, renew=renew)
    width = max(len(each.name) for each in done)
    for each in done:
        reached = f", for {', '.join(each.hosts)}" if each.hosts else ""
        print(f"{each.action:<7} {each.name:<{width}}  until {each.expires:%Y-%m-%d}{reached}")  # noqa: T201 - the answer
    said = f"certificates are in {out}; nobody but you is to have {out / 'authority'}"
    print(said, file=sys.stderr)  # noqa: T201 - for a person
    return 0


def _hosts(pipeline: Pipeline, given: Sequence[str]) -> dict[str, list[str]]:
    """The names in `--host`, by site."""
    from brokers.security.dev_ca import normalize_host

    found: defaultdict[str, list[str]] = defaultdict(list)
    for text in given:
        site, equals, name = text.partition("=")
        if not equals or not name or any(not letter.isprintable() or letter in " /" for letter in name):
            raise BadHost(text, "is not a site and a name")
        if site not in all_sites(pipeline):
            raise BadHost(text, f"there is no site {site!r}{did_you_mean(site, list(all_sites(pipeline)))}")
        try:
            normalize_host(name)
        except ValueError:
            raise BadHost(text, f"{name!r} is no name of a host") from None
        found[site].append(name)
    return found
