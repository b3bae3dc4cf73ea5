"""`sparse certs`: whom it makes certificates for, what it keeps, and that nothing is overwritten unasked."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.x509 import ExtendedKeyUsage
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from brokers.cli import main
from brokers.commands.certs import command
from brokers.errors import BadFile, UsageError
from brokers.mqtt.tls_files import check_tls_folder, read_certificate, utc_now
from brokers.security.cert_store import UnusableCertificate
from brokers.security.dev_ca import certificate_hosts, is_signed_by
from tests.support.brokers.locked_broker import forge_credentials

TEXT = """
[pipeline]
name = "street"
[[stage]]
name = "head"
executor = "a:b"
site = "device"
[[stage]]
name = "tail"
executor = "a:b"
site = "cloud"
[[site]]
name = "device"
broker = "mqtts://[2001:db8::7]:8883"
links = [{ to = "cloud" }]
cameras = ["door"]
[[site]]
name = "cloud"
broker = "mqtts://cloud.example:8883"
[source]
site = "device"
"""
EVERYBODY = {
    "broker.device", "broker.cloud", "street.head", "street.tail", "street.source", "camera.door",
    "viewer", "monitor", "operator",
}  # fmt: skip


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    path = tmp_path / "street.toml"
    path.write_text(TEXT)
    return path


@pytest.fixture(name="certs")
def _certs(tmp_path: Path, file: Path) -> Path:
    command(file, tmp_path / "certs")
    return tmp_path / "certs"


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_everybody_has_a_folder_like_a_kubernetes_secret(certs: Path) -> None:
    assert {path.name for path in certs.iterdir()} == {*EVERYBODY, "authority"}
    for name in EVERYBODY:
        assert {path.name for path in (certs / name).iterdir()} == {"ca.crt", "tls.crt", "tls.key"}
        assert check_tls_folder(certs / name)
        certificate = read_certificate(certs / name / "tls.crt")
        (common,) = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        assert common.value == name
        assert is_signed_by(certificate, read_certificate(certs / "authority" / "ca.crt"))


def test_only_their_owner_reads_keys(certs: Path) -> None:
    for path in certs.rglob("*"):
        mode = path.stat().st_mode & 0o777
        assert mode == (0o700 if path.is_dir() else 0o600 if path.suffix == ".key" else 0o644), path
    assert certs.stat().st_mode & 0o777 == 0o700


def test_a_broker_serves_and_dials_and_has_the_names_it_is_reached_by(tmp_path: Path, file: Path) -> None:
    command(file, tmp_path / "certs", host=["cloud=fog.example", "cloud=192.0.2.7"])
    loopback = {"localhost", "127.0.0.1", "::1"}
    cloud = read_certificate(tmp_path / "certs" / "broker.cloud" / "tls.crt")
    assert set(certificate_hosts(cloud)) == {"cloud.example", "fog.example", "192.0.2.7", *loopback}
    device = read_certificate(tmp_path / "certs" / "broker.device" / "tls.crt")
    assert set(certificate_hosts(device)) == {"2001:db8::7", *loopback}
    uses = cloud.extensions.get_extension_for_class(ExtendedKeyUsage).value
    assert {*uses} == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    viewer = read_certificate(tmp_path / "certs" / "viewer" / "tls.crt")
    assert certificate_hosts(viewer) == ()
    assert {*viewer.extensions.get_extension_for_class(ExtendedKeyUsage).value} == {ExtendedKeyUsageOID.CLIENT_AUTH}


def test_what_is_there_and_valid_is_kept_and_what_is_missing_is_made(
    certs: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ca.crt", "tls.crt", "tls.key"):
        (certs / "viewer" / name).unlink()
    before = everything(certs)
    capsys.readouterr()
    command(file, certs)
    after = everything(certs)
    assert {name: data for name, data in after.items() if name in before} == before
    assert check_tls_folder(certs / "viewer")
    said = capsys.readouterr().out
    assert "made    viewer" in said
    assert said.count("kept ") == len(EVERYBODY) - 1


def test_renew_makes_all_anew_under_the_authority_that_is_there(certs: Path, file: Path) -> None:
    before = everything(certs)
    command(file, certs, renew=True)
    after = everything(certs)
    assert {name for name in before if before[name] == after[name]} == {
        "authority/ca.crt", "authority/ca.key", *(f"{name}/ca.crt" for name in EVERYBODY),
    }  # fmt: skip
    assert all(check_tls_folder(certs / name) for name in EVERYBODY)


def test_one_can_be_made_or_renewed_by_itself(tmp_path: Path, file: Path) -> None:
    certs = tmp_path / "certs"
    command(file, certs, node=["viewer"])
    assert {path.name for path in certs.iterdir()} == {"authority", "viewer"}
    command(file, certs, node=["monitor"])
    before = everything(certs)
    command(file, certs, node=["viewer"], renew=True)
    after = everything(certs)
    assert {name for name in before if before[name] != after[name]} == {"viewer/tls.crt", "viewer/tls.key"}


def test_a_second_pipeline_shares_the_authority(certs: Path, file: Path) -> None:
    before = everything(certs)
    file.write_text(TEXT.replace('"street"', '"other"'))
    command(file, certs)
    assert before.items() <= everything(certs).items()
    assert (certs / "other.head").is_dir()


def spoil_expired(certs: Path) -> None:
    old = forge_credentials(certs, "viewer", valid_from_days=-9, valid_days=3)
    for name in ("tls.crt", "tls.key"):
        (old / name).replace(certs / "viewer" / name)


def spoil_authority(certs: Path) -> None:
    (certs / "authority").rename(certs / "former")


def spoil_rank(certs: Path) -> None:
    for end in ("crt", "key"):
        (certs / "viewer" / f"tls.{end}").replace(certs / "authority" / f"ca.{end}")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda certs: (certs / "viewer" / "tls.key").unlink(), "viewer/tls.key: cannot be read: no such file"),
        (lambda certs: (certs / "viewer" / "tls.crt").write_text("x"), "viewer/tls.crt: expected a PEM certificate"),
        (lambda certs: (certs / "viewer" / "ca.crt").unlink(), "viewer/ca.crt: cannot be read: no such file"),
        (
            lambda certs: (certs / "monitor" / "tls.key").replace(certs / "viewer" / "tls.key"),
            "viewer/tls.crt: does not fit the key in",
        ),
        (spoil_expired, "viewer/tls.crt: expired at"),
        (spoil_authority, "tls.crt: is not of the authority in"),
        (lambda certs: (certs / "authority" / "ca.key").write_text("x"), "ca.key: expected a PEM private key"),
        (lambda certs: (certs / "authority" / "ca.key").unlink(), "authority/ca.key: cannot be read"),
        (spoil_rank, "authority/ca.crt: is not the certificate of an authority"),
        (lambda certs: [(certs / "viewer").rename(certs / "v"), (certs / "viewer").touch()], "viewer: is no folder"),
    ],
)  # fmt: skip
def test_what_does_not_do_is_told_and_nothing_is_written(certs: Path, file: Path, spoil: object, told: str) -> None:
    assert callable(spoil)
    spoil(certs)
    before = everything(certs)
    with pytest.raises(UsageError) as caught:
        command(file, certs)
    assert told in str(caught.value)
    assert everything(certs) == before


def test_an_unfit_certificate_is_mended_by_what_the_line_says(certs: Path, file: Path) -> None:
    (certs / "viewer" / "tls.crt").write_text("x")
    with pytest.raises(UnusableCertificate, match="`--renew --node viewer` makes it anew"):
        command(file, certs)
    command(file, certs, node=["viewer"], renew=True)
    command(file, certs)
    assert check_tls_folder(certs / "viewer")


def test_a_broker_that_got_another_name_is_told(certs: Path, file: Path) -> None:
    with pytest.raises(UnusableCertificate, match=r"broker.cloud/tls.crt: is not for the host 'fog.example'"):
        command(file, certs, host=["cloud=fog.example"])


def test_an_authority_that_is_too_old_signs_no_more(certs: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brokers.security.cert_store.utc_now", lambda: utc_now().replace(year=utc_now().year + 11))
    with pytest.raises(BadFile, match=r"authority/ca.crt: expired at .* then `--renew` makes all anew"):
        command(file, certs, renew=True)


def test_no_certificate_outlives_its_authority(certs: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brokers.security.cert_store.utc_now", lambda: utc_now().replace(year=utc_now().year + 9))
    command(file, certs, days=3650, renew=True)
    authority = read_certificate(certs / "authority" / "ca.crt")
    assert read_certificate(certs / "viewer" / "tls.crt").not_valid_after_utc == authority.not_valid_after_utc


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--host", "cloud"), "--host cloud: not a site and a host name: expected SITE=NAME"),
        (("--host", "clout=x"), "no site 'clout' (did you mean 'cloud'?)"),
        (("--host", "cloud=a b"), "not a site and a host name"),
        (("--host", f"cloud={'x' * 64}.example"), "is not a host name"),
        (("--node", "viewr"), "--node viewr: no such identity (did you mean 'viewer'?)"),
        (("--days", "0"), "greater than or equal to 1"),
        (("--out", "{file}"), "street.toml"),
        (("--out", "{file}/certs"), "cannot be"),
        (("--out", "/proc/certs"), "/proc/certs: cannot be written"),  # root may write everywhere else
        (("--out", "/proc"), "/proc/authority: cannot be written"),
    ],
)
def test_bad_input_is_one_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, str], told: str
) -> None:
    option, value = words
    status = main(["certs", str(file), "--out", str(tmp_path / "certs"), option, value.format(file=file)])
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not (tmp_path / "certs").exists()
