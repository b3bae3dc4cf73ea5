"""Where the runs of a report come from: folders, SQLite files, InfluxDB."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from monitor.analysis.run_metrics import MEASUREMENTS_READ
from monitor.bench.manifest import MANIFEST_FILE as MANIFEST
from monitor.bench.manifest import Manifest, SuiteRecord, load_manifest
from monitor.errors import BadManifest, BadStore, CannotCompare, NoSamples, NotARun
from monitor.points.points import TelemetryPoint
from monitor.report.run import ReportRun
from monitor.stores.base import StoreReader
from monitor.stores.influx.config import URL_VARIABLE, influx_target
from monitor.stores.influx.reader import InfluxReader
from monitor.stores.sqlite import TELEMETRY_FILE, SqliteReader

INFLUX_PREFIX = "influx:"
# What a monitor saw of its node, for whichever run that was; the others are told by the run itself.
_OF_A_NODE = ("interface", "process", "gpu", "power", "missing")
_OF_A_RUN = tuple(name for name in MEASUREMENTS_READ if name not in _OF_A_NODE)


@dataclass
class ReportInputs:
    """What was named on the command line: runs, each group with a label of its own, and what had to be left out."""

    runs: list[ReportRun] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def load_runs(names: Sequence[str]) -> ReportInputs:
    """The runs of everything that was named, in that order.

    Raises `NotARun`, `BadManifest`, `BadStore`, and `CannotCompare` for runs of both kinds.
    """
    found = ReportInputs()
    for name in names:
        runs = _runs(name, found.skipped)
        labels = _free((run.label for run in runs), {run.label for run in found.runs})
        sweeps = _free((run.sweep_name for run in runs), {run.sweep_name for run in found.runs})
        found.runs += [replace(run, group=labels[run.label], sweep_name=sweeps[run.sweep_name]) for run in runs]
    _check(found.runs)
    return found


def _free(names: Iterable[str], taken: set[str]) -> dict[str, str]:
    """Each of the names as it is, or with a number where somebody else has it."""
    found: dict[str, str] = {}
    for name in dict.fromkeys(names):
        numbered, number = name, 2
        while numbered in taken or numbered in found.values():
            numbered, number = f"{name} ({number})", number + 1
        found[name] = numbered
    return found


def _check(runs: Sequence[ReportRun]) -> None:
    labels: dict[str, str] = {}
    for run in runs:
        labels.setdefault(run.kind, run.label)
    if len(labels) > 1:
        raise CannotCompare(labels["inference"], labels["training"])


def _runs(name: str, left_out: list[str]) -> list[ReportRun]:
    if name.startswith(INFLUX_PREFIX):
        return _from_influx(name, name.removeprefix(INFLUX_PREFIX))
    path = Path(name)
    if path.is_file():
        return _from_file(path, name, path.stem, 0)
    if not path.is_dir():
        raise NotARun(name, "there is no such file or folder")
    if (path / TELEMETRY_FILE).is_file():
        return _from_file(path / TELEMETRY_FILE, name, path.resolve().name, _warm_up_of(path.resolve()))
    manifest = load_manifest(path)
    if manifest is None:
        expected = f"expected the folder of a run, which has {TELEMETRY_FILE} in it, or of a benchmark, with {MANIFEST}"
        raise NotARun(name, expected)
    return _from_bench(path, manifest, left_out)


def _warm_up_of(folder: Path) -> int:
    """As the benchmark says that this is a run of; a manifest of anything else in the folder above says nothing."""
    try:
        above = load_manifest(folder.parent)
    except BadManifest:
        return 0
    of_it = above is not None and any(folder.name in suite.runs for suite in above.suites)
    return above.warm_up if above is not None and of_it else 0


def _from_bench(folder: Path, manifest: Manifest, left_out: list[str]) -> list[ReportRun]:
    """The runs that the manifest names; one that failed has no telemetry, or nothing in it, and is left out."""
    found: list[ReportRun] = []
    for suite in manifest.suites:
        for name in suite.runs:
            try:
                runs = _from_reader(
                    SqliteReader(folder / name / TELEMETRY_FILE), str(folder / name), name, manifest.warm_up
                )
                of = Path(suite.path).stem
                found += [replace(run, group=suite.name, sweep_name=of, sweep_setting=_setting(suite)) for run in runs]
            except (NotARun, BadStore) as error:
                left_out.append(str(error))
    if not found:
        raise NotARun(str(folder), f"none of its runs can be read: {'; '.join(left_out) or 'it has none'}")
    return [replace(run, manifest=manifest) for run in found]


def _setting(suite: SuiteRecord) -> tuple[str, float | None] | None:
    """What a sweep varied, and its value at this point of it; None for one beside them all, as a network uncut."""
    varied = suite.sweep_point.get("sweep")
    if not isinstance(varied, str):
        return None
    value = suite.sweep_point.get(varied)
    return varied, float(value) if isinstance(value, int | float) else None


def _from_file(path: Path, name: str, label: str, warm_up: int) -> list[ReportRun]:
    """What a person named: a file of something else is a mistake of theirs, and no failure of ours."""
    try:
        return _from_reader(SqliteReader(path), name, label, warm_up)
    except BadStore as error:
        raise NotARun(name, error.problem) from None


def _from_reader(reader: StoreReader, name: str, label: str, warm_up: int) -> list[ReportRun]:
    """All runs of a file; `label` is for a single one, which may have no name, or one that says nothing."""
    runs = reader.runs()
    if not runs:
        raise NotARun(name, "the run has no samples: neither requests nor steps are in its telemetry")
    return _of_reader(reader, name, runs, label, warm_up)


def _of_reader(reader: StoreReader, name: str, runs: Sequence[str], label: str, warm_up: int) -> list[ReportRun]:
    found = [
        ReportRun(label if len(runs) == 1 else run or label, _points(reader, run), warm_up=warm_up) for run in runs
    ]
    for each in found:
        try:
            each.window  # noqa: B018 - it is made when it is asked for, and may have nothing in it
        except NoSamples as error:
            raise NotARun(name, str(error)) from None
    return found


def _points(reader: StoreReader, run: str) -> dict[str, Sequence[TelemetryPoint]]:
    """By measurement. What a node's monitor saw has no run where it serves many: then it is what it saw meanwhile."""
    found: dict[str, Sequence[TelemetryPoint]] = {name: reader.points(name, run) for name in (*_OF_A_RUN, *_OF_A_NODE)}
    ends = [point.time_ns for name in ("request", "step") for point in found[name]]
    if not ends:
        return found
    began_ns = min(point.time_ns - _length_ns(point) for name in ("request", "step") for point in found[name])
    for name in _OF_A_NODE:
        if run and not found[name]:
            found[name] = _between(reader.points(name, ""), began_ns, max(ends), everything=name == "missing")
    return found


def _length_ns(point: TelemetryPoint) -> int:
    length_ms = point.fields.get("latency_ms", point.fields.get("step_ms"))
    return round(float(length_ms) * 1e6) if isinstance(length_ms, int | float) else 0


def _between(points: Iterable[TelemetryPoint], begin_ns: int, end_ns: int, everything: bool) -> list[TelemetryPoint]:
    margin_ns = 2_000_000_000  # so that the first and the last moment lie between two samples
    return [point for point in points if everything or begin_ns - margin_ns <= point.time_ns <= end_ns + margin_ns]


def _from_influx(name: str, run: str) -> list[ReportRun]:
    target = influx_target(os.environ)
    if target is None:
        raise NotARun(name, f"set {URL_VARIABLE} to the address of InfluxDB")
    reader = InfluxReader(target)
    if run not in reader.runs():
        raise NotARun(name, f"there is no such run in {target}")
    return _of_reader(reader, name, [run], run, 0)
