"""The pipeline file: what is cut, where its parts run, what feeds it. Read once, checked whole, frozen."""

from __future__ import annotations

import contextlib
import difflib
import os
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError, model_validator

from brokers.config.schema import (
    LOCAL_SITE,
    ConfigTable,
    LinkTable,
    PipelineTable,
    SiteTable,
    SourceTable,
    StageTable,
    TrainingTable,
)
from brokers.config.topology import SiteTopology
from brokers.errors import BadFile, UsageError
from brokers.protocol.topics import StageTopics

BROKER_VARIABLE = "SPARSE_BROKER"


class Pipeline(ConfigTable):
    """A whole pipeline file."""

    path: str = Field(default="", exclude=True)
    pipeline: PipelineTable
    stage: tuple[StageTable, ...] = Field(min_length=1, strict=False)
    site: tuple[SiteTable, ...] = Field(default=(), strict=False)
    source: SourceTable = SourceTable()
    training: TrainingTable = TrainingTable()

    @model_validator(mode="after")
    def _fits_together(self) -> Pipeline:
        for what, names in (("stage", [item.name for item in self.stage]), ("site", [item.name for item in self.site])):
            if twins := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{what}: two {what}s are named {min(twins)!r}")
        self._check_cuts()
        self._check_sites()
        if self.is_training:
            self._check_training()
        elif "training" in self.model_fields_set:
            raise ValueError("training: is for a pipeline whose kind is 'training', this one's is 'inference'")
        return self

    def _check_sites(self) -> None:
        known = {LOCAL_SITE, *(site.name for site in self.site)}
        users = [("source", self.source.site), *((f"stage {item.name!r}", item.site) for item in self.stage)]
        for where, site in users:
            if site not in known:
                raise ValueError(f"{where}: site {site!r} is not one of {', '.join(sorted(known))}")
        tree, home = self.topology, self.source.site
        declared = [site.name for site in self.site] if len(self.site) > 1 else []
        for name in dict.fromkeys([*self.used_sites, *declared]):
            if not tree.path(home, name):
                raise ValueError(
                    f"site {name!r}: no link reaches it from {home!r}, where the source is: "
                    f"expected links = [{{ to = {name!r} }}] at a [[site]] on the way"
                )

    def _check_training(self) -> None:
        for stage in self.stage:
            where = f"stage {stage.name!r}"
            if stage.executor is not None:
                raise ValueError(f"{where}: a pipeline that trains has parts of its model only, no executor")
            if stage.wire != "float32" or stage.max_batch != 1:
                raise ValueError(f"{where}: training is exact: wire is 'float32' and max_batch 1, or left out")
        if self.training.labels == "stay" and self.stage[-1].site != self.source.site:
            raise ValueError(
                f"training.labels: to stay, they need stage {self.stage[-1].name!r} at the source's site "
                f"{self.source.site!r}, it is at {self.stage[-1].site!r}"
            )

    def _check_cuts(self) -> None:
        cuts = self.pipeline.cuts
        if list(cuts) != sorted(set(cuts)):
            raise ValueError(f"pipeline.cuts: must rise, each cut once, got {list(cuts)}")
        parts = [stage for stage in self.stage if stage.executor is None]
        if self.pipeline.model is None:
            if parts:
                raise ValueError(f"stage {parts[0].name!r}: needs an executor, or the pipeline a model")
            if cuts:
                raise ValueError(f"pipeline.cuts: there is no model to be cut at {list(cuts)}")
        elif len(parts) != len(cuts) + 1:
            raise ValueError(
                f"pipeline.cuts: {len(cuts)} cuts make {len(cuts) + 1} parts, "
                f"{len(parts)} stages without an executor take one"
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
        return SiteTopology.from_sites(self.site if self.site else (SiteTable(name=LOCAL_SITE),))

    @property
    def used_sites(self) -> tuple[str, ...]:
        """Where its source is, its stages, and its cameras; each once."""
        places = [self.source.site, *(stage.site for stage in self.stage)]
        return tuple(dict.fromkeys([*places, *(site.name for site in self.site if site.cameras)]))

    @property
    def folder(self) -> Path:
        """What relative paths in the file are relative to."""
        return Path(self.path).resolve().parent

    def find_stage(self, name: str) -> StageTable:
        for stage in self.stage:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stage]
        raise BadFile(self.path, f"no stage {name!r}{did_you_mean(name, names)}: it has {', '.join(names)}")

    def part_index(self, stage: StageTable) -> int:
        """Which part of the cut network the stage serves (a stage with an executor serves none)."""
        parts = [item.name for item in self.stage if item.executor is None]
        return parts.index(stage.name)

    def next_stage(self, stage: StageTable) -> StageTable | None:
        """The stage that `stage` passes its work on to; None after the last."""
        following = self.stage[self.stage.index(stage) + 1 :]
        return following[0] if following else None

    def topics(self, stage: StageTable) -> StageTopics:
        return StageTopics(stage.site, self.name, stage.name)

    def configured_broker(self, site: str) -> str | None:
        """The broker's address as the file gives it; None where it gives none."""
        return next((item.broker for item in self.site if item.name == site), None)


