"""The pipeline file: what is cut, where its parts run, what feeds it. Read once, checked whole, frozen."""

from __future__ import annotations

import contextlib
import difflib
import os
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from brokers.address import BadAddress, parse_address
from brokers.dispatch import LEASE_S
from brokers.errors import BadFile, BadName, UsageError
from brokers.messages import DEADLINE_LIMIT_MS, Priority
from brokers.topics import StageTopics, checked_name

LOCAL = "local"
BROKER_VARIABLE = "SPARSE_BROKER"


def _name_of(what: str) -> AfterValidator:
    def check(name: str) -> str:
        try:
            return checked_name(what, name)
        except BadName as error:
            raise ValueError(str(error)) from None

    return AfterValidator(check)


def _readable_address(text: str) -> str:
    try:
        parse_address(text)
    except BadAddress as error:
        raise ValueError(str(error)) from None
    return text


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class PipelineTable(_Table):
    """`[pipeline]`: the network and where it is cut."""

    name: Annotated[str, _name_of("pipeline")]
    kind: Literal["inference"] = "inference"
    model: str | None = None
    weights: str | None = None
    cuts: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(), strict=False)
    seed: int = 0
    threshold: float = Field(default=0.5, ge=0, le=1, description="of a detection's score")
    lease_s: float = Field(
        default=LEASE_S, gt=0, le=86_400, description="a request of which nothing is heard for so long is sent again"
    )
    nms: float = Field(default=0.45, ge=0, le=1, description="overlap above which the weaker of two boxes goes")


class StageTable(_Table):
    """`[[stage]]`: one part, and how it is served."""

    name: Annotated[str, _name_of("stage")]
    workers: int = Field(default=1, ge=1, le=64)
    site: Annotated[str, _name_of("site")] = LOCAL
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: int = Field(default=0, ge=0, description="of a worker's compute; 0: what the machine has, shared out")
    max_batch: int = Field(default=1, ge=1, le=1024)
    max_wait_ms: float = Field(default=0.0, ge=0, le=60_000)
    wire: Literal["float32", "float16", "bfloat16"] = "float32"
    executor: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)


class SiteTable(_Table):
    """`[[site]]`: a place with its own broker; without an address one is started on this machine."""

    name: Annotated[str, _name_of("site")]
    broker: Annotated[str, AfterValidator(_readable_address)] | None = None


class SourceTable(_Table):
    """`[source]`: what feeds the pipeline, and how eagerly."""

    kind: str = Field(default="ingress", description="video, images, camera, ingress, or package.module:Class")
    name: Annotated[str, _name_of("source")] = "source"
    site: Annotated[str, _name_of("site")] = LOCAL
    path: str | None = None
    pattern: str | None = None
    device: int | str | None = None
    limit: int | None = Field(default=None, ge=1)
    loop: bool = False
    pace: Literal["max", "native"] = "max"
    encoding: Literal["jpeg", "raw"] = "jpeg"
    quality: int = Field(default=90, ge=1, le=100)
    keep: Literal["all", "latest"] | None = Field(
        default=None, description="what waits for room; default: latest for what is live (camera, ingress), else all"
    )
    window: int | None = Field(
        default=None, ge=1, le=1024, description="requests in flight; default: as many as the workers that are up hold"
    )
    deadline_ms: float | None = Field(default=None, gt=0, le=DEADLINE_LIMIT_MS)
    priority: Priority = Field(default="interactive", description="background: after all that is interactive")
    settings: dict[str, Any] = Field(default_factory=dict)


class Pipeline(_Table):
    """A whole pipeline file."""

    path: str = Field(default="", exclude=True)
    pipeline: PipelineTable
    stage: tuple[StageTable, ...] = Field(min_length=1, strict=False)
    site: tuple[SiteTable, ...] = Field(default=(), strict=False)
    source: SourceTable = SourceTable()

    @model_validator(mode="after")
    def _fits_together(self) -> Pipeline:
        for what, names in (("stage", [item.name for item in self.stage]), ("site", [item.name for item in self.site])):
            if twins := {name for name in names if names.count(name) > 1}:
                raise ValueError(f"{what}: two {what}s are named {min(twins)!r}")
        self._check_cuts()
        known = {LOCAL, *(site.name for site in self.site)}
        users = [("source", self.source.site), *((f"stage {item.name!r}", item.site) for item in self.stage)]
        for where, site in users:
            if site not in known:
                raise ValueError(f"{where}: site {site!r} is not one of {', '.join(sorted(known))}")
        return self

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
    def folder(self) -> Path:
        """What relative paths in the file are relative to."""
        return Path(self.path).resolve().parent

    def find_stage(self, name: str) -> StageTable:
        for stage in self.stage:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stage]
        raise BadFile(self.path, f"no stage {name!r}{nearest(name, names)}: it has {', '.join(names)}")

    def part_index(self, stage: StageTable) -> int:
        """Which part of the cut network the stage serves (a stage with an executor serves none)."""
        parts = [item.name for item in self.stage if item.executor is None]
        return parts.index(stage.name)

    def after(self, stage: StageTable) -> StageTable | None:
        """The stage that `stage` passes its work on to; None after the last."""
        following = self.stage[self.stage.index(stage) + 1 :]
        return following[0] if following else None

    def topics(self, stage: StageTable) -> StageTopics:
        return StageTopics(stage.site, self.name, stage.name)

    def broker_of(self, site: str) -> str | None:
        """The broker's address as the file gives it; None where it gives none."""
        return next((item.broker for item in self.site if item.name == site), None)


def broker_address(
    pipeline: Pipeline | None, site: str, option: str | None = None, *, handed: bool = False
) -> str | None:
    """Where the site's broker is: by the option, else the file, else `SPARSE_BROKER`; None where none of them says.

    `handed`: a parent process has put the address of its choice, whatever the file says, into `SPARSE_BROKER`: not into
    an argument, since it may hold a password, and everybody on the machine may read arguments.
    """
    stated = pipeline.broker_of(site) if pipeline else None
    environment = os.environ.get(BROKER_VARIABLE)
    return option or (handed and environment) or stated or environment or None


@contextlib.contextmanager
def blaming(pipeline: Pipeline) -> Iterator[None]:
    """Name the file, and the key in it, in whatever is wrong with what the file names: a cut, a model, a video."""
    try:
        yield
    except UsageError as error:
        if not error.key:
            raise
        raise BadFile(pipeline.path, str(error), error.key) from error


def nearest(name: str, known: list[str]) -> str:
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
    "source": SourceTable,
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
        known = _keys(_TABLES[str(levels[0])] if len(levels) > 1 else Pipeline)
        return BadFile(path, f"unknown key{nearest(key, known)}: expected one of {', '.join(known)}", where)
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
