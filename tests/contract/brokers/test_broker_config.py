"""`sparse broker config`: Mosquittos run with what it prints, and their bridges forward what must cross sites."""

from __future__ import annotations

import asyncio
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from brokers.cli import main
from brokers.errors import BrokerUnreachable
from brokers.mqtt.client import MqttTransport
from brokers.protocol.transport import Delivery, Properties
from tests.support.brokers.broker_kinds import WAIT_S, DeliveryQueue, async_test
from tests.support.brokers.ports import free_port
from tests.support.environment.external_programs import require_dependency

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
LINKS = {"device": "cloudlet", "cloudlet": "cloud", "cloud": None}
SECURE = {site: f"mqtts://{site}.example" for site in LINKS}


def write_pipeline(folder: Path, addresses: dict[str, str], link_settings: str = "") -> Path:
    """Write a pipeline file of three sites, each with a link to the next."""
    tables = [STREET]
    for site, address in addresses.items():
        links = f'links = [{{ to = "{LINKS[site]}"{link_settings} }}]\n' if LINKS[site] else ""
        tables.append(f'[[site]]\nname = "{site}"\nbroker = "{address}"\n{links}')
    path = folder / "street.toml"
    path.write_text("\n".join(tables))
    return path


def print_config(capsys: pytest.CaptureFixture[str], path: Path, site: str, *options: str) -> list[str]:
    """Return the lines of the configuration that the command prints."""
    capsys.readouterr()
    paths = ("--certs", "/c", "--access", "/a", "--data", "/d")
    assert main(["broker", "config", str(path), site, *paths, *options]) == 0
    return capsys.readouterr().out.splitlines()


def print_error(capsys: pytest.CaptureFixture[str], path: Path, site: str) -> str:
    """Return the line of the error; nothing else is printed."""
    capsys.readouterr()
    assert main(["broker", "config", str(path), site]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    return line


def test_three_mosquittos_forward_messages_in_both_directions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mosquitto = require_dependency("mosquitto")
    addresses = {site: f"mqtt://127.0.0.1:{free_port()}" for site in LINKS}
    path = write_pipeline(tmp_path, addresses)
    with ExitStack() as stack:
        for site in reversed(LINKS):
            data = tmp_path / site
            data.mkdir()
            lines = print_config(capsys, path, site, "--data", str(data))
            conf = tmp_path / f"{site}.conf"
            conf.write_text("\n".join([*lines, "user root", ""]))  # else root's drops its rights to the test's folder
            log = stack.enter_context((tmp_path / f"{site}.log").open("w"))
            broker = stack.enter_context(subprocess.Popen([mosquitto, "-c", conf], stderr=log))
            stack.callback(broker.terminate)
        exchange_messages(addresses["device"], addresses["cloud"])
    logs = [line for site in LINKS for line in (tmp_path / f"{site}.log").read_text().splitlines()]
    # A bridge may start before the broker that it connects to.
    problems = [line for line in logs if "rror" in line or "eprecated" in line]
    assert [line for line in problems if "Error creating bridge" not in line] == []


async def connect_when_up(address: str) -> MqttTransport:
    async with asyncio.timeout(WAIT_S):
        while True:
            transport = MqttTransport(address)
            try:
                await transport.connect()
                return transport
            except BrokerUnreachable:
                await asyncio.sleep(0.02)


@async_test
async def exchange_messages(device_address: str, cloud_address: str) -> None:
    device, cloud = await connect_when_up(device_address), await connect_when_up(cloud_address)
    at_device, at_cloud = DeliveryQueue(), DeliveryQueue()
    await cloud.subscribe("sparse/cloud/+/+/in/+", at_cloud, qos=1)
    await device.subscribe("sparse/#", at_device, qos=1)
    properties = Properties("application/json", b"id", "sparse/device/source/s/inbox", 30, (("kind", "task"),))
    # Retained, so it arrives when the bridges are up.
    await cloud.publish("sparse/cloud/street/smooth/up/w", b"here", qos=1, retain=True)
    await at_device.next()
    await device.publish("sparse/cloud/street/smooth/in/w", b"work", properties)
    delivery: Delivery = await at_cloud.next()
    assert bytes(delivery.payload) == b"work"
    received = delivery.properties
    assert (received.correlation_data, received.response_topic) == (b"id", properties.response_topic)
    assert (received.content_type, received.user_properties) == (properties.content_type, properties.user_properties)
    await device.close()
    await cloud.close()


def test_secure_site_has_tls_and_an_access_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_pipeline(tmp_path, SECURE)
    assert set(print_config(capsys, path, "cloudlet")) >= {
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
    }
    with_passwords = print_config(capsys, path, "cloud", "--passwords", "/p")
    assert "password_file /p" in with_passwords
    assert "require_certificate true" not in with_passwords


def test_site_without_tls_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_pipeline(tmp_path, {site: f"mqtt://127.0.0.1:{port}" for port, site in enumerate(LINKS, start=1)})
    assert main(["broker", "config", str(path), "device"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "mqtt://127.0.0.1:1" in line


def test_password_of_a_bridge_is_read_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_pipeline(tmp_path, SECURE, ', user = "fog", password_file = "password"')
    password = tmp_path / "password"
    password.write_bytes(b"two words\r\n")
    lines = print_config(capsys, path, "cloudlet")
    assert "remote_username fog" in lines
    assert "remote_password two words" in lines
    for content in (b" spaced\n", b"\n"):
        password.write_bytes(content)
        assert str(password) in print_error(capsys, path, "cloudlet")


@pytest.mark.parametrize(
    ("broker", "site", "problem"),
    [
        ("mqtts://c", "clod", "did you mean 'cloud'?"),
        ("mqtt://c", "cloud", "site.cloud.broker: mqtt://c:1883"),
        ("", "cloud", "site.cloud.broker: is missing"),
        ("", "device", "site.cloud.broker: is missing"),
        ("mqtts://d:8883", "device", "sites 'device' and 'cloud' share mqtts://d:8883"),
        ("mqtt+unix:///run/x", "device", "Unix socket"),
    ],
)
def test_mistake_in_the_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broker: str, site: str, problem: str
) -> None:
    path = tmp_path / "street.toml"
    address = f'broker = "{broker}"\n' if broker else ""
    path.write_text(
        f'{STREET}[[site]]\nname = "device"\nbroker = "mqtts://d"\nlinks = [{{ to = "cloud" }}]\n'
        f'[[site]]\nname = "cloud"\n{address}'
    )
    line = print_error(capsys, path, site)
    assert line.startswith(f"sparse: {path}: ")
    assert problem in line
