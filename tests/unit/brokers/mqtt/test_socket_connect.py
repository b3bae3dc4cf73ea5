"""Explanation of failed connections: what TLS alerts, refusals and system errors suggest to the user."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from brokers.errors import BadFile, BrokerUnreachable
from brokers.mqtt.socket_connect import (
    AuthenticationFailed,
    OperationRefused,
    TlsConfig,
    connack_error,
    connect_error,
    no_connack_error,
)
from brokers.protocol.broker_url import parse_address


@pytest.mark.parametrize("text", [None, "hello"])
def test_unusable_ca_file_raises_bad_file(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "ca.pem"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadFile) as caught:
        TlsConfig(cafile=str(path)).create_context()
    assert caught.value.path == str(path)


PLAIN, TLS = parse_address("mqtt://host"), parse_address("mqtts://host")


def tls_error(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, reason)
    error.reason = reason
    return error


def verification_error(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code = code
    error.verify_message = "some reason"
    return error


@pytest.mark.parametrize(
    ("code", "advice"),
    [
        (9, "is this machine's clock right?"),
        (10, "renew it with `sparse certs`"),
        (18, "expected that of ca.crt"),
        (20, "expected that of ca.crt"),
        (62, "`sparse certs FILE --host SITE=host` adds that name"),
        (64, "`sparse certs FILE --host SITE=host` adds that name"),
        (26, "some reason"),
    ],
)
def test_untrusted_broker_certificate_is_explained(code: int, advice: str) -> None:
    error = connect_error(TLS, verification_error(code))
    assert isinstance(error, AuthenticationFailed)
    assert error.reason_code == 0
    assert error.reason.startswith("its certificate ")
    assert advice in str(error)


@pytest.mark.parametrize(
    ("alert", "advice"),
    [
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "name a folder with tls.crt and tls.key in SPARSE_TLS"),
        ("SSLV3_ALERT_HANDSHAKE_FAILURE", "name a folder with tls.crt and tls.key in SPARSE_TLS"),
        ("TLSV1_ALERT_UNKNOWN_CA", "expected that of its ca.crt"),
        ("SSLV3_ALERT_CERTIFICATE_EXPIRED", "renew it with `sparse certs`"),
        ("SSLV3_ALERT_BAD_CERTIFICATE", "may not be valid yet by its clock"),
    ],
)
def test_tls_alert_is_explained_during_and_after_the_handshake(alert: str, advice: str) -> None:
    for error in (connect_error(TLS, tls_error(alert)), no_connack_error(TLS, tls_error(alert), "ended")):
        assert isinstance(error, AuthenticationFailed)
        assert advice in str(error)


def test_tls_to_a_broker_without_it_suggests_mqtt() -> None:
    for cause in (ConnectionResetError(104, "reset"), tls_error("WRONG_VERSION_NUMBER")):
        assert "does it use TLS? A broker without TLS is at mqtt://" in str(connect_error(TLS, cause))


def test_reset_before_connack_suggests_tls() -> None:
    error = no_connack_error(PLAIN, ConnectionResetError(), "the broker closed the connection")
    assert error.reason == (
        "the broker closed the connection; is it an MQTT 5 broker? A broker with TLS is at mqtts://"
    )
    assert "Perhaps it requires a client certificate" in str(no_connack_error(TLS, None, "ended"))


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("mqtt://host", "name a user in its address"),
        ("mqtt://ann@host", "name a file with the password of 'ann' in SPARSE_PASSWORD_FILE"),
        ("mqtt://ann:secret@host", "is that the password of 'ann'?"),
    ],
)
@pytest.mark.parametrize("code", [0x86, 0x87])
def test_refused_login_is_an_authentication_error(address: str, advice: str, code: int) -> None:
    error = connack_error(parse_address(address), code, "Not authorized")
    assert isinstance(error, AuthenticationFailed)
    assert error.reason_code == code
    assert advice in str(error)
    assert "secret" not in str(error)


def test_other_refusals_keep_their_reason_code() -> None:
    error = connack_error(PLAIN, 0x89, "Server busy")
    assert not isinstance(error, AuthenticationFailed)
    assert (error.reason_code, error.reason) == (0x89, "it refused: Server busy")


def test_errors_of_the_system_are_described_by_their_number() -> None:
    error = connect_error(PLAIN, ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 1883)"))
    assert type(error) is BrokerUnreachable
    assert error.reason == "connection refused"


def test_refused_operation_suggests_checking_the_identity() -> None:
    error = OperationRefused("publication to", "a/b", "Not authorized")
    assert error.fields == {"topic": "a/b", "reason": "Not authorized"}
    assert "check SPARSE_TLS" in str(error)
    assert "SPARSE_TLS" not in str(OperationRefused("publication to", "a/b", "Quota exceeded"))
