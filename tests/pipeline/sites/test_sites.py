"""Pipelines over sites on one machine: a Mosquitto for each, bridges between them, and slow links.

The tests read the bytes of a link, and break it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from brokers.dispatch.worker_registry import PRESENCE_TIMEOUT_S
from tests.soak.harness.training_run import (
    STAGES,
    TrainingRunCommand,
    assert_weights_equal,
    expected_weights,
    write_training_pipeline_file,
)
from tests.support.brokers.mqtt_packets import PacketCapture
from tests.support.monitor.telemetry_file import read_points
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, eventually
from tests.support.pipelines.sites import THREE_SITES, capture_link, get_link, start_sites

PRESENCE_TOPIC = re.compile(r"sparse/(\w+)/[^/]+/[^/]+/up/[^/]+")
SITE_TOPIC = re.compile(r"sparse/(\w+)/")
# Longer than any test: no request is sent again because its lease ended.
LEASE_S = 600.0
# How long a link is down: until the workers behind it are lost, or for a gap in their records only.
LONG_OUTAGE_S = PRESENCE_TIMEOUT_S + 1
SHORT_OUTAGE_S = PRESENCE_TIMEOUT_S / 2


def write_three_site_file(folder: Path, source: Mapping[str, Any]) -> Path:
    """A stage at each site, the source at the device; 800 kB cross each link."""
    stages = [
        stage_table("head", "add_padding", site="device"),
        stage_table("body", "add_one", site="cloudlet"),
        stage_table("tail", "strip_padding", site="cloud"),
    ]
    path = write_pipeline_file(folder, stages, {**source, "site": "device"}, name="far", lease_s=LEASE_S)
    path.write_text(path.read_text() + THREE_SITES)
    return path


def read_results(folder: Path) -> list[dict[str, Any]]:
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def misdirected_topics(capture: PacketCapture, near: set[str], far: set[str]) -> list[str]:
    """Topics of messages that a link should not carry from the sites `near` to the sites `far`."""

    def belongs(topic: str) -> bool:
        if match := PRESENCE_TOPIC.fullmatch(topic):
            return match[1] in near
        reader = SITE_TOPIC.match(topic)
        return reader is not None and reader[1] in far

    return [publish.topic for publish in capture.publishes if not belongs(publish.topic)]


def assert_minimal_traffic(captures: Mapping[str, PacketCapture], near: set[str], far: set[str]) -> None:
    """Assert that each message has crossed a link once, and only if its reader is on the other side."""
    assert misdirected_topics(captures["outbound"], near, far) == []
    assert misdirected_topics(captures["inbound"], far, near) == []
    for capture in captures.values():
        messages = Counter(
            publish.dedup_key for publish in capture.publishes if not PRESENCE_TOPIC.fullmatch(publish.topic)
        )
        assert [key for key, count in messages.items() if count > 1] == []


def test_links_carry_each_message_once(sandbox: ProcessSandbox) -> None:
    count = 40
    path = write_three_site_file(sandbox.folder, counting_source_table(count))
    with start_sites(path) as sites:
        near_link, far_link = get_link(sites, "device", "cloudlet"), get_link(sites, "cloudlet", "cloud")
        near, far = capture_link(near_link), capture_link(far_link)
        result = sandbox.run_sparse("run", path, "--json", "--out", sandbox.folder / "out")
        assert result.returncode == 0, result.stderr
    summary = result.json_output
    assert_minimal_traffic(near, {"device"}, {"cloudlet", "cloud"})
    assert_minimal_traffic(far, {"device", "cloudlet"}, {"cloud"})
    assert (summary["results"], summary["lost"], summary["retries"]) == (count, 0, 0)

    activations = [each for each in far["outbound"].publishes if each.properties.get("kind") == b"activation"]
    assert {each.topic for each in activations} == {"sparse/cloud/far/tail/in/tail-1"}
    content_bytes = summary["stages"]["body"]["bytes_out"]
    payload_bytes = sum(each.payload_bytes for each in activations)
    assert content_bytes <= payload_bytes < 1.01 * content_bytes
    # All other bytes are those of control messages, presence records and the MQTT handshake, which was not captured.
    assert 0 <= far_link.byte_counts["outbound"] - far["outbound"].total_bytes < 1000
    assert far_link.byte_counts["outbound"] < 1.02 * payload_bytes + 2000 * summary["elapsed_s"] + 50_000
    results = [each for each in far["inbound"].publishes if each.properties.get("kind") == b"result"]
    assert len(results) == count
    assert {each.topic.split("/")[1] for each in results} == {"device"}
    sandbox.assert_nothing_left()


def test_links_have_their_delay_and_byte_counts(sandbox: ProcessSandbox) -> None:
    path = write_three_site_file(sandbox.folder, counting_source_table(20, window=1))
    result = sandbox.run_sparse("run", path, "--json", "--out", sandbox.folder / "out")
    assert result.returncode == 0, result.stderr
    summary = result.json_output
    assert summary["latency_ms"]["p50"] >= 20.0  # 1 + 9 ms each way
    assert [(link["site"], link["to"], link["delay_ms"]) for link in summary["links"]] == [
        ("cloudlet", "cloud", 9.0),
        ("device", "cloudlet", 1.0),
    ]
    assert all(link["bytes_out"] > 20 * 800_000 for link in summary["links"])
    points = read_points(sandbox.folder / "out" / summary["files"]["telemetry"], "link")
    assert len(points) > 2  # two in a second, and two at the end
    last = {(point.tags["from"], point.tags["to"]): point.fields for point in points}
    for link in summary["links"]:
        fields = last[link["site"], link["to"]]
        for name in ("bytes_out", "bytes_in"):
            assert link[name] - 10_000 <= int(fields[name] or 0) <= link[name]  # DISCONNECT may follow the last point
    sandbox.assert_nothing_left()


def test_long_outage_of_a_bridge_costs_no_request(sandbox: ProcessSandbox) -> None:
    count = 150
    path = write_three_site_file(sandbox.folder, counting_source_table(count, every_s=0.05))
    out = sandbox.folder / "out"
    with start_sites(path) as sites:
        run = sandbox.start_sparse("run", path, "--json", "--out", out)
        eventually("some results", lambda: len(read_results(out)) >= 20)
        link = get_link(sites, "cloudlet", "cloud")
        link.disable()
        time.sleep(LONG_OUTAGE_S)
        link.enable()
        summary = run.wait().json_output
    assert (summary["requests"], summary["results"], summary["lost"], summary["failed"]) == (count, count, 0, 0)
    values = sorted(result["values"]["values"] for result in read_results(out))
    assert values == [float(index + 1) for index in range(count)]
    sandbox.assert_nothing_left()


def test_requests_lost_in_a_short_outage_are_sent_again(sandbox: ProcessSandbox) -> None:
    # The far worker always has a task; its messages of the time of the outage are lost.
    stages = [
        stage_table("head", "add_one", site="device"),
        stage_table("tail", "SleepExecutor", settings={"seconds": 0.4}, site="cloud"),
    ]
    source = counting_source_table(20, site="device")
    path = write_pipeline_file(sandbox.folder, stages, source, name="near", lease_s=LEASE_S)
    tables = '[[site]]\nname = "device"\nlinks = [{ to = "cloud", delay_ms = 1 }]\n[[site]]\nname = "cloud"\n'
    path.write_text(path.read_text() + tables)
    out = sandbox.folder / "out"
    with start_sites(path) as sites:
        run = sandbox.start_sparse("run", path, "--json", "--out", out)
        eventually("some results", lambda: len(read_results(out)) >= 3)
        link = get_link(sites, "device", "cloud")
        link.disable()
        time.sleep(SHORT_OUTAGE_S)
        link.enable()
        summary = run.wait().json_output
    assert (summary["results"], summary["lost"], summary["failed"]) == (20, 0, 0)
    # "Suspect"; "WorkerLost" if the bridge took so long to reconnect that the worker's records were missed for 10 s.
    assert {"Suspect", "WorkerLost"} & set(summary["retries_by_reason"])
    sandbox.assert_nothing_left()


def test_killed_broker_of_an_intermediate_site_costs_no_request(sandbox: ProcessSandbox) -> None:
    """It is restarted at once: presence records, one a second, need not show a gap."""
    path = write_three_site_file(sandbox.folder, counting_source_table(80, every_s=0.05))
    out = sandbox.folder / "out"
    with start_sites(path) as sites:
        run = sandbox.start_sparse("run", path, "--json", "--out", out)
        eventually("some results", lambda: len(read_results(out)) >= 20)
        site = sites.brokers["cloudlet"]
        assert site.local_broker is not None
        os.kill(site.local_broker.pid, signal.SIGKILL)
        eventually("the exit of the broker", lambda: site.has_exited)
        site.restart()
        summary = run.wait().json_output
    assert (summary["results"], summary["lost"], summary["failed"]) == (80, 0, 0)
    sandbox.assert_nothing_left()


def test_outage_during_training_changes_no_weight(sandbox: ProcessSandbox) -> None:
    sites = ("device", "cloudlet", "cloud")
    path = write_training_pipeline_file(sandbox.folder, epochs=12, sites=sites, delays_ms=(1, 9))
    with start_sites(path) as brokers:
        link = get_link(brokers, "cloudlet", "cloud")
        captures = capture_link(link)
        run = TrainingRunCommand(sandbox, path)
        run.wait_for_step(10)
        assert_minimal_traffic(captures, {"device", "cloudlet"}, {"cloud"})
        link.tap = None
        link.disable()
        time.sleep(LONG_OUTAGE_S)
        link.enable()
        summary = run.wait()
    assert summary["steps"] == 36
    assert_weights_equal(run.load_weights(), expected_weights(36))
    assert list(summary["stages"]) == list(STAGES)
    sandbox.assert_nothing_left()
