"""Which brokers a run uses: named ones, one for all sites, or a bridged Mosquitto per site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from brokers.config.pipeline_file import BROKER_VARIABLE, Pipeline, load_pipeline
from brokers.errors import PortTaken, SparseError, UsageError
from brokers.protocol.broker_url import MQTT_PORT
from brokers.server.local_broker import BrokerKind, LocalBroker
from monitor.launch.sites import RunBroker, set_up_brokers
from tests.support.pipelines.pipeline_files import counting_source_table, stage_table, write_pipeline_file

SITES = """
[[site]]
name = "device"
links = [{ to = "cloudlet" }]
[[site]]
name = "cloudlet"
links = [{ to = "cloud" }]
[[site]]
name = "cloud"
"""


class FakeBroker(LocalBroker):
    """A local broker without a process."""

    running = True

    @property
    def is_running(self) -> bool:
        return self.running

    def last_output(self) -> str:
        return "out of memory"

    def stop(self, timeout_s: float = 5.0) -> None:
        self.running = False


class BrokerStarts(list[dict[str, Any]]):
    """Stands in for `start_broker` and records its arguments.

    The starts after the first `starts_before_errors` raise the `errors`, one each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.brokers: list[FakeBroker] = []
        self.errors: list[Exception] = []
        self.starts_before_errors = 0

    def start(self, **arguments: Any) -> FakeBroker:
        if self.errors and len(self) >= self.starts_before_errors:
            raise self.errors.pop(0)
        self.append(arguments)
        kind: BrokerKind = arguments["kind"] or "mosquitto"
        self.brokers.append(FakeBroker(kind, "127.0.0.1", arguments["port"] or 20_000 + len(self), len(self)))
        return self.brokers[-1]


@pytest.fixture(name="starts")
def _starts(monkeypatch: pytest.MonkeyPatch) -> BrokerStarts:
    starts = BrokerStarts()
    monkeypatch.delenv(BROKER_VARIABLE, raising=False)
    monkeypatch.setattr("monitor.launch.sites.start_broker", starts.start)
    monkeypatch.setattr("monitor.launch.sites.find_mosquitto", lambda: "/usr/sbin/mosquitto")
    monkeypatch.setattr("monitor.launch.sites._PORT_WAIT_S", 0.0)
    monkeypatch.setattr("monitor.launch.sites._POLL_S", 0.0)
    return starts


def single_site(folder: Path, **source: Any) -> Pipeline:
    return load_pipeline(
        write_pipeline_file(folder, [stage_table("head", "double")], source or counting_source_table(1))
    )


def three_sites(folder: Path, tables: str = SITES) -> Pipeline:
    stages = [stage_table("head", "double", site="cloudlet"), stage_table("tail", "double", site="cloud")]
    path = write_pipeline_file(folder, stages, counting_source_table(1, site="device"))
    path.write_text(path.read_text() + tables)
    return load_pipeline(path)


def test_given_address_is_the_broker_of_all_sites(tmp_path: Path, starts: BrokerStarts) -> None:
    with set_up_brokers(three_sites(tmp_path), "mqtt://me:secret@far:1884", None) as sites:
        assert set(sites.brokers) == {"device", "cloudlet", "cloud"}
        assert len(set(sites.brokers.values())) == 1
        assert sites.address("cloud") == "mqtt://me:secret@far:1884"
        assert sites.description == sites.source_broker.label == "mqtt://me@far:1884"
        assert "secret" not in repr(sites)
    assert starts == []


def test_bad_address_raises_before_a_broker_starts(tmp_path: Path, starts: BrokerStarts) -> None:
    with pytest.raises(UsageError):
        set_up_brokers(single_site(tmp_path), "http://far", None)
    assert starts == []


def test_broker_of_the_environment_is_used(
    tmp_path: Path, starts: BrokerStarts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BROKER_VARIABLE, "mqtt://far")
    assert set_up_brokers(single_site(tmp_path), None, None).source_broker.address == "mqtt://far"
    set_up_brokers(single_site(tmp_path), None, 1999)
    assert [start["port"] for start in starts] == [1999]