def resolve_broker_address(
    pipeline: Pipeline | None, site: str, option: str | None = None, *, from_parent: bool = False
) -> str | None:
    """Where the site's broker is: by the option, else the file, else `SPARSE_BROKER`; None where none of them says.

    `handed`: a parent process has put the address of its choice, whatever the file says, into `SPARSE_BROKER`: not into
    an argument, since it may hold a password, and everybody on the machine may read arguments.
    """
    stated = pipeline.configured_broker(site) if pipeline else None
    environment = os.environ.get(BROKER_VARIABLE)
    return option or (from_parent and environment) or stated or environment or None


@contextlib.contextmanager
def add_error_context(pipeline: Pipeline) -> Iterator[None]:
    """Name the file, and the key in it, in whatever is wrong with what the file names: a cut, a model, a video."""
    try:
        yield
    except UsageError as error:
        if not error.key or error.fields.get("path") == pipeline.path:
            raise
        raise BadFile(pipeline.path, str(error), error.key) from error


def did_you_mean(name: str, known: list[str]) -> str:
    """` (did you mean 'x'?)` where something known is near, else nothing."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def load_pipeline(path: str | Path) -> Pipeline:
    """Read and check a pipeline file; every mistake in it is one `BadFile` line."""
    try:
        text = Path(path).read_bytes()
        table = tomllib.loads(text.decode())
    except FileNotFoundError:
        raise BadFile(str(path), "no such file") from None
    except OSError as error:
        raise BadFile(str(path), error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise BadFile(str(path), "is not text: expected TOML in UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadFile(str(path), f"is not TOML: {error}") from None
    if "path" in table:  # ours, and not for the file to say
        raise BadFile(str(path), f"unknown key: expected one of {', '.join(_keys(Pipeline))}", "path")
    try:
        return Pipeline.model_validate({**table, "path": str(path)})
    except ValidationError as error:
        raise _explain(str(path), error) from None


_TABLES: dict[str, type[BaseModel]] = {
    "pipeline": PipelineTable,
    "stage": StageTable,
    "site": SiteTable,
    "links": LinkTable,
    "source": SourceTable,
    "training": TrainingTable,
}
# pydantic's types of mistakes in the words of TOML.
_EXPECTED = {
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "tuple_type": "expected a list",
    "model_type": "expected a table",
    "dict_type": "expected a table",
}
_SAID: dict[type, str] = {dict: "a table", list: "a list", bool: "true or false"}


def _keys(table: type[BaseModel]) -> list[str]:
    return [name for name in table.model_fields if table is not Pipeline or name != "path"]


def _explain(path: str, error: ValidationError) -> BadFile:
    """One line for the first mistake that pydantic found."""
    mistake = error.errors(include_url=False)[0]
    kind, levels = mistake["type"], list(mistake["loc"])
    if kind in ("int_type", "string_type") and levels[-1] in ("int", "str"):
        levels.pop()  # pydantic names the branches of a union
    where = ".".join(str(level) for level in levels)
    if kind == "extra_forbidden":
        key = str(levels[-1])
        tables = [_TABLES[str(level)] for level in levels[:-1] if str(level) in _TABLES]
        known = _keys(tables[-1] if tables else Pipeline)
        return BadFile(path, f"unknown key{did_you_mean(key, known)}: expected one of {', '.join(known)}", where)
    if kind == "missing":
        return BadFile(path, "is missing", where)
    if kind == "value_error":
        return BadFile(path, mistake["msg"].removeprefix("Value error, "), where)
    expected = _EXPECTED.get(kind) or mistake["msg"].replace("Input should be", "expected", 1)
    if kind in ("tuple_type", "too_short") and where in ("stage", "site"):
        expected = f"expected one or more [[{where}]]"
    given = mistake.get("input")
    return BadFile(path, f"{expected}, got {_SAID.get(type(given)) or repr(given)}", where)


def new_run_folder(base: Path, name: str) -> Path:
    """A folder for a run that begins now; `name` and the local time, and the process id should two begin at once."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = base / f"{name}-{stamp}"
    return folder if not folder.exists() else base / f"{name}-{stamp}-{os.getpid()}"
