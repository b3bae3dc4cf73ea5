"""Where the runs of a report come from: folders, SQLite files, InfluxDB."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from monitor.errors import CannotCompare, NoSamples, NotARun
from monitor.points import Point
from monitor.report_run import ReportRun
from monitor.sqlite import FILE, SqliteReader
from monitor.store import Reader

INFLUX = "influx:"
MANIFEST = "manifest.json"
# All that a figure is made of.
_OF_A_RUN = ("request", "hop", "task", "batch", "step", "link")
_OF_A_NODE = ("interface", "process", "gpu", "power", "missing")


def find_runs(names: Sequence[str]) -> list[ReportRun]:
    """The runs of everything that was named on the command line, in that order, each with a label of its own.

    Raises `NotARun`, `BadStore`, and `CannotCompare` for runs of both kinds.
    """
    found: list[ReportRun] = []
    for name in names:
        runs = _runs(name)
        taken = {run.label for run in found}
        labels = {label: _free(label, taken) for label in dict.fromkeys(run.label for run in runs)}
        found += [replace(run, group=labels[run.label]) for run in runs]
    _check(found)
    return found


def _free(label: str, taken: set[str]) -> str:
    """The label, with a number where somebody else has it."""
    number, found = 2, label
    while found in taken:
        found, number = f"{label} ({number})", number + 1
    taken.add(found)
    return found


def _check(runs: Sequence[ReportRun]) -> None:
    labels: dict[str, str] = {}
    for run in runs:
        try:
            labels.setdefault(run.kind, run.label)
        except NoSamples as error:
            raise NotARun(run.name, str(error)) from None
    if len(labels) > 1:
        raise CannotCompare(labels["inference"], labels["training"])


def _runs(name: str) -> list[ReportRun]:
    if name.startswith(INFLUX):
        return [_from_influx(name.removeprefix(INFLUX))]
    path = Path(name)
    if path.is_file():
        return _from_reader(SqliteReader(path), name, path.stem, {})
    if not path.is_dir():
        raise NotARun(name, "there is no such file or folder")
    manifest = _manifest(path)
    if (path / FILE).is_file():
        return _from_reader(SqliteReader(path / FILE), name, path.resolve().name, manifest)
    if manifest:
        return _from_bench(path, manifest)
    raise NotARun(name, f"expected the folder of a run, which has {FILE} in it, or of a benchmark, with {MANIFEST}")


def _manifest(folder: Path) -> Mapping[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise NotARun(str(path), f"it is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise NotARun(str(path), "it is no JSON object")
    return found


def _from_bench(folder: Path, manifest: Mapping[str, Any]) -> list[ReportRun]:
    found = []
    suite = str(manifest.get("suite") or folder.resolve().name)
    for path in sorted(folder.rglob(FILE)):
        own = _manifest(path.parent)
        for run in _from_reader(SqliteReader(path), str(path.parent), path.parent.name, {**manifest, **own}):
            found.append(replace(run, group=suite, suite=suite))
    if not found:
        raise NotARun(str(folder), f"no run of this benchmark has a {FILE}")
    return found


def _from_reader(reader: Reader, name: str, label: str, manifest: Mapping[str, Any]) -> list[ReportRun]:
    """All runs of a file; `label` is for a single one, which may have no name, or one that says nothing."""
    runs = reader.runs()
    if not runs:
        raise NotARun(name, "the run has no samples: neither requests nor steps are in its telemetry")
    warm_up = manifest.get("warm_up")
    return [
        ReportRun(
            label if len(runs) == 1 else run or label,
            _points(reader, run),
            warm_up=warm_up if isinstance(warm_up, int) else 0,
            manifest=manifest,
        )
        for run in runs
    ]


def _points(reader: Reader, run: str) -> dict[str, Sequence[Point]]:
    """By measurement. What a node's monitor saw has no run where it serves many: then it is what it saw meanwhile."""
    found: dict[str, Sequence[Point]] = {name: reader.points(name, run) for name in (*_OF_A_RUN, *_OF_A_NODE)}
    ends = [point.time_ns for name in ("request", "step") for point in found[name]]
    if not ends:
        return found
    began_ns = min(point.time_ns - _length_ns(point) for name in ("request", "step") for point in found[name])
    for name in _OF_A_NODE:
        if run and not found[name]:
            found[name] = _between(reader.points(name, ""), began_ns, max(ends), everything=name == "missing")
    return found


def _length_ns(point: Point) -> int:
    length_ms = point.fields.get("latency_ms", point.fields.get("step_ms"))
    return round(float(length_ms) * 1e6) if isinstance(length_ms, int | float) else 0


def _between(points: Iterable[Point], begin_ns: int, end_ns: int, everything: bool) -> list[Point]:
    margin_ns = 2_000_000_000  # so that the first and the last moment lie between two samples
    return [point for point in points if everything or begin_ns - margin_ns <= point.time_ns <= end_ns + margin_ns]


def _from_influx(run: str) -> ReportRun:
    from monitor.influx_reader import InfluxReader

    return ReportRun(run, _points(InfluxReader(), run))
