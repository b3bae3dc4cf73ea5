"""Checks of a TLS folder: each file that cannot be used is named, and no secret is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from brokers.errors import BadFile, UsageError
from brokers.mqtt import tls_files
from brokers.mqtt.tls_files import check_tls_folder, utc_now
from brokers.security.certificates import Identity, ensure_certificates
from tests.support.brokers.locked_broker import forge_credentials

SECRET = "correct horse"


@pytest.fixture(name="certs")
def _certs(tmp_path: Path) -> Path:
    ensure_certificates(tmp_path / "certs", [Identity("viewer")], days=30)
    return tmp_path / "certs"


@pytest.fixture(name="folder")
def _folder(certs: Path) -> Path:
    return certs / "viewer"


def test_folder_with_certificate_returns_true(folder: Path) -> None:
    assert check_tls_folder(folder)


@pytest.mark.parametrize(
    ("damage", "name", "problem"),
    [
        (lambda folder: (folder / "ca.crt").unlink(), "ca.crt", "cannot be read: no such file or directory"),
        (lambda folder: (folder / "tls.key").unlink(), "tls.key", "cannot be read: no such file or directory"),
        (lambda folder: (folder / "tls.crt").unlink(), "tls.crt", "cannot be read: no such file or directory"),
        (lambda folder: (folder / "ca.crt").write_text("hello"), "ca.crt", "expected a PEM certificate"),
        (lambda folder: (folder / "ca.crt").write_bytes(b"\xff\0"), "ca.crt", "expected a PEM certificate"),
        (lambda folder: (folder / "tls.key").write_text(SECRET), "tls.key", "expected a PEM private key"),
        (lambda folder: (folder / "tls.crt").write_text(""), "tls.crt", "expected a PEM certificate"),
    ],
)
def test_unusable_file_raises_bad_file(folder: Path, damage: Callable[[Path], object], name: str, problem: str) -> None:
    damage(folder)
    with pytest.raises(BadFile) as caught:
        check_tls_folder(folder)
    assert (caught.value.path, caught.value.problem) == (str(folder / name), problem)


@pytest.mark.parametrize(
    ("create", "problem"), [(Path.touch, "is not a folder"), (lambda path: None, "no such folder")]
)
def test_path_that_is_not_a_folder_raises_bad_file(
    tmp_path: Path, create: Callable[[Path], object], problem: str
) -> None:
    create(tmp_path / "x")
    with pytest.raises(BadFile, match=f"{problem}: expected one with ca.crt, tls.crt and tls.key"):
        check_tls_folder(tmp_path / "x")


def test_path_that_is_too_long_raises_bad_file() -> None:
    with pytest.raises(BadFile, match="cannot be read: file name too long"):
        check_tls_folder(Path("n" * 300))


def test_certificate_with_another_key_raises_key_mismatch(certs: Path, folder: Path) -> None:
    (forge_credentials(certs, "viewer") / "tls.key").replace(folder / "tls.key")
    with pytest.raises(UsageError, match=r"tls.crt: does not match the key in .*tls.key") as caught:
        check_tls_folder(folder)
    assert caught.value.code == "KeyMismatch"


def test_clock_before_the_start_raises_not_yet_valid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most often the clock of a small device was never set."""
    monkeypatch.setattr(tls_files, "utc_now", lambda: utc_now().replace(year=1970))
    with pytest.raises(UsageError, match=r"ca.crt: is valid from .* it is now 1970-.* clock right\?") as caught:
        check_tls_folder(folder)
    assert caught.value.code == "NotYetValid"


def test_expired_certificate_raises_expired(certs: Path) -> None:
    with pytest.raises(UsageError, match=r"tls.crt: expired at .*, it is now .*--renew") as caught:
        check_tls_folder(forge_credentials(certs, "viewer", valid_from_days=-9, valid_days=3))
    assert caught.value.code == "Expired"


def test_expired_ca_raises_expired(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_files, "utc_now", lambda: utc_now().replace(year=utc_now().year + 20))
    with pytest.raises(UsageError) as caught:
        check_tls_folder(folder)
    assert (caught.value.code, caught.value.fields["path"]) == ("Expired", str(folder / "ca.crt"))
