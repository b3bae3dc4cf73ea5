"""A case: what a benchmark runs several times and gives a line of its table, a suite or a point of a sweep. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from brokers.config.pipeline_file import Pipeline
from brokers.config.schema import LOCAL_SITE
from monitor.bench.errors import NoEnd, NothingLeft
from monitor.bench.overrides import Overrides
from monitor.bench.suite import Suite

# Sources that give as many samples as they are asked for, over and over again.
_LOOPS = ("video", "images", "digits", "cifar10")


@dataclass(frozen=True, slots=True)
class BenchCase:
    """One pipeline file, and what is changed of it for the runs of this case."""

    name: str
    path: Path
    pipeline: Pipeline  # the file as it stands
    overrides: Overrides = field(default_factory=dict)
    sweep_point: Mapping[str, Any] = field(default_factory=dict)  # of a sweep: which point it is

    @property
    def sites(self) -> tuple[str, ...]:
        """Where its messages go, from the source on; each once, those that they only pass through among them."""
        home = self.pipeline.source.site
        stages = [stage.site for stage in self.pipeline.stage]
        if "stage" in self.overrides:
            stages = [stage.get("site", LOCAL_SITE) for stage in self.overrides["stage"]]
        ways = [self.pipeline.topology.path(home, site) or (site,) for site in stages]
        return tuple(dict.fromkeys([home, *(site for way in ways for site in way)]))


def case_from_suite(suite: Suite, requests: int | None, warm_up: int) -> BenchCase:
    """A suite as it is measured. `requests`: so many of them, or steps; None: what the file has.

    Raises `NoEnd` for a suite that never ends or that takes no number, and `NothingLeft` for a warm-up that takes all.
    """
    table = suite.pipeline.training
    changes = run_length_overrides(suite.name, suite.pipeline, requests, warm_up, table.batch)
    return BenchCase(suite.name, suite.path, suite.pipeline, changes)


def run_length_overrides(
    name: str, pipeline: Pipeline, requests: int | None, warm_up: int, batch: int
) -> dict[str, Any]:
    """What is changed of a pipeline so that its runs have so many requests, or steps of so many rows, and end.

    Raises as `case_from_suite` does.
    """
    if requests is not None and requests <= warm_up:
        raise NothingLeft(name, "steps" if pipeline.is_training else "requests", requests, warm_up)
    return (
        _of_training(pipeline, requests, batch)
        if pipeline.is_training
        else _of_inference(name, pipeline, requests, warm_up)
    )


def _of_inference(name: str, pipeline: Pipeline, requests: int | None, warm_up: int) -> dict[str, Any]:
    source = pipeline.source
    if source.kind == "ingress":
        raise NoEnd(name, "its source is the ingress, which nothing feeds here: expected a video, images, a data set")
    if requests is None:
        if source.limit is not None and source.limit <= warm_up:
            raise NothingLeft(name, "requests", source.limit, warm_up)
        if source.limit is None and (source.loop or source.kind == "camera"):
            raise NoEnd(name, "its source never ends: say how many --requests a run has")
        return {}
    if ":" in source.kind:
        raise NoEnd(name, f"its source {source.kind!r} decides itself how many samples it gives: --requests cannot")
    return {"source.limit": requests, **({"source.loop": True} if source.kind in _LOOPS else {})}


def _of_training(pipeline: Pipeline, steps: int | None, batch: int) -> dict[str, Any]:
    """Tests between epochs are left out: they are no steps. Checkpoints are each run's own, or it would go on with one.

    Steps come in whole epochs: an epoch has as many as make the number asked for, or some more.
    """
    found: dict[str, Any] = {"training.evaluate_every": 0}
    if pipeline.training.checkpoints is not None:
        found["training.checkpoints"] = None
    if steps is not None:
        epochs = min(pipeline.training.epochs, steps)
        found |= {"source.limit": -(-steps // epochs) * batch, "training.epochs": epochs}
    return found
