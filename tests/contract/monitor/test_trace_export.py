"""Spans at a collector that speaks OTLP over HTTP, made of what workers and sources tell."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from brokers.telemetry.schema import RequestDone, TaskProcessed, TelemetryEvent
from monitor.errors import BadCollector
from monitor.stores import otlp as traces_module
from monitor.stores.batch_writer import BatchWriter
from monitor.stores.otlp import TraceExporter
from tests.support.brokers.ports import free_port
from tests.support.environment.checkout import ROOT
from tests.support.monitor.otlp_collector import start_otlp_collector
from tests.support.pipelines.processes import eventually

TRACE = "0af7651916cd43dd8448eb211c80319c"
ROOT_SPAN, HEAD, TAIL = "00000000000000a1", "00000000000000b2", "00000000000000c3"
NOW_NS = 1_764_043_200_000_000_000


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces_module, "_TIMEOUT_S", 1.0)


def told() -> list[TelemetryEvent]:
    """A request through two stages: as it is told, the first to be done first."""
    common: dict[str, Any] = {"run": "r1", "site": "local", "pipeline": "street", "trace": TRACE, "request": "ab"}
    times: dict[str, Any] = {"queue_ms": 1.0, "decode_ms": 2.0, "compute_ms": 30.0, "encode_ms": 0.5}
    return [
        TaskProcessed(time_ns=NOW_NS, stage="head", worker="h1", span=HEAD, parent=ROOT_SPAN, **times, **common),
        TaskProcessed(
            time_ns=NOW_NS + 10, stage="tail", worker="t1", span=TAIL, parent=HEAD, error="BadTensors", **common
        ),
        RequestDone(time_ns=NOW_NS + 20, source="cam", span=ROOT_SPAN, latency_ms=50.0, network_ms=4.0, **common),
    ]


def test_a_request_is_one_trace_and_each_span_has_its_parent_its_time_and_its_figures() -> None:
    with start_otlp_collector() as (found, url):
        traces = TraceExporter(url, "rack")
        traces.write(told())
        traces.close()
    services = [service for service, _ in found.spans]
    assert sorted(services) == ["street/cam", "street/head", "street/tail"]
    spans = {service.removeprefix("street/"): span for service, span in found.spans}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    chain = {name: (span.span_id.hex(), span.parent_span_id.hex()) for name, span in spans.items()}
    assert chain == {"cam": (ROOT_SPAN, ""), "head": (HEAD, ROOT_SPAN), "tail": (TAIL, HEAD)}
    head, tail, root = spans["head"], spans["tail"], spans["cam"]
    assert (head.start_time_unix_nano, head.end_time_unix_nano) == (NOW_NS - 33_500_000, NOW_NS)
    assert (root.start_time_unix_nano, root.end_time_unix_nano) == (NOW_NS + 20 - 50_000_000, NOW_NS + 20)
    figures = {each.key: each.value.double_value for each in head.attributes if each.key.endswith("_ms")}
    assert figures == {
        "sparse.queue_ms": 1.0, "sparse.decode_ms": 2.0, "sparse.compute_ms": 30.0, "sparse.encode_ms": 0.5,
    }  # fmt: skip
    assert (tail.status.code, tail.status.message) == (2, "BadTensors")
    assert (head.name, root.name, traces.sent, traces.dropped) == ("head", "cam", 3, 0)


def test_events_without_a_trace_or_with_a_broken_one_are_no_spans() -> None:
    tasks = [
        TaskProcessed(time_ns=NOW_NS, stage="head", worker="h1", trace=trace, span=span)
        for trace, span in [("", ""), (TRACE, ""), ("xyz", HEAD), ("0", HEAD), ("f" * 33, HEAD), (TRACE, "1" * 17)]
    ]
    with start_otlp_collector() as (found, url):
        traces = TraceExporter(url, "rack")
        traces.write(tasks)
        traces.close()
    assert (found.request_count, found.spans) == (0, [])


@pytest.mark.parametrize("trouble", ["away", "refuses"])
def test_a_collector_that_takes_nothing_costs_the_spans_and_is_told_of_once(
    trouble: str, caplog: pytest.LogCaptureFixture
) -> None:
    with start_otlp_collector() as (found, url):
        found.status = 400
        traces = TraceExporter(url if trouble == "refuses" else f"http://127.0.0.1:{free_port()}", "rack")
        writer = BatchWriter(traces, "the collector of traces")
        writer.start()
        writer.add(told())
        eventually("the loss", lambda: traces.dropped == 3)
        writer.add(told())
        eventually("the loss of the others", lambda: traces.dropped == 6)
        writer.stop(10)
    assert (writer.dropped, found.spans) == (6, [])
    assert [message for message in caplog.messages if "trace" in message] == [
        "the collector of traces did not take 3 spans, 3 so far"
    ]


def test_one_that_comes_back_is_told_the_next() -> None:
    port = free_port()
    traces = TraceExporter(f"http://127.0.0.1:{port}/", "rack")
    traces.write(told())
    with start_otlp_collector(port) as (found, _):
        traces.write(told())
        assert len(found.spans) == 3
    traces.close()
    assert (traces.sent, traces.dropped) == (3, 3)


@pytest.mark.parametrize("url", ["", "127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://", "http://host:port"])
def test_an_address_of_no_collector_is_one_clear_line(url: str) -> None:
    with pytest.raises(BadCollector) as caught:
        TraceExporter(url, "rack")
    assert str(caught.value).startswith(f"--traces {url!r}: expected the address of a collector")


def test_without_the_extra_one_line_names_it() -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None; from brokers.cli import main; "
        "sys.exit(main(['monitor', '--traces', 'http://127.0.0.1:4318', '--port', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.decode() == "sparse: --traces needs more packages: pip install 'sparse-mqtt[otel]'\n"
