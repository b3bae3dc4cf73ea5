"""A case: one pipeline file with overrides, which a benchmark runs repeatedly and reports as one row."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import LOCAL_SITE
from brokers.errors import UsageError
from monitor.bench.suite import Suite

# Sources that repeat their samples until they have produced as many as requested.
_LOOPING_SOURCES = ("video", "images", "digits", "cifar10")
# Keys of a pipeline file that may hold a path relative to it.
_PATH_KEYS = (("pipeline", "weights"), ("source", "path"), ("training", "checkpoints"))


@dataclass(frozen=True, slots=True)
class BenchCase:
    """One pipeline file, with the overrides for the runs of this case.

    `overrides` has values by dotted key ("training.epochs"), or a whole array of tables ("stage"); None removes a key.
    """

    name: str
    path: Path
    pipeline: Pipeline  # without the overrides
    overrides: Mapping[str, Any] = field(default_factory=dict)
    sweep_point: Mapping[str, Any] = field(default_factory=dict)  # the position in a sweep; empty outside of one

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites on the paths from the source to the stages."""
        home = self.pipeline.source.site
        stage_sites = [stage.site for stage in self.pipeline.stage]
        if "stage" in self.overrides:
            stage_sites = [stage.get("site", LOCAL_SITE) for stage in self.overrides["stage"]]
        paths = [self.pipeline.topology.path(home, site) or (site,) for site in stage_sites]
        return tuple(dict.fromkeys([home, *(site for path in paths for site in path)]))

    def to_toml(self) -> str:
        """The pipeline file with the overrides applied and its paths made absolute, valid in any folder.

        Comments are lost. Modules beside the original file are found only with its folder on Python's path.
        """
        tables = tomllib.loads(self.path.read_text())
        for key, value in self.overrides.items():
            *parents, last = key.split(".")
            table = tables
            for parent in parents:
                table = table.setdefault(parent, {})
            if value is None:
                table.pop(last, None)
            else:
                table[last] = deepcopy(value)
        entries = [(tables.get(table, {}), key) for table, key in _PATH_KEYS]
        entries += [(link, "password_file") for site in tables.get("site", ()) for link in site.get("links", ())]
        for table, key in entries:
            value = table.get(key)
            if isinstance(value, str) and (path := self.pipeline.folder / value).exists():  # else a registered name
                table[key] = str(path.absolute())
        return tomli_w.dumps(tables)


def case_from_suite(suite: Suite, requests: int | None, warm_up: int) -> BenchCase:
    """A suite with `requests` requests or training steps per run; None: as many as its file says.

    Raises `UsageError`: "EndlessSuite" or "FixedLength" for a source that would never end or sets its own length,
    "WarmUpTooLong" where the warm-up covers every request.
    """
    overrides = run_length_overrides(suite.name, suite.pipeline, requests, warm_up, suite.pipeline.training.batch)
    return BenchCase(suite.name, suite.path, suite.pipeline, overrides)


def run_length_overrides(
    name: str, pipeline: Pipeline, requests: int | None, warm_up: int, batch: int
) -> dict[str, Any]:
    """The overrides by which a run has `requests` requests, or steps of `batch` rows, and ends. Raises as above."""
    if requests is not None and requests <= warm_up:
        raise _warm_up_too_long(name, "steps" if pipeline.is_training else "requests", requests, warm_up)
    if pipeline.is_training:
        return _training_overrides(pipeline, requests, batch)
    return _inference_overrides(name, pipeline, requests, warm_up)


def _inference_overrides(name: str, pipeline: Pipeline, requests: int | None, warm_up: int) -> dict[str, Any]:
    source = pipeline.source
    if source.kind == "ingress":
        raise UsageError(
            "EndlessSuite", f"{name}: its source is an ingress, which has no data here: use a video, images or data set"
        )
    if requests is not None:
        if ":" in source.kind:
            raise UsageError("FixedLength", f"{name}: its source {source.kind!r} sets its own length: omit --requests")
        return {"source.limit": requests, **({"source.loop": True} if source.kind in _LOOPING_SOURCES else {})}
    if source.limit is None and (source.loop or source.kind == "camera"):
        raise UsageError("EndlessSuite", f"{name}: its source never ends: set the length of a run with --requests")
    if source.limit is not None and source.limit <= warm_up:
        raise _warm_up_too_long(name, "requests", source.limit, warm_up)
    return {}


def _training_overrides(pipeline: Pipeline, steps: int | None, batch: int) -> dict[str, Any]:
    """No evaluations, which are no steps; checkpoints in each run's own folder, or it would resume the previous run.

    Steps come in whole epochs of equal length: at least as many as requested.
    """
    overrides: dict[str, Any] = {"training.evaluate_every": 0}
    if pipeline.training.checkpoints is not None:
        overrides["training.checkpoints"] = None
    if steps is not None:
        epochs = min(pipeline.training.epochs, steps)
        overrides |= {"source.limit": -(-steps // epochs) * batch, "training.epochs": epochs}
    return overrides


def _warm_up_too_long(name: str, unit: str, count: int, warm_up: int) -> UsageError:
    return UsageError(
        "WarmUpTooLong",
        f"{name}: a warm-up of {warm_up} leaves none of {count} {unit} to measure: "
        f"set a shorter --warm-up, or more {unit} with --requests",
        count=count,
        warm_up=warm_up,
    )
