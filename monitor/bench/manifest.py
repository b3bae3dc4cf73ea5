"""The manifest of a benchmark: all that is needed to run it again, as manifest.json beside the results."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from brokers.errors import UsageError
from monitor.bench.case import BenchCase

MANIFEST_FILE = "manifest.json"
# The password of a broker's address anywhere in a file, comments included.
_PASSWORD = re.compile(r"(://[^/@\s:]*):[^@\s]*@")

BenchMode = Literal["run", "source"]


class LinkRecord(BaseModel):
    """A link between two sites; `emulated`: a link emulator imposed its delay and rate."""

    model_config = ConfigDict(frozen=True)

    site: str
    to: str
    delay_ms: float
    rate_mbit: float | None
    emulated: bool


class SuiteRecord(BaseModel):
    """A suite, or a point of a sweep: its pipeline file, its overrides and its runs."""

    model_config = ConfigDict(frozen=True)

    name: str
    path: str
    pipeline_text: str = Field(description="the pipeline file, without passwords of brokers")
    overrides: dict[str, Any]
    sweep_point: dict[str, Any] = {}
    kind: Literal["inference", "training"]
    seed: int
    links: tuple[LinkRecord, ...]
    runs: tuple[str, ...] = Field(description="names of folders beside the manifest")


class Manifest(BaseModel):
    """A whole benchmark."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    command: tuple[str, ...]
    mode: BenchMode = Field(description="run: whole pipelines on one machine; source: only their sources")
    started_at: str = Field(description="ISO 8601 with a time zone")
    ended_at: str | None = Field(default=None, description="None while the benchmark runs")
    warm_up: Annotated[int, Field(ge=0)]
    requests: int | None
    repeats: int
    versions: dict[str, str | None]
    revision: dict[str, Any] | None
    hardware: dict[str, Any]
    suites: tuple[SuiteRecord, ...]

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


def suite_record(case: BenchCase, emulated: bool, runs: Sequence[str]) -> SuiteRecord:
    """The record of a case; `emulated`: its runs emulate links that have a delay or a rate."""
    pipeline = case.pipeline
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
        if {site.name, link.to} <= set(case.sites)
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
    """A pipeline file without the passwords in its brokers' addresses."""
    return _PASSWORD.sub(r"\1@", text)


def load_manifest(folder: Path) -> Manifest | None:
    """The manifest in a folder; None if it is missing. Raises `UsageError` ("BadManifest") for an invalid one."""
    path = folder / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        problem = error.strerror or str(error)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(level) for level in first["loc"])
        problem = f"{key}: {first['msg']}" if key else first["msg"]
    raise UsageError(
        "BadManifest", f"{path}: not the manifest of a benchmark: {problem}", path=str(path), problem=problem
    )
