"""The pipeline file: read from TOML, validated as a whole, frozen. A mistake is one line: file, key, expectation."""

from __future__ import annotations

import contextlib
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from brokers.config.schema import (
    LOCAL_SITE,
    ConfigTable,
    LinkTable,
    PipelineTable,
    SiteTable,
    SourceTable,
    StageTable,
    TrainingTable,
    config_error,
)
from brokers.config.topology import SiteTopology
from brokers.errors import BadFile, UsageError, did_you_mean
from brokers.protocol.topics import NAME_PATTERN, StageTopics

BROKER_VARIABLE = "SPARSE_BROKER"
_VALUE_LIMIT_CHARACTERS = 100
T = TypeVar("T", StageTable, SiteTable)


class Pipeline(ConfigTable):
    """A whole pipeline file."""

    path: str = Field(default="", exclude=True)
    pipeline: PipelineTable
    stage: tuple[StageTable, ...] = Field(min_length=1, strict=False)
    site: tuple[SiteTable, ...] = Field(default=(), strict=False)
    source: SourceTable = SourceTable()
    training: TrainingTable = TrainingTable()

    @model_validator(mode="after")
    def _check(self) -> Pipeline:
        _check_unique("stage", [stage.name for stage in self.stage])
        _check_unique("site", [site.name for site in self.site])
        self._check_cuts()
        self._check_sites()
        if self.is_training:
            self._check_training()
        elif "training" in self.model_fields_set:
            raise config_error("training", "expected pipeline.kind = 'training' for this table, got 'inference'")
        return self

    def _check_cuts(self) -> None:
        cuts = self.pipeline.cuts
        if list(cuts) != sorted(set(cuts)):
            raise config_error("pipeline.cuts", f"expected ascending numbers, each once, got {list(cuts)}")
        parts = [stage for stage in self.stage if stage.executor is None]
        if self.pipeline.model is None:
            if parts:
                raise config_error(f"stage.{parts[0].name}", "expected an executor, or a model in [pipeline]")
            if cuts:
                raise config_error("pipeline.cuts", f"expected a model in [pipeline] to cut at {list(cuts)}")
        elif len(parts) != len(cuts) + 1:
            raise config_error(
                "pipeline.cuts",
                f"{len(cuts)} cuts make {len(cuts) + 1} parts: expected as many stages without an executor, "
                f"got {len(parts)}",
            )

    def _check_sites(self) -> None:
        known = {LOCAL_SITE, *(site.name for site in self.site)}
        users = [("source", self.source.site), *((f"stage.{stage.name}", stage.site) for stage in self.stage)]
        for key, site in users:
            if site not in known:
                hint = did_you_mean(site, sorted(known))
                raise config_error(f"{key}.site", f"no site {site!r}{hint}: expected one of {', '.join(sorted(known))}")
        topology = self.topology
        source_site = self.source.site
        declared = [site.name for site in self.site] if len(self.site) > 1 else []
        for name in dict.fromkeys([*self.used_sites, *declared]):
            if not topology.path(source_site, name):
                raise config_error(
                    f"site.{name}",
                    f"no links connect it with {source_site!r}, the site of the source: "
                    f"expected links = [{{ to = {name!r} }}] in a [[site]] on the way",
                )

    def _check_training(self) -> None:
        for stage in self.stage:
            key = f"stage.{stage.name}"
            if stage.executor is not None:
                raise config_error(f"{key}.executor", "a training pipeline has only parts of its model: leave it out")
            if stage.wire != "float32":
                raise config_error(f"{key}.wire", f"expected 'float32' in training, got {stage.wire!r}")
            if stage.max_batch != 1:
                raise config_error(f"{key}.max_batch", f"expected 1 in training, got {stage.max_batch}")
        last = self.stage[-1]
        if self.training.labels == "stay" and last.site != self.source.site:
            raise config_error(
                "training.labels",
                f"'stay' needs the last stage at the site of the source: expected site = {self.source.site!r} "
                f"in stage {last.name!r}, got {last.site!r}",
            )

    @property
    def name(self) -> str:
        return self.pipeline.name

    @property
    def is_training(self) -> bool:
        return self.pipeline.kind == "training"

    @property
    def topology(self) -> SiteTopology:
        """The bridges between its sites."""
        return SiteTopology.from_sites(self.site or (SiteTable(name=LOCAL_SITE),))

    @property
    def used_sites(self) -> tuple[str, ...]:
        """The sites of its source, stages and cameras, each once."""
        sites = [self.source.site, *(stage.site for stage in self.stage)]
        return tuple(dict.fromkeys([*sites, *(site.name for site in self.site if site.cameras)]))

    @property
    def folder(self) -> Path:
        """The folder of the file, which relative paths in it start from."""
        return Path(self.path).resolve().parent

    def find_stage(self, name: str) -> StageTable:
        """The stage of this name; raises `BadFile`."""
        return self._find("stage", self.stage, name)

    def find_site(self, name: str) -> SiteTable:
        """The `[[site]]` of this name; raises `BadFile`."""
        return self._find("site", self.site, name)

    def _find(self, kind: str, tables: tuple[T, ...], name: str) -> T:
        named = {table.name: table for table in tables}
        if name in named:
            return named[name]
        expected = f"expected one of {', '.join(named)}" if named else f"the file has no [[{kind}]]"
        raise BadFile(self.path, f"no {kind} {name!r}{did_you_mean(name, list(named))}: {expected}")

    def part_index(self, stage: StageTable) -> int:
        """Which part of the cut network the stage serves (a stage with an executor serves none)."""
        return [each.name for each in self.stage if each.executor is None].index(stage.name)

    def next_stage(self, stage: StageTable) -> StageTable | None:
        """The stage after `stage`; None after the last."""
        following = self.stage[self.stage.index(stage) + 1 :]
        return following[0] if following else None

    def topics(self, stage: StageTable) -> StageTopics:
        return StageTopics(stage.site, self.name, stage.name)

    def configured_broker(self, site: str) -> str | None:
        """The broker address of a site in the file; None if it has none."""
        return next((each.broker for each in self.site if each.name == site), None)


