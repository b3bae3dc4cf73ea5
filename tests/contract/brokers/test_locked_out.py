"""Wrong credentials at a secured Mosquitto, and a broker that is not trusted: one line that says what to do.

The texts for each cause: tests/unit/brokers/mqtt/test_connect_errors.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from brokers.cli import main
from brokers.config.pipeline_file import load_pipeline
from brokers.errors import BrokerUnreachable
from brokers.mqtt.client import MqttTransport
from brokers.mqtt.socket_connect import BAD_PASSWORD, NOT_AUTHORIZED, AuthenticationFailed, OperationRefused, TlsConfig
from brokers.mqtt.tls_files import utc_now
from brokers.security.certificates import Identity, create_ca, ensure_certificates
from sources.client.offloader import Offloader
from tests.contract.brokers.test_mqtt_client import failed_connect
from tests.support.brokers.broker_kinds import WAIT_S, async_test, reconnected_event, run_async
from tests.support.brokers.locked_broker import (
    SecureBroker,
    forge_credentials,
    start_secure_broker,
    tls_from_folder,
    write_password_file,
)
from tests.support.brokers.mosquitto import start_mosquitto
from tests.support.pipelines.pipeline_files import stage_table, write_pipeline_file

USER, PASSWORD = "test.double", "correct horse battery staple"


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("locked-out")


@pytest.fixture(scope="module", name="path")
def _path(folder: Path) -> Path:
    return write_pipeline_file(folder, [stage_table("double", "double")])


@pytest.fixture(scope="module", name="broker")
def _broker(folder: Path, path: Path) -> Iterator[SecureBroker]:
    """Requires certificates."""
    with start_secure_broker(folder, path) as broker:
        yield broker


@pytest.fixture(scope="module", name="password_broker")
def _password_broker(folder: Path, path: Path) -> Iterator[SecureBroker]:
    """Requires passwords."""
    passwords = write_password_file(folder / "passwords", {USER: PASSWORD})
    with start_secure_broker(folder, path, password_file=passwords) as broker:
        yield broker


def connect_error(address: str, tls: TlsConfig = TlsConfig()) -> BrokerUnreachable:
    """Return the error of connecting, the same each time: the broker's alert and the end of the connection race."""
    errors: dict[str, BrokerUnreachable] = {}

    async def test() -> None:
        for _ in range(3):
            error = await failed_connect(address, tls=tls)
            errors[str(error)] = error

    run_async(test())
    (error,) = errors.values()
    return error


def test_client_without_certificate_is_told_to_name_one(broker: SecureBroker) -> None:
    error = connect_error(broker.address, TlsConfig(str(broker.certs / "viewer" / "ca.crt")))
    assert isinstance(error, AuthenticationFailed)
    assert error.reason.startswith("it requires a client certificate")


@pytest.mark.parametrize(
    ("credentials", "reason"),
    [
        ({"ca": True}, "it does not know the CA of our certificate"),
        ({"valid_from_days": -9, "valid_days": 3}, "has expired"),
        ({"valid_from_days": 3}, "may not be valid yet"),
    ],
)
def test_rejected_client_certificate_is_explained(
    broker: SecureBroker, credentials: dict[str, Any], reason: str
) -> None:
    if "ca" in credentials:
        credentials = {"ca": create_ca(utc_now())}
    error = connect_error(broker.address, tls_from_folder(forge_credentials(broker.certs, "viewer", **credentials)))
    assert isinstance(error, AuthenticationFailed)
    assert reason in error.reason


def test_broker_of_an_unknown_ca_is_not_trusted(broker: SecureBroker, tmp_path: Path) -> None:
    ensure_certificates(tmp_path, [Identity("viewer")], days=3)
    for tls in (tls_from_folder(tmp_path / "viewer"), TlsConfig()):
        error = connect_error(broker.address, tls)
        assert isinstance(error, AuthenticationFailed)
        assert error.reason.startswith("its certificate is not trusted")


@pytest.mark.parametrize(
    ("certificate", "reason"),
    [
        ({"hosts": ("elsewhere.example",)}, "its certificate is not for 'localhost'"),
        ({"hosts": ("localhost",), "valid_from_days": -9, "valid_days": 3}, "its certificate has expired"),
        ({"hosts": ("localhost",), "valid_from_days": 3}, "its certificate is not valid yet"),
    ],
)
def test_broker_with_wrong_certificate_is_not_trusted(
    folder: Path, path: Path, broker: SecureBroker, certificate: dict[str, Any], reason: str
) -> None:
    credentials = forge_credentials(broker.certs, "broker.local", **certificate)
    with start_secure_broker(folder, path, credentials=credentials) as other:
        assert connect_error(other.address, tls_from_folder(broker.certs / "viewer")).reason.startswith(reason)


