"""The certificates of a pipeline: their content, which are kept, and that nothing is replaced unless requested."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.x509 import ExtendedKeyUsage
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from brokers.config.pipeline_file import Pipeline
from brokers.errors import BadFile, UsageError
from brokers.mqtt.tls_files import check_tls_folder, read_certificate, utc_now
from brokers.security.certificates import (
    StoredCertificate,
    certificate_hosts,
    ensure_certificates,
    is_signed_by,
    pipeline_identities,
)
from tests.support.brokers.locked_broker import forge_credentials

PIPELINE = {
    "pipeline": {"name": "street"},
    "stage": [
        {"name": "head", "executor": "a:b", "site": "device"},
        {"name": "tail", "executor": "a:b", "site": "cloud"},
    ],
    "site": [
        {"name": "device", "broker": "mqtts://[2001:db8::7]:8883", "links": [{"to": "cloud"}], "cameras": ["door"]},
        {"name": "cloud", "broker": "mqtts://cloud.example:8883"},
    ],
    "source": {"site": "device"},
}
CLIENTS = {"street.head", "street.tail", "street.source", "camera.door", "viewer", "monitor", "operator"}
NAMES = {"broker.device", "broker.cloud", *CLIENTS}
LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def ensure(
    folder: Path, *, only: str = "", hosts: tuple[str, ...] = (), days: int = 365, renew: bool = False, name: str = ""
) -> list[StoredCertificate]:
    """Ensure the certificates of the pipeline, or of one identity; `hosts` are further names of the cloud's broker."""
    pipeline = Pipeline.model_validate({**PIPELINE, **({"pipeline": {"name": name}} if name else {})})
    identities = pipeline_identities(pipeline, {"cloud": hosts})
    return ensure_certificates(folder, [each for each in identities if only in ("", each.name)], days=days, renew=renew)


@pytest.fixture(name="certs")
def _certs(tmp_path: Path) -> Path:
    ensure(tmp_path / "certs")
    return tmp_path / "certs"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed_files(before: dict[str, bytes], after: dict[str, bytes]) -> set[str]:
    return {name for name in before if before[name] != after[name]}


