"""Who a process is, from its environment; what is wrong with it is one line that names the file and shows no secret."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from brokers.errors import BadFile, UsageError
from brokers.mqtt import tls_files as credentials
from brokers.mqtt.client_identity import create_transport, load_tls_config, read_password, with_password
from brokers.mqtt.socket_connect import TlsConfig
from brokers.mqtt.tls_files import Expired, KeyMismatch, NotYetValid, utc_now
from brokers.protocol.broker_url import parse_address
from brokers.security.cert_store import ensure_certificates
from brokers.security.dev_ca import Identity
from tests.support.brokers.locked_broker import forge_credentials

SECRET = "correct horse"


@pytest.fixture(name="certs")
def _certs(tmp_path: Path) -> Path:
    ensure_certificates(tmp_path / "certs", [Identity("viewer")], days=30)
    return tmp_path / "certs"


@pytest.fixture(name="mine")
def _mine(certs: Path) -> Path:
    return certs / "viewer"


def test_without_an_identity_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSE_TLS", raising=False)
    assert load_tls_config("") == TlsConfig()
    assert create_transport("mqtts://host")._tls == TlsConfig()


def test_a_folder_is_who_we_are_and_whom_we_believe(monkeypatch: pytest.MonkeyPatch, mine: Path) -> None:
    expected = TlsConfig(str(mine / "ca.crt"), str(mine / "tls.crt"), str(mine / "tls.key"))
    assert load_tls_config(str(mine)) == expected
    monkeypatch.setenv("SPARSE_TLS", str(mine))
    assert create_transport("mqtts://host")._tls == expected
    assert create_transport("mqtt://host")._tls == TlsConfig()  # where no lock is, none is opened


def test_who_logs_in_by_password_needs_the_authority_only(mine: Path) -> None:
    (mine / "tls.crt").unlink()
    (mine / "tls.key").unlink()
    assert load_tls_config(str(mine)) == TlsConfig(str(mine / "ca.crt"))


@pytest.mark.parametrize(
    ("spoil", "kind", "told"),
    [
        (lambda mine: (mine / "ca.crt").unlink(), BadFile, "ca.crt: cannot be read: no such file or directory"),
        (lambda mine: (mine / "tls.key").unlink(), BadFile, "tls.key: cannot be read: no such file or directory"),
        (lambda mine: (mine / "tls.crt").unlink(), BadFile, "tls.crt: cannot be read: no such file or directory"),
        (lambda mine: (mine / "ca.crt").write_text("hello"), BadFile, "ca.crt: expected a PEM certificate"),
        (lambda mine: (mine / "ca.crt").write_bytes(b"\xff\0"), BadFile, "ca.crt: expected a PEM certificate"),
        (lambda mine: (mine / "tls.key").write_text(SECRET), BadFile, "tls.key: expected a PEM private key"),
        (lambda mine: (mine / "tls.crt").write_text(""), BadFile, "tls.crt: expected a PEM certificate"),
        (lambda mine: (mine / "tls.crt").replace(mine / "ca.crt"), BadFile, "tls.crt: cannot be read"),
    ],
)
def test_a_file_that_does_not_do_is_named(
    mine: Path, spoil: Callable[[Path], object], kind: type[UsageError], told: str
) -> None:
    spoil(mine)
    with pytest.raises(kind) as caught:
        load_tls_config(str(mine))
    assert told in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_folder_that_cannot_even_be_asked_for_is_named() -> None:
    with pytest.raises(BadFile, match="n: cannot be read: file name too long"):
        load_tls_config("n" * 300)


def test_a_certificate_that_does_not_fit_its_key(certs: Path, mine: Path) -> None:
    (forge_credentials(certs, "viewer") / "tls.key").replace(mine / "tls.key")
    with pytest.raises(KeyMismatch, match=r"tls.crt: does not fit the key in .*tls.key"):
        load_tls_config(str(mine))


def test_a_clock_that_was_never_set(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = certs / "viewer"
    monkeypatch.setattr(credentials, "utc_now", lambda: utc_now().replace(year=1970))
    with pytest.raises(NotYetValid) as caught:
        load_tls_config(str(mine))
    line = str(caught.value)
    assert line.startswith(f"{mine / 'ca.crt'}: is valid from {utc_now():%Y-%m}")
    assert "and here it is 1970-" in line
    assert line.endswith("is this machine's clock right?")


def test_a_certificate_whose_time_is_over(certs: Path) -> None:
    with pytest.raises(Expired, match=r"tls.crt: expired at .*, and here it is .*--renew"):
        load_tls_config(str(forge_credentials(certs, "viewer", valid_from_days=-9, valid_days=3)))


def test_an_authority_whose_time_is_over(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "utc_now", lambda: utc_now().replace(year=utc_now().year + 20))
    with pytest.raises(Expired, match=r"ca.crt: expired at"):
        load_tls_config(str(mine))


@pytest.mark.parametrize(("make", "told"), [(Path.touch, "is no folder"), (lambda path: None, "no such folder")])
def test_what_is_no_folder_is_told(tmp_path: Path, make: Callable[[Path], object], told: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(BadFile, match=f"{told}: expected one with ca.crt, tls.crt and tls.key"):
        load_tls_config(str(tmp_path / "x"))


# Passwords --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [SECRET, f"{SECRET}\n", f"{SECRET}\r\n", f"{SECRET}\nits owner's notes\n"])
def test_a_password_is_the_first_line_of_its_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "password"
    path.write_bytes(text.encode())
    assert read_password(path) == SECRET


@pytest.mark.parametrize("data", [b"", b"\n", b"\xff\xfe" + SECRET.encode(), b"x" * 65_536])
def test_what_is_no_password_is_told_and_not_shown(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "password"
    path.write_bytes(data)
    with pytest.raises(BadFile, match="expected a password in its first line") as caught:
        read_password(path)
    assert str(caught.value).startswith(str(path))
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None  # nor in what led to it


def test_a_password_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="password: cannot be read: no such file or directory"):
        read_password(tmp_path / "password")


def test_a_password_joins_the_user_of_the_address_and_shows_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "password"
    path.write_text(SECRET)
    monkeypatch.setenv("SPARSE_PASSWORD_FILE", str(path))
    assert with_password(parse_address("mqtt://ann@host")).password == SECRET
    assert with_password(parse_address("mqtt://ann:other@host")).password == "other"
    assert with_password(parse_address("mqtt://host")).password is None
    transport = create_transport("mqtt://ann@host")
    assert SECRET not in f"{transport!r} {transport.address} {transport._address!r}"


def test_a_secret_that_everybody_may_read_is_told(tmp_path: Path, mine: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "password"
    path.write_text(SECRET)
    for secret, use in ((path, lambda: read_password(path)), (mine / "tls.key", lambda: load_tls_config(str(mine)))):
        secret.chmod(0o600)
        with caplog.at_level(logging.WARNING):
            use()
            assert caplog.text == ""
            secret.chmod(0o644)
            use()
        assert f"{secret}: everybody on this machine may read it: `chmod 600` it" in caplog.text
        assert SECRET not in caplog.text
        caplog.clear()
