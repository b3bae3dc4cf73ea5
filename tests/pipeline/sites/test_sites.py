"""Three sites on one machine, each with a Mosquitto of its own, bridges between them, and links that are slow.

A test listens at the link, counts every byte that crosses it, and cuts it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path

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

PRESENCE = re.compile(r"sparse/(\w+)/[^/]+/[^/]+/up/[^/]+")
READER = re.compile(r"sparse/(\w+)/")
REQUESTS = 40
CUT_S = 10.0


def detector(folder: Path, source: dict[str, object], **middle: object) -> Path:
    """A part at each site, the source at the device; 800 kB cross each cut."""
    stages = [
        stage_table("head", "add_padding", site="device"),
        stage_table("body", "add_one", site="cloudlet", **middle),
        stage_table("tail", "strip_padding", site="cloud"),
    ]
    path = write_pipeline_file(folder, stages, {**source, "site": "device"}, name="far")
    path.write_text(path.read_text() + THREE_SITES)
    return path


def local_leaks(wire: PacketCapture, near: set[str], far: set[str]) -> list[str]:
    """Topics of messages that had no business on the link in this direction: from `near` to `far`."""

    def belongs(topic: str) -> bool:
        if found := PRESENCE.fullmatch(topic):
            return found[1] in near
        reader = READER.match(topic)
        return reader is not None and reader[1] in far

    return [each.topic for each in wire.publishes if not belongs(each.topic)]


def assert_only_what_had_to_cross(heard: dict[str, PacketCapture], near: set[str], far: set[str]) -> None:
    assert local_leaks(heard["outbound"], near, far) == []
    assert local_leaks(heard["inbound"], far, near) == []
    for wire in heard.values():
        about_requests = [each for each in wire.publishes if not PRESENCE.fullmatch(each.topic)]
        twice = [
            identity for identity, count in Counter(each.dedup_key for each in about_requests).items() if count > 1
        ]
        assert twice == []


def test_a_pipeline_over_three_sites_sends_over_each_link_what_has_to_cross_it_and_once(
    sandbox: ProcessSandbox,
) -> None:
    path = detector(sandbox.folder, counting_source_table(REQUESTS))
    with start_sites(path) as sites:
        near, far = get_link(sites, "device", "cloudlet"), get_link(sites, "cloudlet", "cloud")
        heard_near, heard_far = capture_link(near), capture_link(far)
        said = sandbox.start_sparse("run", path, "--json", "--out", sandbox.folder / "out").wait()
        assert said.returncode == 0, said.stderr
        summary = said.json_output
        time.sleep(0.5)  # what is still under way
        assert_only_what_had_to_cross(heard_near, {"device"}, {"cloudlet", "cloud"})
        assert_only_what_had_to_cross(heard_far, {"device", "cloudlet"}, {"cloud"})
    assert (summary["results"], summary["lost"], summary["retries"]) == (REQUESTS, 0, 0)

    activations = [each for each in heard_far["outbound"].publishes if each.properties.get("kind") == b"activation"]
    assert {each.topic for each in activations} == {"sparse/cloud/far/tail/in/tail-1"}
    content_bytes = summary["stages"]["body"]["bytes_out"]
    crossed_bytes = sum(each.payload_bytes for each in activations)
    assert content_bytes <= crossed_bytes < 1.01 * content_bytes, "the bodies, and their headers, and nothing twice"
    # Every byte is accounted for: activations, what is said of them and of who is up, and MQTT's own handshakes.
    # The bridge had greeted before we listened.
    assert 0 <= far.byte_counts["outbound"] - heard_far["outbound"].total_bytes < 1000
    assert far.byte_counts["outbound"] < 1.02 * crossed_bytes + 2000 * summary["elapsed_s"] + 50_000
    results = [each for each in heard_far["inbound"].publishes if each.properties.get("kind") == b"result"]
    assert len(results) == REQUESTS
    assert {each.topic.split("/")[1] for each in results} == {"device"}
    sandbox.assert_nothing_left()


def test_a_link_costs_its_delay_each_way(sandbox: ProcessSandbox) -> None:
    path = detector(sandbox.folder, counting_source_table(20, window=1))
    said = sandbox.start_sparse("run", path, "--json", "--out", sandbox.folder / "out").wait()
    assert said.returncode == 0, said.stderr
    summary = said.json_output
    # There by both links, and straight back: 1 + 9 ms each way; what is more is work, and this machine.
    assert summary["latency_ms"]["p50"] >= 20.0
    assert [(each["site"], each["to"], each["delay_ms"]) for each in summary["links"]] == [
        ("cloudlet", "cloud", 9.0),
        ("device", "cloudlet", 1.0),
    ]
    assert all(each["bytes_out"] > 20 * 800_000 for each in summary["links"])
    told = read_points(sandbox.folder / "out" / summary["files"]["telemetry"], "link")
    assert len(told) > 2  # twice a second, and at the end
    last = {(point.tags["from"], point.tags["to"]): point.fields for point in told}
    for each in summary["links"]:
        carried = last[each["site"], each["to"]]
        for field, crossed in (("bytes_out", each["bytes_out"]), ("bytes_in", each["bytes_in"])):
            assert crossed - 10_000 <= int(carried[field] or 0) <= crossed  # a goodbye may cross after it was told
    sandbox.assert_nothing_left()


def test_a_bridge_that_is_down_for_a_while_costs_no_request(sandbox: ProcessSandbox) -> None:
    path = detector(sandbox.folder, counting_source_table(150, every_s=0.1))
    out = sandbox.folder / "out"
    with start_sites(path) as sites:
        running = sandbox.start_sparse("run", path, "--json", "--out", out)
        results = out / "results.jsonl"

        def count() -> int:
            return len(results.read_text().splitlines()) if results.exists() else 0

        eventually("some results", lambda: count() >= 20)
        relay = get_link(sites, "cloudlet", "cloud")
        relay.disable()
        time.sleep(CUT_S)
        before = count()
        relay.enable()
        eventually("results again", lambda: count() > before + 20)
        summary = running.wait().json_output
    assert (summary["requests"], summary["results"], summary["lost"], summary["failed"]) == (150, 150, 0, 0)
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert sorted(each["values"]["values"] for each in found) == [float(index + 1) for index in range(150)]
    sandbox.assert_nothing_left()


def test_what_a_short_cut_lost_is_sent_again_though_every_worker_is_still_there(sandbox: ProcessSandbox) -> None:
    # The far worker always has a task in hand, and what it says of it while the bridge is down is lost. No lease tells.
    stages = [
        stage_table("head", "add_one", site="device"),
        stage_table("tail", "SleepExecutor", settings={"seconds": 0.4}, site="cloud"),
    ]
    path = write_pipeline_file(
        sandbox.folder, stages, counting_source_table(30, site="device"), name="near", lease_s=600.0
    )
    tables = '[[site]]\nname = "device"\nlinks = [{ to = "cloud", delay_ms = 1 }]\n[[site]]\nname = "cloud"\n'
    path.write_text(path.read_text() + tables)
    out = sandbox.folder / "out"
    with start_sites(path) as sites:
        running = sandbox.start_sparse("run", path, "--json", "--out", out)
        results = out / "results.jsonl"
        eventually("some results", lambda: results.exists() and len(results.read_text().splitlines()) >= 5)
        relay = get_link(sites, "device", "cloud")
        relay.disable()
        time.sleep(5.0)
        relay.enable()
        summary = running.wait().json_output
    assert (summary["results"], summary["lost"], summary["failed"]) == (30, 0, 0)
    assert summary["retried"].get("Suspect", 0) >= 1
    sandbox.assert_nothing_left()


def test_a_broker_in_the_middle_that_is_killed_costs_no_request_however_soon_it_is_back(
    sandbox: ProcessSandbox,
) -> None:
    # Records come once a second, so none need be missing: only its own clients see that it was away. No lease tells.
    path = detector(sandbox.folder, counting_source_table(100, every_s=0.05))
    path.write_text(path.read_text().replace("[pipeline]", "[pipeline]\nlease_s = 600.0", 1))
    out = sandbox.folder / "out"
    with start_sites(path) as sites:
        running = sandbox.start_sparse("run", path, "--json", "--out", out)
        results = out / "results.jsonl"
        eventually("some results", lambda: results.exists() and len(results.read_text().splitlines()) >= 20)
        middle = sites.brokers["cloudlet"]
        assert middle.local_broker is not None
        os.kill(middle.local_broker.pid, signal.SIGKILL)
        eventually("its end", lambda: middle.has_exited)
        middle.restart()
        summary = running.wait().json_output
    assert (summary["results"], summary["lost"], summary["failed"]) == (100, 0, 0)
    sandbox.assert_nothing_left()


def test_training_over_three_sites_is_exact_though_a_bridge_is_down_for_a_while(sandbox: ProcessSandbox) -> None:
    path = write_training_pipeline_file(
        sandbox.folder, epochs=20, sites=("device", "cloudlet", "cloud"), delays_ms=(1, 9)
    )
    with start_sites(path) as sites:
        heard = capture_link(get_link(sites, "cloudlet", "cloud"))
        lesson = TrainingRunCommand(sandbox, path)
        lesson.wait_for_step(10)
        assert_only_what_had_to_cross(heard, {"device", "cloudlet"}, {"cloud"})
        relay = get_link(sites, "cloudlet", "cloud")
        relay.tap = None
        relay.disable()
        time.sleep(CUT_S)
        stood_at = lesson.last_step
        relay.enable()
        lesson.wait_for_step(stood_at + 1)
        summary = lesson.wait()
    assert summary["steps"] == 60
    assert_weights_equal(lesson.load_weights(), expected_weights(60))
    assert list(summary["stages"]) == list(STAGES)
    sandbox.assert_nothing_left()
