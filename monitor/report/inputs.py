"""The runs of a report, loaded from run folders, benchmark folders, SQLite files and InfluxDB."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from brokers.errors import UsageError
from monitor.analysis.measurement_window import select_window
from monitor.analysis.run_metrics import METRIC_INPUTS
from monitor.bench.manifest import MANIFEST_FILE, Manifest, SuiteRecord, load_manifest
from monitor.errors import BadStore, NoSamples
from monitor.report.run import ReportRun
from monitor.stores.influx.config import URL_VARIABLE, influx_target
from monitor.stores.influx.store import InfluxReader
from monitor.stores.sqlite import TELEMETRY_FILE, SqliteReader

INFLUX_PREFIX = "influx:"
# Measurements of a node, which a monitor that serves several runs stores without the name of a run.
_NODE_MEASUREMENTS = ("interface", "process", "gpu", "power", "missing")
_MEASUREMENTS = dict.fromkeys((*METRIC_INPUTS, *_NODE_MEASUREMENTS))
# Samples of a node shortly before and after a run, between which its first and last moment are interpolated.
_MARGIN_NS = 2_000_000_000


@dataclass
class ReportInputs:
    """The runs of a report; labels of different inputs are distinct. `skipped` has the reasons for unreadable runs."""

    runs: list[ReportRun] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def load_runs(names: Sequence[str]) -> ReportInputs:
    """Load all runs of the inputs in `names`, in their order.

    Raises `UsageError`: "NotARun", "BadManifest", or "CannotCompare" for a mix of inference and training.
    """
    inputs = ReportInputs()
    for name in names:
        runs = _load(name, inputs.skipped)
        labels = _unique((run.label for run in runs), {run.label for run in inputs.runs})
        sweeps = _unique((run.sweep_name for run in runs), {run.sweep_name for run in inputs.runs})
        inputs.runs += [replace(run, group=labels[run.label], sweep_name=sweeps[run.sweep_name]) for run in runs]
    examples = {run.kind: run.label for run in reversed(inputs.runs)}
    if len(examples) > 1:
        raise UsageError(
            "CannotCompare",
            f"cannot compare {examples['inference']!r} (inference) with {examples['training']!r} (training): they have "
            "no figure in common; make a report of each",
        )
    return inputs


def _unique(names: Iterable[str], taken: set[str]) -> dict[str, str]:
    """Each name, with a number where it is taken."""
    unique: dict[str, str] = {}
    for name in dict.fromkeys(names):
        candidates = (name if number == 1 else f"{name} ({number})" for number in count(1))
        unique[name] = next(each for each in candidates if each not in taken and each not in unique.values())
    return unique


def _not_a_run(name: str, problem: str) -> UsageError:
    return UsageError("NotARun", f"cannot report on {name}: {problem}", name=name, problem=problem)


def _load(name: str, skipped: list[str]) -> list[ReportRun]:
    if name.startswith(INFLUX_PREFIX):
        return [_load_influx(name, name.removeprefix(INFLUX_PREFIX))]
    path = Path(name)
    if path.is_file():
        return _load_sqlite(path, name, path.stem)
    if (path / TELEMETRY_FILE).is_file():
        folder = path.resolve()
        return _load_sqlite(path / TELEMETRY_FILE, name, folder.name, _warm_up_of(folder))
    if not path.is_dir():
        raise _not_a_run(name, "there is no such file or folder")
    manifest = load_manifest(path)
    if manifest is None:
        raise _not_a_run(
            name, f"expected the folder of a run, with {TELEMETRY_FILE}, or of a benchmark, with {MANIFEST_FILE}"
        )
    return _load_bench(path, manifest, skipped)


def _warm_up_of(folder: Path) -> int:
    """The warm-up of a run whose folder is in that of its benchmark; 0 for any other run."""
    try:
        manifest = load_manifest(folder.parent)
    except UsageError:  # another program's file
        return 0
    return manifest.warm_up if manifest and any(folder.name in suite.runs for suite in manifest.suites) else 0


def _load_bench(folder: Path, manifest: Manifest, skipped: list[str]) -> list[ReportRun]:
    """The runs in the manifest; those that failed have no samples or no telemetry and are skipped."""
    loaded = []
    for suite in manifest.suites:
        sweep_name, sweep_setting = Path(suite.path).stem, _sweep_setting(suite)
        for run_name in suite.runs:
            path = folder / run_name
            try:
                runs = _load_sqlite(path / TELEMETRY_FILE, str(path), run_name, manifest.warm_up)
            except UsageError as error:
                skipped.append(str(error))
                continue
            loaded += [
                replace(run, group=suite.name, sweep_name=sweep_name, sweep_setting=sweep_setting, manifest=manifest)
                for run in runs
            ]
    if not loaded:
        raise _not_a_run(str(folder), f"none of its runs can be read: {'; '.join(skipped) or 'it has none'}")
    return loaded


def _sweep_setting(suite: SuiteRecord) -> tuple[str, float | None] | None:
    """The varied setting of a sweep, and its value; None for a point without a value, such as an uncut network."""
    varied = suite.sweep_point.get("sweep")
    value = suite.sweep_point.get(varied or "")
    return (varied, None if value is None else float(value)) if varied else None


def _load_sqlite(path: Path, name: str, label: str, warm_up: int = 0) -> list[ReportRun]:
    """All runs of a file; `label` is the name of a single run."""
    try:
        reader = SqliteReader(path)
        run_names = reader.runs()
        if not run_names:
            raise _not_a_run(name, "the run has no samples: neither requests nor steps are in its telemetry")
        labels = [label] if len(run_names) == 1 else [run_name or label for run_name in run_names]
        return [
            _load_run(reader, name, run_name, run_label, warm_up)
            for run_name, run_label in zip(run_names, labels, strict=True)
        ]
    except BadStore as error:
        raise _not_a_run(name, error.problem) from None


def _load_influx(name: str, run_name: str) -> ReportRun:
    target = influx_target(os.environ)
    if target is None:
        raise _not_a_run(name, f"set {URL_VARIABLE} to the address of InfluxDB")
    reader = InfluxReader(target)
    if run_name not in reader.runs():
        raise _not_a_run(name, f"there is no such run in {target}")
    return _load_run(reader, name, run_name, run_name, 0)


def _load_run(reader: SqliteReader | InfluxReader, name: str, run_name: str, label: str, warm_up: int) -> ReportRun:
    """One run; for a node's measurements without a run, it has the points from the time of the run."""
    points = {measurement: reader.points(measurement, run_name) for measurement in _MEASUREMENTS}
    try:
        whole, _ = select_window(points), select_window(points, warm_up)
    except NoSamples as error:
        raise _not_a_run(name, str(error)) from None
    for measurement in _NODE_MEASUREMENTS:
        if run_name and not points[measurement]:
            points[measurement] = [
                point
                for point in reader.points(measurement, "")
                if measurement == "missing" or whole.begin_ns - _MARGIN_NS <= point.time_ns <= whole.end_ns + _MARGIN_NS
            ]
    return ReportRun(label, points, warm_up=warm_up)
