"""The doctor across a bridge between two brokers: a correct bridge, and each kind of misconfiguration."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from brokers.doctor import bridge_checks
from brokers.doctor.probe_client import BrokerProbe, CheckResult, open_probe
from brokers.doctor.runner import DoctorRun
from brokers.protocol.broker_url import parse_address
from tests.support.brokers.broker_kinds import WAIT_S
from tests.support.brokers.mosquitto import BRIDGE_TOPIC_LINES, start_bridged_brokers, start_mosquitto
from tests.support.brokers.ports import free_port
from tests.support.brokers.retained_messages import retained_topics

MQTT_5 = "bridge_protocol_version mqttv50"
DIRECTIONS = ("near to far", "far to near")
Results = dict[tuple[str, str], CheckResult]


def check_bridge(near: int, far: int) -> Results:
    """The results by check and direction."""

    async def test() -> list[CheckResult]:
        async with (
            open_probe(f"mqtt://127.0.0.1:{near}", "near") as near_probe,
            open_probe(f"mqtt://127.0.0.1:{far}", "far") as far_probe,
        ):
            ends = (near_probe, far_probe)
            return [result async for result in bridge_checks.check_bridge(*ends)]

    return {(result.check, result.message.partition(":")[0]): result for result in asyncio.run(test())}


def levels(results: Results, check: str) -> list[str]:
    assert {(check, direction) for direction in DIRECTIONS} <= set(results), results
    return [results[check, direction].level for direction in DIRECTIONS]


def wait_for_bridges(port: int, count: int) -> None:
    """Return when the broker reports that so many of its bridges are connected."""

    async def test() -> None:
        async with BrokerProbe(parse_address(f"mqtt://127.0.0.1:{port}")).client() as client:
            await client.subscribe("$SYS/broker/connection/+/state")
            connected: set[str] = set()
            while len(connected) < count:
                message = await client.receive(WAIT_S)
                assert message is not None
                if bytes(message.payload) == b"1":
                    connected.add(message.header.topic)

    asyncio.run(test())


def test_bridge_of_mqtt_5_passes_and_nothing_is_left_at_either_end(tmp_path: Path) -> None:
    with start_bridged_brokers(tmp_path, MQTT_5) as (near, far):
        results = check_bridge(near, far)
        for check in ("bridge", "duplicates", "properties", "chunk", "presence", "last will"):
            assert levels(results, check) == ["ok", "ok"], results
        assert (retained_topics(near), retained_topics(far)) == ([], [])


def test_each_mistake_of_a_bridge_is_found_by_its_check(tmp_path: Path) -> None:
    """The bridge uses MQTT 3.1.1, lacks a presence rule, and the far broker has a lower packet limit."""
    missing = "topic sparse/far/+/+/up/+ in 1"
    rules = tuple(rule for rule in BRIDGE_TOPIC_LINES if rule != missing)
    assert len(rules) == len(BRIDGE_TOPIC_LINES) - 1
    limit = ("max_packet_size 100000",)
    with start_bridged_brokers(tmp_path, far_lines=limit, topic_lines=rules) as (near, far):
        results = check_bridge(near, far)
        assert levels(results, "bridge") == ["ok", "ok"]
        assert levels(results, "properties") == ["FAIL", "FAIL"]
        for direction in DIRECTIONS:
            assert MQTT_5 in results["properties", direction].fix
            assert "Response Topic" in results["properties", direction].message
        assert levels(results, "chunk") == ["FAIL", "ok"], "senders at the far broker know its limit"
        assert "max_packet_size" in results["chunk", "near to far"].fix
        assert levels(results, "presence") == ["ok", "FAIL"]
        assert missing in results["presence", "far to near"].fix
        # Nothing is left, although a bridge of MQTT 3.1.1 loses the expiry of retained messages.
        assert (retained_topics(near), retained_topics(far)) == ([], [])


def test_missing_bridge_ends_the_checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_checks, "BRIDGE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(bridge_checks, "_REPEAT_S", 0.1)
    with start_mosquitto(tmp_path) as near, start_mosquitto(tmp_path) as far:
        results = check_bridge(near, far)
        assert set(results) == {("bridge", direction) for direction in DIRECTIONS}
        assert levels(results, "bridge") == ["FAIL", "FAIL"]
        assert "topic sparse/far/+/+/in/+ out 0" in results["bridge", "near to far"].fix


def test_bridge_that_has_disconnected_fails_the_check_of_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_checks, "RECONNECT_TIMEOUT_S", 0.1)
    monkeypatch.setattr(bridge_checks, "_REPEAT_S", 0.1)

    async def test(near_port: int, far_port: int) -> CheckResult:
        async with (
            open_probe(f"mqtt://127.0.0.1:{near_port}", "near") as near,
            open_probe(f"mqtt://127.0.0.1:{far_port}", "far") as far,
        ):
            return await bridge_checks.bridge_directions(near, far)[0].check_chunk()

    with start_mosquitto(tmp_path) as near_port, start_mosquitto(tmp_path) as far_port:
        result = asyncio.run(test(near_port, far_port))
    assert result.level == "FAIL"
    assert result.message.startswith("near to far: messages are no longer forwarded")
    assert "max_packet_size" in result.fix


def test_two_bridges_between_the_same_sites_end_the_checks(tmp_path: Path) -> None:
    far_port = free_port()

    def bridge(name: str) -> tuple[str, ...]:
        head = (f"connection {name}", f"address 127.0.0.1:{far_port}", MQTT_5, "notifications_local_only true")
        return (*head, *BRIDGE_TOPIC_LINES)

    with (
        start_mosquitto(tmp_path, port=far_port),
        start_mosquitto(tmp_path, *bridge("one"), *bridge("two")) as near_port,
    ):
        wait_for_bridges(near_port, 2)
        results = check_bridge(near_port, far_port)
        assert levels(results, "duplicates") == ["FAIL", "FAIL"]
        assert not any(check == "presence" for check, _ in results)


def test_round_trip_across_a_bridge_is_measured(tmp_path: Path) -> None:
    with start_bridged_brokers(tmp_path, MQTT_5) as (near, far):
        addresses = [f"mqtt://127.0.0.1:{port}" for port in (near, far)]
        run = DoctorRun(addresses[0], {"1 MiB": 1 << 20}, bridged_broker=addresses[1], sites=("near", "far"))
        asyncio.run(run.run())
        assert {result.level for result in run.results} == {"ok"}
        assert {result.broker for result in run.results} == {*addresses, ""}
        (row,) = run.throughput
        assert row.frames_per_s > 0
