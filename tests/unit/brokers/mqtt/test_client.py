"""Credentials from the environment: TLS files of a folder, a password from a file; no secret is ever shown."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from brokers.errors import BadFile
from brokers.mqtt.client import create_transport, load_tls_config, read_password, resolve_identity
from brokers.mqtt.socket_connect import TlsConfig
from brokers.security.certificates import Identity, ensure_certificates

SECRET = "correct horse"


@pytest.fixture(name="tls_folder")
def _tls_folder(tmp_path: Path) -> Path:
    ensure_certificates(tmp_path, [Identity("viewer")], days=30)
    return tmp_path / "viewer"


@pytest.fixture(name="password_file")
def _password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


def test_default_is_the_system_cas_and_no_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSE_TLS", raising=False)
    assert load_tls_config("") == TlsConfig()
    assert create_transport("mqtts://host")._options.tls == TlsConfig()


def test_tls_folder_is_used_for_mqtts_only(monkeypatch: pytest.MonkeyPatch, tls_folder: Path) -> None:
    expected = TlsConfig(*(str(tls_folder / name) for name in ("ca.crt", "tls.crt", "tls.key")))
    monkeypatch.setenv("SPARSE_TLS", str(tls_folder))
    assert create_transport("mqtts://host")._options.tls == expected
    assert create_transport("mqtt://host")._options.tls == TlsConfig()


def test_folder_without_certificate_configures_the_ca_only(tls_folder: Path) -> None:
    (tls_folder / "tls.crt").unlink()
    (tls_folder / "tls.key").unlink()
    assert load_tls_config(str(tls_folder)) == TlsConfig(str(tls_folder / "ca.crt"))


@pytest.mark.parametrize("text", [SECRET, f"{SECRET}\n", f"{SECRET}\r\n", f"{SECRET}\nits owner's notes\n"])
def test_password_is_the_first_line(password_file: Path, text: str) -> None:
    password_file.write_bytes(text.encode())
    assert read_password(password_file) == SECRET


@pytest.mark.parametrize("data", [b"", b"\n", b"\xff\xfe" + SECRET.encode(), b"x" * 65_536])
def test_invalid_password_file_raises_bad_file_without_its_content(password_file: Path, data: bytes) -> None:
    password_file.write_bytes(data)
    with pytest.raises(BadFile, match="expected a password in its first line") as caught:
        read_password(password_file)
    assert caught.value.path == str(password_file)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None  # a UnicodeDecodeError would show it


def test_missing_password_file_raises_bad_file(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="cannot be read"):
        read_password(tmp_path / "password")


def test_password_is_added_to_the_user_and_never_shown(password_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_PASSWORD_FILE", str(password_file))
    assert resolve_identity("mqtt://ann@host")[0].password == SECRET
    assert resolve_identity("mqtt://ann:other@host")[0].password == "other"
    assert resolve_identity("mqtt://host")[0].password is None
    transport = create_transport("mqtt://ann@host")
    assert SECRET not in f"{transport!r} {transport.address} {transport._options!r}"


def test_world_readable_secret_logs_a_warning(
    password_file: Path, tls_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = tls_folder / "tls.key"
    read_password(password_file)
    load_tls_config(str(tls_folder))
    assert caplog.text == ""
    password_file.chmod(0o644)
    key.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        read_password(password_file)
        load_tls_config(str(tls_folder))
    assert [f"{path}: all users of this machine can read it: `chmod 600` it" for path in (password_file, key)] == [
        record.getMessage() for record in caplog.records
    ]
