"""`sparse broker config`: real Mosquittos take what it prints, and their bridges carry what has to cross."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from brokers.commands.config import command
from brokers.errors import BadFile
from brokers.mqtt.client import MqttTransport
from brokers.protocol.transport import Delivery, Properties
from tests.contract.conftest import require_mosquitto
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.ports import free_port
from tests.support.environment.checkout import ROOT
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.processes import ProcessSandbox, process_sandbox

STREET = """
[pipeline]
name = "street"
[[stage]]
name = "smooth"
executor = "numpy:abs"
site = "cloud"
[source]
site = "device"
"""
SITES = ("device", "cloudlet", "cloud")


def sites(**broker: str) -> str:
    links = {"device": "cloudlet", "cloudlet": "cloud"}
    tables = []
    for name in SITES:
        lines = ["[[site]]", f'name = "{name}"', f'broker = "{broker[name]}"']
        tables.append("\n".join([*lines, *([f'links = [{{ to = "{links[name]}" }}]'] if name in links else [])]))
    return "\n".join(tables)


def printed(path: Path, site: str, capsys: pytest.CaptureFixture[str], **options: object) -> str:
    given = {
        "certs": Path("/c"),
        "access": Path("/a"),
        "passwords": None,
        "data": Path("/d"),
        "open_": False,
        **options,
    }
    assert command(path, site, **given) == 0  # type: ignore[arg-type]
    return capsys.readouterr().out


def test_three_mosquittos_take_the_printed_files_and_messages_cross_both_ways(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_mosquitto()
    addresses = {name: f"mqtt://127.0.0.1:{free_port()}" for name in SITES}
    path = tmp_path / "street.toml"
    path.write_text(STREET + sites(**addresses))
    with ExitStack() as stack:
        for name in reversed(SITES):
            conf = tmp_path / f"{name}.conf"
            (tmp_path / name).mkdir()
            # As root it would become another user, who may not write here.
            conf.write_text(printed(path, name, capsys, data=tmp_path / name) + "user root\n")
            log = stack.enter_context((tmp_path / f"{name}.log").open("w"))
            broker = subprocess.Popen([require_dependency("mosquitto"), "-c", conf], stderr=log)
            stack.callback(broker.wait, 10)
            stack.callback(broker.terminate)
        run_async(_cross(addresses))
    logs = [line for name in SITES for line in (tmp_path / f"{name}.log").read_text().splitlines()]
    # A bridge may be there before the broker that it leads to.
    told = [line for line in logs if "Error creating bridge" not in line]
    assert [line for line in told if "rror" in line or "eprecated" in line] == []


async def _cross(addresses: dict[str, str]) -> None:
    device, cloud = MqttTransport(addresses["device"]), MqttTransport(addresses["cloud"])
    for each in (device, cloud):
        for _ in range(100):
            try:
                await each.connect()
                break
            except Exception:  # noqa: BLE001 - the brokers are coming up
                await asyncio.sleep(0.05)
    heard: asyncio.Queue[tuple[str, Delivery]] = asyncio.Queue()
    await cloud.subscribe("sparse/cloud/#", lambda found: heard.put_nowait(("cloud", found)), qos=1)
    await device.subscribe("sparse/#", lambda found: heard.put_nowait(("device", found)), qos=1)
    said = Properties("application/json", b"id", "sparse/device/source/s/inbox", 30, (("kind", "task"),))
    # The bridges may not stand yet: presence is retained, so it comes when they do.
    await cloud.publish("sparse/cloud/street/smooth/up/w", b"here", qos=1, retain=True)
    async with asyncio.timeout(20):
        while (await heard.get())[0] != "device":
            pass
        await device.publish("sparse/cloud/street/smooth/in/w", b"work", said)
        while True:
            where, found = await heard.get()
            if where == "cloud" and bytes(found.payload) == b"work":
                break
    properties = found.properties
    assert (properties.correlation_data, properties.response_topic) == (said.correlation_data, said.response_topic)
    assert (properties.content_type, properties.user_properties) == (said.content_type, said.user_properties)
    await device.close()
    await cloud.close()


def test_a_locked_site_has_tls_on_both_sides_and_an_access_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "street.toml"
    path.write_text(STREET + sites(**{name: f"mqtts://{name}.example" for name in SITES}))
    conf = printed(path, "cloudlet", capsys).splitlines()
    for line in (
        "listener 8883",
        "cafile /c/ca.crt",
        "certfile /c/tls.crt",
        "keyfile /c/tls.key",
        "require_certificate true",
        "use_identity_as_username true",
        "allow_anonymous false",
        "acl_file /a",
        "persistence_location /d/",
        "max_packet_size 268435455",
        "connection cloudlet-to-cloud",
        "address cloud.example:8883",
        "bridge_protocol_version mqttv50",
        "bridge_cafile /c/ca.crt",
        "bridge_certfile /c/tls.crt",
        "bridge_keyfile /c/tls.key",
        "queue_qos0_messages true",
    ):
        assert line in conf
    by_password = printed(path, "cloud", capsys, passwords=Path("/p")).splitlines()
    assert "password_file /p" in by_password
    assert "require_certificate true" not in by_password


def test_a_site_without_locks_is_told_to_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "street.toml"
    path.write_text(
        STREET + sites(device="mqtt://127.0.0.1:1", cloudlet="mqtt://127.0.0.1:2", cloud="mqtt://127.0.0.1:3")
    )
    given = {"certs": Path("/c"), "access": Path("/a"), "passwords": None, "data": Path("/d"), "open_": False}
    assert command(path, "device", **given) == 0  # type: ignore[arg-type]
    assert capsys.readouterr().err.startswith("no access control: any client that reaches mqtt://127.0.0.1:1 ")


def test_a_bridges_password_comes_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "street.toml"
    text = STREET + sites(**{name: f"mqtts://{name}.example" for name in SITES})
    link = 'links = [{ to = "cloud", user = "fog", password_file = "cloud.pw" }]'
    path.write_text(text.replace('links = [{ to = "cloud" }]', link))
    (tmp_path / "cloud.pw").write_bytes(b"two words\r\n")
    conf = printed(path, "cloudlet", capsys).splitlines()
    assert "remote_username fog" in conf
    assert "remote_password two words" in conf
    for bad, problem in (
        (b" spaced\n", "begins or ends with a space"),
        (b"\n", "expected a password in its first line"),
    ):
        (tmp_path / "cloud.pw").write_bytes(bad)
        with pytest.raises(BadFile, match=problem):
            printed(path, "cloudlet", capsys)


MISTAKES = {
    "a site that there is not": (
        ("mqtts://c", "clod"),
        "no site 'clod' (did you mean 'cloud'?): expected one of device, cloud",
    ),
    "an open door": (("mqtt://c", "cloud"), "site.cloud.broker: mqtt://c:1883 has no access control"),
    "no address": (("", "cloud"), "site.cloud.broker: is missing: expected 'mqtts://HOST'"),
    "a bridge to a site of no address": (("", "device"), "site.cloud.broker: is missing"),
    "a bridge to itself": (("mqtts://d:8883", "device"), "sites 'device' and 'cloud' share mqtts://d:8883"),
    "a bridge to a Unix socket": (("mqtt+unix:///run/x", "device"), "a bridge cannot use a Unix socket"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_printed(tmp_path: Path, case: str) -> None:
    (address, site), expected = MISTAKES[case]
    path = tmp_path / "street.toml"
    broker = f'broker = "{address}"\n' if address else ""
    path.write_text(
        f'{STREET}[[site]]\nname = "device"\nbroker = "mqtts://d"\nlinks = [{{ to = "cloud" }}]\n'
        f'[[site]]\nname = "cloud"\n{broker}'
    )
    box: ProcessSandbox
    with process_sandbox(tmp_path) as box:
        said = box.start_sparse("broker", "config", path, site).wait()
    assert (said.returncode, said.stdout) == (2, "")
    assert said.stderr.startswith(f"sparse: {path}: ")
    assert expected in said.stderr
    assert len(said.stderr.splitlines()) == 1
    assert str(ROOT) not in said.stderr.replace(str(path), "")