def test_brokers_must_be_named_for_all_sites_or_none(tmp_path: Path, starts: BrokerStarts) -> None:
    tables = SITES.replace('name = "cloud"\n', 'name = "cloud"\nbroker = "mqtt://far"\n')
    with pytest.raises(UsageError) as caught:
        set_up_brokers(three_sites(tmp_path, tables), None, None)
    assert (caught.value.code, caught.value.key, caught.value.fields["site"]) == ("MissingBroker", "site", "device")
    assert starts == []


@pytest.mark.parametrize(
    ("kind", "free", "port"), [("camera", True, 0), ("ingress", True, MQTT_PORT), ("ingress", False, 0)]
)
def test_broker_of_an_ingress_has_the_default_port(
    tmp_path: Path, starts: BrokerStarts, monkeypatch: pytest.MonkeyPatch, kind: str, free: bool, port: int
) -> None:
    monkeypatch.setattr("monitor.launch.sites.is_port_free", lambda _: free)
    with set_up_brokers(single_site(tmp_path, kind=kind), "embedded", None) as sites:
        assert sites.description == f"embedded {sites.source_broker.address}"
    assert [(start["kind"], start["port"]) for start in starts] == [("embedded", port)]
    assert not starts.brokers[0].running


def test_each_site_has_a_mosquitto_with_its_bridges(tmp_path: Path, starts: BrokerStarts) -> None:
    with set_up_brokers(three_sites(tmp_path), None, 1999) as sites:
        bridges = [[(bridge.site, bridge.to, bridge.port) for bridge in start["bridges"]] for start in starts]
        assert bridges == [[], [("cloudlet", "cloud", 20_001)], [("device", "cloudlet", 20_002)]]
        assert [start["accepts_bridges"] for start in starts] == [True, True, False]
        assert [start["port"] for start in starts] == [0, 0, 1999]
        assert sites.source_broker.address == "mqtt://127.0.0.1:1999"
    assert not any(broker.running for broker in starts.brokers)


def test_failed_start_stops_the_brokers_before_it(tmp_path: Path, starts: BrokerStarts) -> None:
    starts.errors = [OSError("no more memory")]
    starts.starts_before_errors = 1
    with pytest.raises(OSError, match="no more memory"):
        set_up_brokers(three_sites(tmp_path), None, None)
    assert [broker.running for broker in starts.brokers] == [False]


def test_sites_share_the_embedded_broker(
    tmp_path: Path, starts: BrokerStarts, caplog: pytest.LogCaptureFixture
) -> None:
    with set_up_brokers(three_sites(tmp_path), "embedded", None) as sites:
        assert len(set(sites.brokers.values())) == 1
    assert "nothing crosses a link" in caplog.text


def test_crashed_broker_is_restarted_at_its_port(starts: BrokerStarts) -> None:
    broker = RunBroker.start("mosquitto", 1999)
    starts.brokers[0].running = False
    assert [broker.has_exited, broker.restarts] == [True, 0]
    broker.restart()
    assert [broker.has_exited, broker.restarts] == [False, 1]
    assert [start["port"] for start in starts] == [1999, 1999]


def test_broker_whose_port_is_taken_is_given_up(starts: BrokerStarts) -> None:
    broker = RunBroker.start("mosquitto", 1999)
    starts.errors = [PortTaken("127.0.0.1", 1999)]
    with pytest.raises(SparseError) as caught:
        broker.restart()
    assert (caught.value.code, caught.value.fields["kind"]) == ("BrokerGone", "mosquitto")
    assert "(out of memory)" in str(caught.value)


def test_broker_that_crashes_at_every_start_is_given_up(starts: BrokerStarts) -> None:
    broker = RunBroker.start("mosquitto", 1999)
    for _ in range(20):
        broker.restart()
    with pytest.raises(SparseError) as caught:
        broker.restart()
    assert caught.value.fields["reason"] == "it was restarted 20 times in a row"
    assert broker.restarts == 20
