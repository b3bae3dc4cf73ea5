"""Benchmark suites, which are pipeline files by name, and cases: suites with the overrides for their runs.

The packaged suites are in monitor/bench/suites.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import tomli_w

from brokers.config.pipeline_file import Pipeline, load_pipeline
from brokers.config.schema import LOCAL_SITE
from brokers.errors import UsageError, did_you_mean

SUITES_FOLDER = Path(__file__).parent / "suites"
# The paper's four deployments, and two baselines: one server, and the device alone.
DEPLOYMENTS = ("cloud", "cloudlet", "hybrid-off-device", "hybrid-on-device", "server", "device")
TASKS = ("detect", "train")
# Sources that repeat their samples until they have produced as many as requested.
_LOOPING_SOURCES = ("video", "images", "digits", "cifar10")
# Keys of a pipeline file that may hold a path relative to it.
_PATH_KEYS = (("pipeline", "weights"), ("source", "path"), ("training", "checkpoints"))
_COMMENT = re.compile(r"\A(?:#.*\n)+")


@dataclass(frozen=True, slots=True)
class BenchCase:
    """A pipeline file under a name that is unique in a benchmark, with the overrides for its runs.

    `overrides` has values by dotted key ("training.epochs"), or a whole array of tables ("stage"); None removes a key.
    """

    name: str
    path: Path
    pipeline: Pipeline  # without the overrides
    overrides: Mapping[str, Any] = field(default_factory=dict)
    sweep_point: Mapping[str, Any] = field(default_factory=dict)  # the position in a sweep; empty outside of one

    @property
    def description(self) -> str:
        """The first sentence of the comment at the top of the file; empty without a comment."""
        comment = _COMMENT.match(self.path.read_text(errors="replace"))
        text = " ".join(line.strip("# ") for line in comment.group().splitlines()) if comment else ""
        return text.partition(". ")[0].rstrip(".") + "." if text else ""

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites on the paths from the source to the stages."""
        source_site = self.pipeline.source.site
        stage_sites = [stage.site for stage in self.pipeline.stage]
        if "stage" in self.overrides:
            stage_sites = [stage.get("site", LOCAL_SITE) for stage in self.overrides["stage"]]
        paths = [self.pipeline.topology.path(source_site, site) or (site,) for site in stage_sites]
        return tuple(dict.fromkeys([source_site, *(site for path in paths for site in path)]))

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
                table[last] = value
        entries = [(tables.get(table, {}), key) for table, key in _PATH_KEYS]
        entries += [(link, "password_file") for site in tables.get("site", ()) for link in site.get("links", ())]
        for table, key in entries:
            value = table.get(key)
            if isinstance(value, str) and (path := self.pipeline.folder / value).exists():  # else a registered name
                table[key] = str(path.absolute())
        return tomli_w.dumps(tables)

    def with_run_length(self, requests: int | None, warm_up: int) -> BenchCase:
        """The case with `requests` requests or training steps per run; None: as many as its file says.

        Raises `UsageError`: "EndlessSuite" or "FixedLength" for a source that would never end or sets its own length,
        "WarmUpTooLong" where the warm-up covers every request.
        """
        is_training = self.pipeline.is_training
        if requests is not None and requests <= warm_up:
            raise _warm_up_too_long(self.name, "steps" if is_training else "requests", requests, warm_up)
        length = _training_length(self, requests) if is_training else _inference_length(self, requests, warm_up)
        return replace(self, overrides={**self.overrides, **length})


def _inference_length(case: BenchCase, requests: int | None, warm_up: int) -> dict[str, Any]:
    name, source = case.name, case.pipeline.source
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


def _training_length(case: BenchCase, steps: int | None) -> dict[str, Any]:
    """No evaluations, which are no steps; checkpoints in each run's own folder, or it would resume the previous run.

    Steps come in whole epochs of equal length: at least as many as requested.
    """
    training = case.pipeline.training
    overrides: dict[str, Any] = {"training.evaluate_every": 0}
    if training.checkpoints is not None:
        overrides["training.checkpoints"] = None
    if steps is not None:
        epochs = min(training.epochs, steps)
        batch = case.overrides.get("training.batch", training.batch)
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


def packaged_suites() -> dict[str, tuple[str, ...]]:
    """The names of the packaged suites by task; a task's name stands for all of them."""
    return {task: tuple(f"{task}-{deployment}" for deployment in DEPLOYMENTS) for task in TASKS}


def find_suites(names: Sequence[str]) -> list[BenchCase]:
    """The suites for names of files, packaged suites or tasks: each once, in the given order.

    Raises `UsageError` ("UnknownSuite"), and `BadFile` for an invalid pipeline file.
    """
    suites: dict[str, BenchCase] = {}
    for path in dict.fromkeys(path for name in names for path in _paths(name)):
        # The name is part of folders and topics; files of one name are numbered.
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-.") or "suite"
        candidates = (plain if number == 1 else f"{plain}-{number}" for number in count(1))
        name = next(name for name in candidates if name not in suites)
        suites[name] = BenchCase(name, path, load_pipeline(path))
    return list(suites.values())


def _paths(name: str) -> Iterator[Path]:
    by_task = packaged_suites()
    packaged = [suite for suites in by_task.values() for suite in suites]
    if name in by_task or name in packaged:
        yield from (SUITES_FOLDER / f"{suite}.toml" for suite in by_task.get(name, (name,)))
    elif Path(name).is_file() or name.endswith(".toml"):
        yield Path(name)  # `load_pipeline` reports a missing file
    else:
        known = [*by_task, *packaged]
        hint = did_you_mean(name, known) or f": expected a pipeline file or one of {', '.join(known)}"
        raise UsageError("UnknownSuite", f"there is no suite {name!r}{hint}", name=name)
