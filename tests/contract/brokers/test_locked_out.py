"""Whom a locked broker turns away, and whom we do not believe: one clear line that says what to do."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from brokers.mqtt.client import MqttTransport
from brokers.mqtt.socket_connect import TlsConfig
from brokers.mqtt.tls_files import utc_now
from brokers.security.cert_store import ensure_certificates
from brokers.security.dev_ca import Identity, create_ca
from brokers.server.local_broker import start_broker
from tests.contract.brokers.test_mqtt_client import connect_error_text
from tests.support.brokers.broker_kinds import run_async
from tests.support.brokers.locked_broker import (
    SecureBroker,
    forge_credentials,
    start_secure_broker,
    tls_from_folder,
    write_password_file,
)
from tests.support.environment.external_programs import require_dependency
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file
from tests.support.pipelines.processes import ProcessSandbox, process_sandbox

USER, PASSWORD = "test.double", "correct horse battery staple"


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("locked-out")


@pytest.fixture(scope="module", name="path")
def _path(folder: Path) -> Path:
    return write_pipeline_file(folder, [stage_table("double", "double")])


@pytest.fixture(scope="module", name="door")
def _door(folder: Path, path: Path) -> Iterator[SecureBroker]:
    with start_secure_broker(folder, path) as found:
        yield found


@pytest.fixture(scope="module", name="password_door")
def _password_door(folder: Path, path: Path) -> Iterator[SecureBroker]:
    with start_secure_broker(
        folder, path, password_file=write_password_file(folder / "passwords", {USER: PASSWORD})
    ) as found:
        yield found


@pytest.fixture(name="sandbox")
def _box(tmp_path: Path) -> Iterator[ProcessSandbox]:
    with process_sandbox(tmp_path) as found:
        yield found


def told(address: str, tls: TlsConfig = TlsConfig()) -> str:
    """The line that a connection ends in."""
    found: set[str] = set()

    async def test() -> None:
        for _ in range(3):  # the broker's word and the end of the connection race
            found.add(await connect_error_text(address, tls=tls))

    run_async(test())
    (line,) = found
    return line


def test_a_client_without_a_certificate(door: SecureBroker) -> None:
    line = told(door.address, TlsConfig(str(door.certs / "viewer" / "ca.crt")))
    assert line.endswith("it wants a certificate: name a folder with tls.crt and tls.key in SPARSE_TLS")


def test_a_certificate_of_another_authority(door: SecureBroker) -> None:
    stranger = forge_credentials(door.certs, "viewer", ca=create_ca(utc_now()))
    assert "it does not know the authority of our certificate" in told(door.address, tls_from_folder(stranger))


def test_a_certificate_whose_time_is_over(door: SecureBroker) -> None:
    assert "has expired" in told(
        door.address, tls_from_folder(forge_credentials(door.certs, "viewer", valid_from_days=-9, valid_days=3))
    )


def test_a_certificate_whose_time_has_not_come(door: SecureBroker) -> None:
    line = told(door.address, tls_from_folder(forge_credentials(door.certs, "viewer", valid_from_days=3, valid_days=9)))
    assert "may not be valid yet by its clock" in line


def test_a_broker_that_the_authority_we_know_has_not_signed(door: SecureBroker, tmp_path: Path) -> None:
    ensure_certificates(tmp_path, [Identity("viewer")], days=3)
    for tls in (tls_from_folder(tmp_path / "viewer"), TlsConfig()):
        line = told(door.address, tls)
        assert (
            "its certificate is not trusted: no authority that we know has signed it; expected that of ca.crt" in line
        )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"hosts": ("elsewhere.example",)}, "is for other names than 'localhost': `sparse certs FILE --host SITE="),
        ({"hosts": ("localhost",), "begin_days": -9, "days": 3}, "its certificate has expired"),
        (
            {"hosts": ("localhost",), "begin_days": 3},
            "its certificate is not valid yet: is this machine's clock right?",
        ),
    ],
)
def test_a_broker_whose_own_certificate_does_not_do(
    folder: Path, path: Path, door: SecureBroker, wrong: dict[str, Any], said: str
) -> None:
    with start_secure_broker(folder, path, credentials=forge_credentials(door.certs, "broker.local", **wrong)) as other:
        assert said in told(other.address, tls_from_folder(door.certs / "viewer"))


def test_tls_where_none_is_and_none_where_it_is(door: SecureBroker) -> None:
    line = told(door.address.replace("mqtts:", "mqtt:"))
    assert "is it an MQTT 5 broker? One that speaks TLS is at mqtts://" in line
    require_dependency("mosquitto")
    with start_broker(kind="mosquitto") as plain:
        line = told(plain.address.replace("mqtt:", "mqtts:"), tls_from_folder(door.certs / "viewer"))
        assert "does it speak TLS? One that does not is at mqtt://" in line


def test_passwords_that_are_missing_or_wrong(password_door: SecureBroker) -> None:
    tls = TlsConfig(str(password_door.certs / "viewer" / "ca.crt"))
    place = password_door.address.removeprefix("mqtts://")
    assert "name a user in its address" in told(f"mqtts://{place}", tls)
    assert f"name a file with the password of '{USER}' in SPARSE_PASSWORD_FILE" in told(f"mqtts://{USER}@{place}", tls)
    line = told(f"mqtts://{USER}:open-sesame@{place}", tls)
    assert f"is that the password of '{USER}'?" in line
    assert "sesame" not in line

    async def right() -> None:
        line = MqttTransport(f"mqtts://{USER}:{PASSWORD.replace(' ', '%20')}@{place}", tls=tls)
        await line.connect()
        await line.close()

    run_async(right())


# What our commands print -------------------------------------------------------------------------------------------


def status(sandbox: ProcessSandbox, address: str, folder: Path, *, password: Path | None = None) -> str:
    """The one line that `sparse status` ends in."""
    environment = {"SPARSE_TLS": str(folder), **({"SPARSE_PASSWORD_FILE": str(password)} if password else {})}
    said = sandbox.start_sparse("status", "--broker", address, environment=environment).wait()
    assert (said.returncode, said.stdout) == (2, "")
    (line,) = said.stderr.splitlines()
    return line


def test_commands_say_so_before_they_connect(sandbox: ProcessSandbox, door: SecureBroker) -> None:
    late = forge_credentials(door.certs, "viewer", valid_from_days=-9, valid_days=3)
    line = status(sandbox, door.address, late)
    assert line.startswith(f"sparse: {late / 'tls.crt'}: expired at ")
    assert "and here it is" in line


def test_commands_say_who_was_turned_away(sandbox: ProcessSandbox, door: SecureBroker) -> None:
    stranger = forge_credentials(door.certs, "viewer", ca=create_ca(utc_now()))
    line = status(sandbox, door.address, stranger)
    assert line.startswith(f"sparse: no way into the broker at {door.address}: it does not know the authority")


def test_a_stage_with_anothers_certificate_is_told_so(sandbox: ProcessSandbox, door: SecureBroker, path: Path) -> None:
    environment = {"SPARSE_TLS": str(door.certs / "viewer")}
    said = sandbox.start_sparse("stage", path, "double", "--broker", door.address, environment=environment).wait()
    assert said.returncode == 1
    last = said.stderr.splitlines()[-1]
    assert last.startswith("sparse: the broker refused the publication to 'sparse/local/test/double/up/")
    assert "is SPARSE_TLS, or the user, the right one?" in last


def test_a_source_with_anothers_certificate_ends_too(sandbox: ProcessSandbox, door: SecureBroker, path: Path) -> None:
    environment = {"SPARSE_TLS": str(door.certs / "test.double")}
    said = sandbox.start_sparse("source", path, "--broker", door.address, environment=environment).wait()
    assert said.returncode == 1
    assert said.stderr.splitlines()[-1].startswith(
        "sparse: the broker refused the publication to 'sparse/local/test/source/up/"
    )


def test_who_may_read_no_presence_is_told_that_nothing_was_heard(
    sandbox: ProcessSandbox, door: SecureBroker, path: Path
) -> None:
    environment = {"SPARSE_TLS": str(door.certs / "viewer")}
    said = sandbox.start_sparse("status", path, "--broker", door.address, environment=environment).wait()
    assert said.stderr == "nothing was heard: is this identity one that may read presence, as `monitor` may?\n"


def test_a_certificate_that_is_replaced_is_used_at_the_next_connection(
    folder: Path, path: Path, tmp_path: Path
) -> None:
    """As a Kubernetes secret is: the process goes on."""

    async def test() -> None:
        back = asyncio.Event()

        async def returned() -> None:
            back.set()

        with start_secure_broker(folder, path) as first:
            mine = forge_credentials(first.certs, "viewer")
            line = first.create_transport(mine)
            line.on_reconnect(returned)
            await line.connect()
            other = forge_credentials(first.certs, "viewer", ca=create_ca(utc_now()))
            for name in ("tls.crt", "tls.key"):
                (other / name).replace(mine / name)
        with start_secure_broker(folder, path, port=first.port) as again:
            while "certificate verify failed" not in again.read_log():  # noqa: ASYNC110 - it looks at a log
                await asyncio.sleep(0.05)
            good = forge_credentials(again.certs, "viewer")
            for name in ("tls.crt", "tls.key"):
                (good / name).replace(mine / name)
            await asyncio.wait_for(back.wait(), 20)
            await line.close()

    run_async(test())
