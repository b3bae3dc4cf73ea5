"""The end of a report's page: what was run, on what, with which versions and links. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from monitor.bench.manifest import Manifest, SuiteRecord
from monitor.report.run import ReportRun

_MEMORY, _GIB = "memory_bytes", 1 << 30  # of `monitor.bench.environment`


def provenance_html(runs: Iterable[ReportRun]) -> str:
    """A part for each benchmark; for runs that have no manifest, what their telemetry says."""
    runs = list(runs)
    found = [_of_manifest(manifest) for manifest in _manifests(runs)]
    if alone := [run for run in runs if run.manifest is None]:
        found.append(_of_runs(alone))
    return "\n".join(found)


def _manifests(runs: Iterable[ReportRun]) -> list[Manifest]:
    return list({id(run.manifest): run.manifest for run in runs if run.manifest is not None}.values())


def _of_runs(runs: Iterable[ReportRun]) -> str:
    rows = {run.name: f"pipeline {', '.join(run.pipelines) or 'without a name'}; {_nodes(run)}" for run in runs}
    return f"<h3>Runs without a manifest</h3>\n{_table(rows)}"


def _nodes(run: ReportRun) -> str:
    nodes = sorted({point.tags.get("node", "") for point in run.window.points} - {""})
    return f"node {', '.join(nodes)}" if nodes else "node unknown"


def _of_manifest(manifest: Manifest) -> str:
    rows = {
        "command": " ".join(manifest.command),
        "when": f"{manifest.started_at} to {manifest.ended_at or 'now: it is not at its end'}",
        "runs": f"{manifest.repeats} of each suite; the first {manifest.warm_up} requests or steps are not measured",
        "versions": _said(manifest.versions),
        "revision": _said(manifest.revision),
        "hardware": _said(manifest.hardware),
    }
    suites = "\n".join(_suite(suite) for suite in manifest.suites)
    return f"<h3>{escape(', '.join(suite.name for suite in manifest.suites))}</h3>\n{_table(rows)}\n{suites}"


def _suite(suite: SuiteRecord) -> str:
    rows = {"links": "; ".join(_link(link) for link in suite.links) or "none", "seed": str(suite.seed)}
    if suite.overrides:
        rows["changed"] = ", ".join(_changed(name, value) for name, value in suite.overrides.items())
    return f"""<details><summary>{escape(suite.name)}: its links and its pipeline file</summary>
{_table(rows)}
<pre tabindex="0">{escape(suite.pipeline_text)}</pre></details>"""


def _changed(name: str, value: Any) -> str:
    """None is a key that was taken out of the file, not one that is unknown."""
    return f"{name} left out" if value is None else f"{name} {_said(value)}"


def _link(link: Any) -> str:
    rate = f", {link.rate_mbit:g} Mbit/s" if link.rate_mbit else ""
    emulated = ", emulated" if link.emulated else ""
    return f"{link.site} to {link.to}: {link.delay_ms:g} ms{rate}{emulated}"


def _said(found: Any) -> str:
    """Anything of JSON as one line."""
    if isinstance(found, Mapping):
        return ", ".join(_named(name, value) for name, value in found.items() if value not in (None, "", {}, []))
    if isinstance(found, list | tuple):
        return "; ".join(_said(each) for each in found)
    if isinstance(found, bool):  # 1 and 0 are numbers, though they equal these
        return "yes" if found else "no"
    return "unknown" if found is None else str(found)


def _named(name: str, value: Any) -> str:
    if name == _MEMORY and isinstance(value, int | float):
        return f"memory {value / _GIB:.1f} GiB"
    return f"{name} {_said(value)}"


def _table(rows: Mapping[str, str]) -> str:
    body = "\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f'<div class="box"><table class="plain"><tbody>\n{body}\n</tbody></table></div>'