def _check_unique(key: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise config_error(f"{key}.{name}", f"expected one {key} of this name, got {names.count(name)}")


def resolve_broker_address(
    pipeline: Pipeline | None, site: str, option: str | None = None, *, from_parent: bool = False
) -> str | None:
    """The broker address of a site: the option's, else the file's, else `SPARSE_BROKER`; None if all are missing.

    `from_parent`: `SPARSE_BROKER` comes before the file, because a parent process has put its choice there. (It is not
    passed as an argument: it may contain a password, and every user of the machine may read arguments.)
    """
    configured = pipeline.configured_broker(site) if pipeline else None
    environment = os.environ.get(BROKER_VARIABLE)
    return option or (from_parent and environment) or configured or environment or None


def require_broker_address(
    pipeline: Pipeline | None, site: str, option: str | None = None, *, from_parent: bool = False
) -> str:
    """As `resolve_broker_address`; raises `UsageError` ("NoBroker") if all are missing."""
    if address := resolve_broker_address(pipeline, site, option, from_parent=from_parent):
        return address
    message = (
        f"no broker address for site {site!r}: pass --broker mqtt://HOST:PORT, set SPARSE_BROKER, "
        "or add a [[site]] with name and broker"
    )
    raise UsageError("NoBroker", f"{pipeline.path}: {message}" if pipeline else message, site=site)


@contextlib.contextmanager
def add_error_context(pipeline: Pipeline) -> Iterator[None]:
    """Add the file to errors about something that a key of the file names: a cut, a model, a video."""
    try:
        yield
    except UsageError as error:
        if not error.key:
            raise
        raise BadFile(pipeline.path, str(error), error.key) from error


def load_pipeline(path: str | Path) -> Pipeline:
    """Read and validate a pipeline file; raises `BadFile` with the first mistake in it."""
    path = str(path)
    try:
        table = tomllib.loads(Path(path).read_bytes().decode())
    except FileNotFoundError:
        raise BadFile(path, "no such file") from None
    except OSError as error:
        raise BadFile(path, error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise BadFile(path, "not text: expected TOML in UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadFile(path, f"not TOML: {error}") from None
    if "path" in table:  # a field of Pipeline, but not a key of the file
        raise BadFile(path, _unknown_key("path", Pipeline), "path")
    try:
        return Pipeline.model_validate({**table, "path": path})
    except ValidationError as error:
        key, problem = _explain(error.errors(include_url=False)[0], table)
        raise BadFile(path, problem, key) from None


_TABLES: dict[str, type[BaseModel]] = {
    "pipeline": PipelineTable,
    "stage": StageTable,
    "site": SiteTable,
    "links": LinkTable,
    "source": SourceTable,
    "training": TrainingTable,
}
# pydantic's error types in the terms of TOML.
_EXPECTED = {
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "tuple_type": "expected a list",
    "model_type": "expected a table",
    "dict_type": "expected a table",
}
_TYPE_NAMES: dict[type, str] = {dict: "a table", list: "a list"}


def _explain(mistake: ErrorDetails, table: dict[str, Any]) -> tuple[str, str]:
    """The key and the problem of a mistake that pydantic found in `table`."""
    kind = mistake["type"]
    levels = list(mistake["loc"])
    if kind == "config_error":
        return mistake["ctx"]["key"], mistake["ctx"]["problem"]
    if kind in ("int_type", "string_type") and levels[-1] in ("int", "str"):
        levels.pop()  # the branch of a union
    key = _format_key(levels, table)
    if kind == "extra_forbidden":
        tables = [_TABLES[str(level)] for level in levels[:-1] if str(level) in _TABLES]
        return key, _unknown_key(str(levels[-1]), tables[-1] if tables else Pipeline)
    if kind == "missing":
        return key, f"is missing: expected one or more [[{key}]]" if key in ("stage", "site") else "is missing"
    if kind == "value_error":
        return key, mistake["msg"].removeprefix("Value error, ")
    expected = _EXPECTED.get(kind) or mistake["msg"].replace("Input should be", "expected", 1)
    if kind in ("tuple_type", "too_short") and key in ("stage", "site"):
        expected = f"expected one or more [[{key}]]"
    return key, f"{expected}, got {_format_value(mistake['input'])}"


def _unknown_key(key: str, table: type[BaseModel]) -> str:
    known = [name for name in table.model_fields if (table, name) != (Pipeline, "path")]
    return f"unknown key{did_you_mean(key, known)}: expected one of {', '.join(known)}"


def _format_key(levels: list[int | str], table: Any) -> str:
    """`stage.head.workers`: entries of a list of tables are named, the others numbered."""
    parts = []
    for level in levels:
        try:
            table = table[level]
        except (LookupError, TypeError):
            table = None
        name = table.get("name", table.get("to")) if isinstance(level, int) and isinstance(table, dict) else None
        parts.append(name if isinstance(name, str) and re.fullmatch(NAME_PATTERN, name) else str(level))
    return ".".join(parts)


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    text = _TYPE_NAMES.get(type(value)) or repr(value)
    return text if len(text) <= _VALUE_LIMIT_CHARACTERS else f"{text[:_VALUE_LIMIT_CHARACTERS]}..."
