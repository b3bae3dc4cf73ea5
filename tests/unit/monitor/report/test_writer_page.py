"""The page of a report: escaped, self-contained, with summary, figures, omissions and provenance."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from monitor.bench.manifest import Manifest
from monitor.report.inputs import ReportInputs
from monitor.report.plots import draw_figure, render_image
from monitor.report.run import ReportRun
from monitor.report.writer import PageContent, build_figures, inline_svg, render_page
from tests.support.monitor.synthetic_runs import make_manifest
from tests.unit.monitor.report.report_runs import FOUR_REQUESTS, LINK_TRAFFIC, make_repeats, make_run, summarize_runs

HOSTILE = "<script>alert(1)</script> & $x^2$ _"
SVG = '<?xml version="1.0"?>\n<svg width="300pt" height="200pt"><path id="a" fill="#1f2328"/><use href="#a"/></svg>'


def render(runs: Sequence[ReportRun], skipped: Sequence[str] = ()) -> str:
    columns, rows = summarize_runs(runs)
    figures, omitted = build_figures(runs)
    svgs = {figure.name: SVG for figure in figures}
    inputs = ReportInputs(list(runs), list(skipped))
    return render_page(PageContent(inputs, columns, rows, figures, svgs, omitted, "2026-01-02, 03:04"))


def make_bench_run(name: str = "cloud", **suite: Any) -> ReportRun:
    document = make_manifest({name: [f"{name}-1"]}, warm_up=20)
    document["suites"][0].update(suite)
    return make_run(f"{name}-1", FOUR_REQUESTS, group=name, manifest=Manifest.model_validate(document))


def test_hostile_names_are_escaped() -> None:
    page = render([make_bench_run(HOSTILE), make_run(HOSTILE, FOUR_REQUESTS)], skipped=[HOSTILE])
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6
    assert "<script" not in inline_svg(SVG, "completion", HOSTILE)


def test_page_loads_nothing() -> None:
    page = render([make_run("a", FOUR_REQUESTS)])
    assert {link.partition("/")[0] for link in re.findall(r'(?:src|href)="([^"#][^"]*)"', page)} == {
        "data:,",
        "figures",
        "data",
    }
    assert not re.search(r"@import|url\((?!#)", page)


def test_plot_is_inlined_with_unique_ids_and_page_colours() -> None:
    svg = inline_svg(SVG, "latency", "Latency. Of requests.")
    assert svg == (
        '<svg role="img" aria-label="Latency. Of requests." ><path id="latency-a" fill="var(--ink)"/>'
        '<use href="#latency-a"/></svg>'
    )


def test_real_plot_keeps_its_view_box_and_loses_its_size() -> None:
    figure = build_figures(make_repeats(a=1, b=5))[0][0]
    svg = inline_svg(render_image(draw_figure(figure, ["cloud"]), "svg").decode(), "completion", "")
    opening = svg[: svg.index(">")]
    assert "viewBox" in opening
    assert "height=" not in opening
    assert "width=" not in opening
    assert "<metadata>" not in svg
    assert "var(--c0)" in svg


def test_summary_has_ratios_ranges_and_missing_values() -> None:
    page = render([*make_repeats(a=1, b=4, c=2), make_run("other", [*FOUR_REQUESTS, *LINK_TRAFFIC])])
    assert page.count('<td title="not measured">&ndash;</td>') == 1  # traffic between sites, of the repeats
    assert '<td>0.5<span class="spread">0.25 to 1</span>' in page
    assert '<span class="ratio good">&times; 3.00</span>' in page
    assert "Report: cloud and other" in page


def test_title_of_many_runs_is_shortened() -> None:
    page = render([make_run(name, FOUR_REQUESTS) for name in "abcdef"])
    assert "<h1>Report: a, b, c and 3 more</h1>" in page


def test_omitted_figures_and_skipped_runs_are_listed() -> None:
    page = " ".join(render([make_run("a", FOUR_REQUESTS)], skipped=["cloud-3: no telemetry"]).split())
    assert "Skipped: cloud-3: no telemetry." in page
    assert "Throughput by batch (no run is part of a sweep)" in page
    assert "GPU use and power, Energy (no power was measured: no power sensor reported)" in page


def test_long_data_is_thinned_on_the_page() -> None:
    long_run = make_run("long", [*FOUR_REQUESTS[:1] * 300])
    assert "200 of 301 rows; the CSV file has all." in render([long_run])


def test_provenance_of_a_benchmark() -> None:
    overrides = {"pipeline.cuts": None, "source.limit": 1, "source.loop": True}
    page = render([make_bench_run(overrides=overrides)])
    assert "pipeline.cuts removed, source.limit 1, source.loop yes" in page
    for fact in ("memory 7.5 GiB", "dirty no", "torch 2.7.0", "device to cloud: 8 ms, 50 Mbit/s, emulated"):
        assert fact in page
    assert "3 per suite; the first 20 requests or steps are not measured" in page
    assert "Runs without a manifest" not in page


def test_provenance_of_a_single_run() -> None:
    page = render([make_run("a", FOUR_REQUESTS)])
    assert "Runs without a manifest" in page
    assert "pipeline street; node unknown" in page
