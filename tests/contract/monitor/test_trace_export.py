"""Spans at an OpenTelemetry collector (OTLP over HTTP), from the events of workers and sources."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from brokers.errors import UsageError
from brokers.telemetry.schema import RequestDone, TaskProcessed, TelemetryEvent
from monitor.stores import otlp
from monitor.stores.batch_writer import BatchWriter
from monitor.stores.otlp import TraceExporter
from tests.support.brokers.ports import free_port
from tests.support.environment.checkout import ROOT
from tests.support.monitor.otlp_collector import start_otlp_collector
from tests.support.pipelines.processes import eventually

TRACE = "0af7651916cd43dd8448eb211c80319c"
ROOT_SPAN, HEAD_SPAN, TAIL_SPAN = "00000000000000a1", "00000000000000b2", "00000000000000c3"
NOW_NS = 1_764_043_200_000_000_000


@pytest.fixture(autouse=True)
def _short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "_TIMEOUT_S", 0.5)


def make_events() -> list[TelemetryEvent]:
    """A request through two stages, in the order in which its parts end."""
    ids: dict[str, Any] = {"run": "r1", "site": "local", "pipeline": "street", "trace": TRACE, "request": "ab"}
    times: dict[str, Any] = {"queue_ms": 1.0, "decode_ms": 2.0, "compute_ms": 30.0, "encode_ms": 0.5}
    head: dict[str, Any] = {"stage": "head", "worker": "h1", "span": HEAD_SPAN, "parent": ROOT_SPAN}
    tail: dict[str, Any] = {"stage": "tail", "worker": "t1", "span": TAIL_SPAN, "parent": HEAD_SPAN}
    return [
        TaskProcessed(time_ns=NOW_NS, **head, **times, **ids),
        TaskProcessed(time_ns=NOW_NS + 10, **tail, error="BadTensors", **ids),
        RequestDone(time_ns=NOW_NS + 20, source="cam", span=ROOT_SPAN, latency_ms=50.0, network_ms=4.0, **ids),
    ]


def test_request_is_one_trace_of_spans_with_parents_times_and_attributes() -> None:
    with start_otlp_collector() as (collector, url):
        exporter = TraceExporter(url, "rack")
        exporter.write(make_events())
        exporter.close()
    assert sorted(service for service, _ in collector.spans) == ["street/cam", "street/head", "street/tail"]
    spans = {service.removeprefix("street/"): span for service, span in collector.spans}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    parents = {name: (span.span_id.hex(), span.parent_span_id.hex()) for name, span in spans.items()}
    assert parents == {"cam": (ROOT_SPAN, ""), "head": (HEAD_SPAN, ROOT_SPAN), "tail": (TAIL_SPAN, HEAD_SPAN)}
    head, tail, root = spans["head"], spans["tail"], spans["cam"]
    assert (head.start_time_unix_nano, head.end_time_unix_nano) == (NOW_NS - 33_500_000, NOW_NS)
    assert (root.start_time_unix_nano, root.end_time_unix_nano) == (NOW_NS + 20 - 50_000_000, NOW_NS + 20)
    durations = {each.key: each.value.double_value for each in head.attributes if each.key.endswith("_ms")}
    assert durations == {
        "sparse.queue_ms": 1.0, "sparse.decode_ms": 2.0, "sparse.compute_ms": 30.0, "sparse.encode_ms": 0.5,
    }  # fmt: skip
    assert (tail.status.code, tail.status.message) == (2, "BadTensors")
    assert (head.name, root.name, exporter.sent, exporter.dropped) == ("head", "cam", 3, 0)


def test_events_without_valid_trace_ids_have_no_spans() -> None:
    tasks = [
        TaskProcessed(time_ns=NOW_NS, stage="head", worker="h1", trace=trace, span=span)
        for trace, span in [
            ("", ""),
            (TRACE, ""),
            ("xyz", HEAD_SPAN),
            ("0", HEAD_SPAN),
            ("f" * 33, HEAD_SPAN),
            (TRACE, "1" * 17),
        ]
    ]
    with start_otlp_collector() as (collector, url):
        exporter = TraceExporter(url, "rack")
        exporter.write(tasks)
        exporter.close()
    assert (collector.request_count, collector.spans) == (0, [])


@pytest.mark.parametrize("refuses", [True, False])
def test_lost_spans_are_counted_and_logged_once(refuses: bool, caplog: pytest.LogCaptureFixture) -> None:
    with start_otlp_collector() as (collector, url):
        collector.status = 400
        exporter = TraceExporter(url if refuses else f"http://127.0.0.1:{free_port()}", "rack")
        writer = BatchWriter(exporter, "the trace collector")
        writer.start()
        writer.add(make_events())
        eventually("the loss", lambda: exporter.dropped == 3)
        writer.add(make_events())
        writer.stop(60)
    assert (writer.dropped, collector.spans) == (6, [])
    assert [message for message in caplog.messages if "trace" in message] == [
        "the trace collector did not accept 3 spans; further losses are counted"
    ]


def test_collector_that_starts_later_gets_later_spans() -> None:
    port = free_port()
    exporter = TraceExporter(f"http://127.0.0.1:{port}/", "rack")
    exporter.write(make_events())
    with start_otlp_collector(port) as (collector, _):
        exporter.write(make_events())
        assert len(collector.spans) == 3
    exporter.close()
    assert (exporter.sent, exporter.dropped) == (3, 3)


@pytest.mark.parametrize("url", ["", "127.0.0.1:4318", "grpc://127.0.0.1:4317", "http://", "http://host:port"])
def test_bad_collector_address_raises_usage_error(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        TraceExporter(url, "rack")
    assert (caught.value.code, caught.value.fields) == ("BadCollector", {"url": url})


def test_missing_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None; from brokers.cli import main; "
        "sys.exit(main(['monitor', '--traces', 'http://127.0.0.1:4318', '--port', '1']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.decode() == "sparse: --traces needs more packages: pip install 'sparse-mqtt[otel]'\n"
