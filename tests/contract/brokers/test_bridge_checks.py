"""The doctor at two brokers that a bridge joins: what it says of one that is right, and of each way to be wrong."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from brokers.doctor import bridge_checks as across
from brokers.doctor.check_result import CheckResult, ThroughputResult
from brokers.doctor.probe_client import BrokerProbe
from brokers.doctor.runner import DoctorOptions, DoctorRun
from tests.support.brokers.mosquitto import BRIDGE_TOPIC_LINES, start_bridged_brokers, start_mosquitto
from tests.support.brokers.ports import free_port
from tests.support.brokers.retained_messages import retained_topics

MQTT_5 = "bridge_protocol_version mqttv50"
BOTH_WAYS = ("near to far", "far to near")


def crossed(near: int, far: int) -> dict[tuple[str, str], CheckResult]:
    """What is found across, by what it is and by its way."""

    async def test() -> list[CheckResult]:
        async with (
            BrokerProbe.from_address(f"mqtt://127.0.0.1:{near}") as here,
            BrokerProbe.from_address(f"mqtt://127.0.0.1:{far}") as there,
        ):
            ends = across.BridgeEnd("near", here), across.BridgeEnd("far", there)
            return [finding async for finding in across.check_bridge(*ends)]

    return {(finding.check, finding.message.partition(":")[0]): finding for finding in asyncio.run(test())}


def levels(found: dict[tuple[str, str], CheckResult], what: str) -> list[str]:
    return [found[what, way].level for way in BOTH_WAYS]


def wait_for_bridge(port: int) -> None:
    """Return when the broker says that the bridge that it keeps stands."""

    async def test() -> None:
        async with BrokerProbe.from_address(f"mqtt://127.0.0.1:{port}").client() as asking:
            await asking.subscribe("$SYS/broker/connection/+/state")
            while (heard := await asking.receive(20)) is not None and bytes(heard.payload) != b"1":
                pass
            assert heard is not None

    asyncio.run(test())


def test_a_bridge_of_mqtt_5_carries_all_and_nothing_is_left_at_either_end(tmp_path: Path) -> None:
    with start_bridged_brokers(tmp_path, MQTT_5) as (near, far):
        found = crossed(near, far)
        for what in ("bridge", "once", "properties", "chunk", "presence", "last will"):
            assert levels(found, what) == ["ok", "ok"], found
        assert (retained_topics(near), retained_topics(far)) == ([], [])


def test_a_bridge_of_311_loses_properties_and_the_line_that_mends_it_is_named(tmp_path: Path) -> None:
    with start_bridged_brokers(tmp_path) as (near, far):
        found = crossed(near, far)
        assert levels(found, "properties") == ["FAIL", "FAIL"]
        for way in BOTH_WAYS:
            assert MQTT_5 in found["properties", way].fix
            assert "Response Topic" in found["properties", way].message
        assert levels(found, "bridge") == ["ok", "ok"]
        assert (retained_topics(near), retained_topics(far)) == (
            [],
            [],
        )  # though this bridge loses the time at which records expire


def test_a_broker_behind_a_bridge_that_takes_no_chunk_of_the_usual_size_is_told(tmp_path: Path) -> None:
    with start_bridged_brokers(tmp_path, MQTT_5, far_lines=("max_packet_size 100000",)) as (near, far):
        found = crossed(near, far)
        assert levels(found, "chunk") == ["FAIL", "ok"]  # who sends from there knows the limit
        assert "max_packet_size" in found["chunk", "near to far"].fix


def test_a_bridge_without_presence_is_told_for_the_way_that_lacks_it(tmp_path: Path) -> None:
    lacking = "topic sparse/far/+/+/up/+ in 1"
    assert lacking in BRIDGE_TOPIC_LINES
    with start_bridged_brokers(
        tmp_path, MQTT_5, topic_lines=tuple(rule for rule in BRIDGE_TOPIC_LINES if rule != lacking)
    ) as (near, far):
        found = crossed(near, far)
        assert levels(found, "presence") == ["ok", "FAIL"]
        assert lacking in found["presence", "far to near"].fix


def test_no_bridge_is_told_and_no_more_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(across, "BRIDGE_TIMEOUT_S", 1.0)
    with start_mosquitto(tmp_path) as near, start_mosquitto(tmp_path) as far:
        found = crossed(near, far)
        assert set(found) == {("bridge", way) for way in BOTH_WAYS}
        assert levels(found, "bridge") == ["FAIL", "FAIL"]
        assert "topic sparse/far/+/+/in/+ out 0" in found["bridge", "near to far"].fix


def test_bridges_that_make_a_loop_are_told(tmp_path: Path) -> None:
    near_port, far_port = free_port(), free_port()

    def bridge(name: str, to: int) -> tuple[str, ...]:
        return (
            *(f"connection {name}", f"address 127.0.0.1:{to}", MQTT_5, "restart_timeout 1"),
            *("notifications_local_only true", "topic sparse/# both 0"),
        )

    lines = bridge("one", far_port)
    with (
        start_mosquitto(tmp_path, *bridge("two", near_port), port=far_port),
        start_mosquitto(tmp_path, *lines, port=near_port),
    ):
        for port in (near_port, far_port):
            wait_for_bridge(port)
        found = crossed(near_port, far_port)
        assert levels(found, "once") == ["FAIL", "FAIL"]
        assert not any(what == "presence" for what, _ in found)  # what goes round without end is not added to


def test_a_round_trip_across_is_measured(tmp_path: Path) -> None:
    with start_bridged_brokers(tmp_path, MQTT_5) as (near, far):
        addresses = [f"mqtt://127.0.0.1:{port}" for port in (near, far)]
        question = DoctorOptions(addresses[0], {"1 MiB": 1 << 20}, bridged_broker=addresses[1], sites=("near", "far"))
        found = DoctorRun(question, lambda _: None)
        asyncio.run(found.run())
        assert {finding.level for finding in found.results} == {"ok"}
        assert {finding.broker for finding in found.results} == {*addresses, ""}
        (row,) = found.throughput
        assert isinstance(row, ThroughputResult)
        assert row.frames_per_s > 0