def test_each_identity_has_a_folder_like_a_kubernetes_secret(certs: Path) -> None:
    assert {path.name for path in certs.iterdir()} == {*NAMES, "authority"}
    ca = read_certificate(certs / "authority" / "ca.crt")
    for name in NAMES:
        assert {path.name for path in (certs / name).iterdir()} == {"ca.crt", "tls.crt", "tls.key"}
        assert check_tls_folder(certs / name)
        certificate = read_certificate(certs / name / "tls.crt")
        (common_name,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        assert common_name.value == name
        assert is_signed_by(certificate, ca)


def test_keys_are_readable_by_their_owner_only(certs: Path) -> None:
    for path in (certs, *certs.rglob("*")):
        mode = path.stat().st_mode & 0o777
        assert mode == (0o700 if path.is_dir() else 0o600 if path.suffix == ".key" else 0o644), path


def test_broker_certificate_is_for_server_and_client_and_all_hosts(tmp_path: Path) -> None:
    ensure(tmp_path, hosts=("fog.example", "192.0.2.7"))
    cloud = read_certificate(tmp_path / "broker.cloud" / "tls.crt")
    assert set(certificate_hosts(cloud)) == {"cloud.example", "fog.example", "192.0.2.7", *LOOPBACK}
    device = read_certificate(tmp_path / "broker.device" / "tls.crt")
    assert set(certificate_hosts(device)) == {"2001:db8::7", *LOOPBACK}
    viewer = read_certificate(tmp_path / "viewer" / "tls.crt")
    assert certificate_hosts(viewer) == ()
    client, server = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
    for certificate, usages in ((cloud, {client, server}), (viewer, {client})):
        assert {*certificate.extensions.get_extension_for_class(ExtendedKeyUsage).value} == usages


def test_valid_certificates_are_kept_and_missing_ones_made(certs: Path) -> None:
    for name in ("ca.crt", "tls.crt", "tls.key"):
        (certs / "viewer" / name).unlink()
    before = contents(certs)
    stored = ensure(certs)
    assert changed_files(before, contents(certs)) == set()
    assert check_tls_folder(certs / "viewer")
    assert {each.name: each.action for each in stored} == {**dict.fromkeys(NAMES, "kept"), "viewer": "made"}


def test_renew_replaces_certificates_but_not_the_ca(certs: Path) -> None:
    before = contents(certs)
    assert {each.action for each in ensure(certs, renew=True)} == {"renewed"}
    files = {f"{name}/{file}" for name in NAMES for file in ("tls.crt", "tls.key")}
    assert changed_files(before, contents(certs)) == files
    assert all(check_tls_folder(certs / name) for name in NAMES)


def test_single_identity_can_be_made_and_renewed(tmp_path: Path) -> None:
    ensure(tmp_path, only="viewer")
    assert {path.name for path in tmp_path.iterdir()} == {"authority", "viewer"}
    ensure(tmp_path, only="monitor")
    before = contents(tmp_path)
    ensure(tmp_path, only="viewer", renew=True)
    assert changed_files(before, contents(tmp_path)) == {"viewer/tls.crt", "viewer/tls.key"}


def test_second_pipeline_shares_the_ca(certs: Path) -> None:
    before = contents(certs)
    ensure(certs, name="other")
    assert changed_files(before, contents(certs)) == set()
    assert (certs / "other.head").is_dir()


def install_expired_certificate(certs: Path) -> None:
    expired = forge_credentials(certs, "viewer", valid_from_days=-9, valid_days=3)
    for name in ("tls.crt", "tls.key"):
        (expired / name).replace(certs / "viewer" / name)


def install_client_certificate_as_ca(certs: Path) -> None:
    for suffix in ("crt", "key"):
        (certs / "viewer" / f"tls.{suffix}").replace(certs / "authority" / f"ca.{suffix}")


def replace_folder_by_file(certs: Path) -> None:
    (certs / "viewer").rename(certs / "moved")
    (certs / "viewer").touch()


@pytest.mark.parametrize(
    ("damage", "code", "text"),
    [
        (lambda certs: (certs / "viewer/tls.key").unlink(), "UnusableCertificate", "viewer/tls.key: cannot be read"),
        (lambda certs: (certs / "viewer/tls.crt").write_text("x"), "UnusableCertificate", "expected a PEM certificate"),
        (lambda certs: (certs / "viewer/ca.crt").unlink(), "UnusableCertificate", "viewer/ca.crt: cannot be read"),
        (lambda certs: (certs / "monitor/tls.key").replace(certs / "viewer/tls.key"), "KeyMismatch", "viewer/tls.crt"),
        (install_expired_certificate, "Expired", "viewer/tls.crt"),
        (lambda certs: (certs / "authority").rename(certs / "old"), "UnusableCertificate", "is not signed by the CA"),
        (lambda certs: (certs / "authority/ca.key").write_text("x"), "BadFile", "ca.key: expected a PEM private key"),
        (lambda certs: (certs / "authority/ca.key").unlink(), "BadFile", "authority/ca.key: cannot be read"),
        (install_client_certificate_as_ca, "BadFile", "authority/ca.crt: is not a CA certificate"),
        (replace_folder_by_file, "BadFile", "viewer: is not a folder"),
    ],
)
def test_unusable_file_raises_and_nothing_is_written(
    certs: Path, damage: Callable[[Path], object], code: str, text: str
) -> None:
    damage(certs)
    before = contents(certs)
    with pytest.raises(UsageError) as caught:
        ensure(certs)
    assert caught.value.code == code
    assert text in str(caught.value)
    assert contents(certs) == before


def test_unusable_certificate_is_replaced_by_the_suggested_command(certs: Path) -> None:
    (certs / "viewer" / "tls.crt").write_text("x")
    with pytest.raises(UsageError, match="`--renew --node viewer` replaces it") as caught:
        ensure(certs)
    assert caught.value.fields == {"identity": "viewer"}
    ensure(certs, only="viewer", renew=True)
    ensure(certs)
    assert check_tls_folder(certs / "viewer")


def test_new_broker_host_makes_its_certificate_unusable(certs: Path) -> None:
    with pytest.raises(UsageError, match=r"broker.cloud/tls.crt: is not for the host 'fog.example'") as caught:
        ensure(certs, hosts=("fog.example",))
    assert caught.value.code == "UnusableCertificate"


def set_clock(monkeypatch: pytest.MonkeyPatch, years: int) -> None:
    monkeypatch.setattr("brokers.security.certificates.utc_now", lambda: utc_now().replace(year=utc_now().year + years))


def test_expired_ca_raises_bad_file_even_with_renew(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, years=11)
    with pytest.raises(BadFile, match=r"authority/ca.crt: expired at .* then `--renew` makes a new CA"):
        ensure(certs, renew=True)


def test_certificate_expires_with_its_ca_at_the_latest(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, years=9)
    ensure(certs, days=3650, renew=True)
    ca = read_certificate(certs / "authority" / "ca.crt")
    assert read_certificate(certs / "viewer" / "tls.crt").not_valid_after_utc == ca.not_valid_after_utc
