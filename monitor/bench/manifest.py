"""The manifest of a benchmark: what was run, on what and with what, so that a reader can run it again.

It lies beside the results as manifest.json. `load_manifest` reads it for whoever shows them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from monitor.bench.case import BenchCase
from monitor.errors import BadManifest

MANIFEST_FILE = "manifest.json"
# In an address, wherever it stands: a comment may hold an old one.
_PASSWORD = re.compile(r"(://[^/@\s:]*):[^@\s]*@")

BenchMode = Literal["run", "source"]


class LinkRecord(BaseModel):
    """One link between two sites. `emulated`: a relay on one machine imposed the delay and the rate."""

    model_config = ConfigDict(frozen=True)

    site: str
    to: str
    delay_ms: float
    rate_mbit: float | None
    emulated: bool


class SuiteRecord(BaseModel):
    """A suite, or a point of a sweep: its file, what was changed of it, and its runs."""

    model_config = ConfigDict(frozen=True)

    name: str
    path: str
    pipeline_text: str = Field(description="of the whole file, passwords of brokers left out")
    overrides: dict[str, Any]
    sweep_point: dict[str, Any] = {}
    kind: Literal["inference", "training"]
    seed: int
    links: tuple[LinkRecord, ...]
    runs: tuple[str, ...] = Field(description="the names of their folders, beside the manifest")


class Manifest(BaseModel):
    """All of it."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    command: tuple[str, ...]
    mode: BenchMode = Field(description="run: all of a pipeline was started here; source: its source only")
    started_at: str = Field(description="ISO 8601, with the zone")
    ended_at: str | None = Field(default=None, description="None while it runs")
    warm_up: Annotated[int, Field(ge=0)]
    requests: int | None
    repeats: int
    versions: dict[str, str | None]
    revision: dict[str, Any] | None
    hardware: dict[str, Any]
    suites: tuple[SuiteRecord, ...]

    def to_json(self) -> str:
        """As it is written."""
        return self.model_dump_json(indent=2) + "\n"


def suite_record(case: BenchCase, emulated: bool, runs: Sequence[str]) -> SuiteRecord:
    """What the manifest says of a case; `emulated` says whether its links' delays and rates were imposed here."""
    pipeline = case.pipeline
    used = set(case.sites)
    links = [
        LinkRecord(
            site=site.name,
            to=link.to,
            delay_ms=link.delay_ms,
            rate_mbit=link.rate_mbit,
            emulated=emulated and link.is_emulated,
        )
        for site in pipeline.site
        for link in site.links
        if {site.name, link.to} <= used
    ]
    return SuiteRecord(
        name=case.name,
        path=str(case.path),
        pipeline_text=redact_passwords(case.path.read_text()),
        overrides=dict(case.overrides),
        sweep_point=dict(case.sweep_point),
        kind=pipeline.pipeline.kind,
        seed=pipeline.pipeline.seed,
        links=tuple(links),
        runs=tuple(runs),
    )


def redact_passwords(text: str) -> str:
    """A pipeline file as anybody may read it: its brokers' addresses without passwords."""
    return _PASSWORD.sub(r"\1@", text)


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest in a folder; None where there is none. Raises `BadManifest` for one that cannot be read."""
    path = folder / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadManifest(str(path), error.strerror or str(error)) from None
    except ValidationError as error:
        mistake = error.errors(include_url=False)[0]
        where = ".".join(str(level) for level in mistake["loc"])
        raise BadManifest(str(path), f"{where}: {mistake['msg']}" if where else mistake["msg"]) from None