def test_scheme_that_does_not_fit_the_listener_is_suspected(broker: SecureBroker, tmp_path: Path) -> None:
    assert "A broker with TLS is at mqtts://" in connect_error(broker.address.replace("mqtts:", "mqtt:")).reason
    with start_mosquitto(tmp_path) as port:
        error = connect_error(f"mqtts://127.0.0.1:{port}", tls_from_folder(broker.certs / "viewer"))
        assert "A broker without TLS is at mqtt://" in error.reason


def test_missing_and_wrong_passwords_are_refused(password_broker: SecureBroker) -> None:
    tls = TlsConfig(str(password_broker.certs / "viewer" / "ca.crt"))
    host = password_broker.address.removeprefix("mqtts://")
    for user in ("", f"{USER}@", f"{USER}:open-sesame@"):
        error = connect_error(f"mqtts://{user}{host}", tls)
        assert isinstance(error, AuthenticationFailed)
        assert error.reason_code in (BAD_PASSWORD, NOT_AUTHORIZED)
        assert "sesame" not in str(error)

    async def connect() -> None:
        transport = MqttTransport(f"mqtts://{USER}:{PASSWORD.replace(' ', '%20')}@{host}", tls=tls)
        await transport.connect()
        await transport.close()

    run_async(connect())


def test_replaced_certificate_is_used_at_the_next_connection(folder: Path, path: Path) -> None:
    """As when a Kubernetes secret changes: the process keeps running."""

    def replace(target: Path, source: Path) -> None:
        for name in ("tls.crt", "tls.key"):
            (source / name).replace(target / name)

    @async_test
    async def test() -> None:
        with start_secure_broker(folder, path) as first:
            credentials = forge_credentials(first.certs, "viewer")
            transport = first.create_transport(credentials)
            reconnected = reconnected_event(transport)
            await transport.connect()
            replace(credentials, forge_credentials(first.certs, "viewer", ca=create_ca(utc_now())))
        with start_secure_broker(folder, path, port=first.port) as second:
            async with asyncio.timeout(WAIT_S):
                while "certificate verify failed" not in second.read_log():  # noqa: ASYNC110 - it is a file
                    await asyncio.sleep(0.05)
                replace(credentials, forge_credentials(second.certs, "viewer"))
                await reconnected.wait()
            await transport.close()

    test()


# Commands -----------------------------------------------------------------------------------------------------------


def run_sparse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], credentials: Path, *arguments: str | Path
) -> tuple[int, list[str]]:
    """Run a command with these credentials; return its exit status and the lines of standard error."""
    monkeypatch.setenv("SPARSE_TLS", str(credentials))
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    return status, capsys.readouterr().err.splitlines()


def test_command_with_expired_certificate_fails_before_it_connects(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broker: SecureBroker
) -> None:
    expired = forge_credentials(broker.certs, "viewer", valid_from_days=-9, valid_days=3)
    status, (line,) = run_sparse(monkeypatch, capsys, expired, "status", "--broker", broker.address)
    assert status == 2
    assert line.startswith(f"sparse: {expired / 'tls.crt'}: expired at ")


def test_command_of_an_unknown_ca_names_the_broker(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broker: SecureBroker
) -> None:
    unknown = forge_credentials(broker.certs, "viewer", ca=create_ca(utc_now()))
    status, (line,) = run_sparse(monkeypatch, capsys, unknown, "status", "--broker", broker.address)
    assert status == 2
    assert line.startswith(
        f"sparse: authentication with the broker at {broker.address} failed: it does not know the CA"
    )


def test_stage_with_the_certificate_of_another_role_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broker: SecureBroker, path: Path
) -> None:
    command = ("stage", path, "double", "--broker", broker.address)
    status, lines = run_sparse(monkeypatch, capsys, broker.certs / "viewer", *command)
    assert status == 1
    assert lines[-1].startswith("sparse: the broker refused the publication to 'sparse/local/test/double/up/")


def test_source_with_the_certificate_of_another_role_fails(
    monkeypatch: pytest.MonkeyPatch, broker: SecureBroker, path: Path
) -> None:
    monkeypatch.setenv("SPARSE_TLS", str(broker.certs / "test.double"))

    @async_test
    async def test() -> None:
        with pytest.raises(OperationRefused) as caught:
            async with Offloader(load_pipeline(path), broker=broker.address):
                pass
        assert caught.value.fields["topic"].startswith("sparse/local/test/source/up/")

    test()


def test_status_without_the_right_to_read_presence_suggests_another_identity(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broker: SecureBroker, path: Path
) -> None:
    _, (line,) = run_sparse(monkeypatch, capsys, broker.certs / "viewer", "status", path, "--broker", broker.address)
    assert "`monitor`" in line
