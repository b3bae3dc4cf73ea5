"""`sparse certs`: its report, and one line for bad input."""

from __future__ import annotations

from pathlib import Path

import pytest

from brokers.cli import main

PIPELINE = """
[pipeline]
name = "street"
[[stage]]
name = "head"
executor = "a:b"
site = "cloud"
[[site]]
name = "cloud"
broker = "mqtts://cloud.example:8883"
[source]
site = "cloud"
"""


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    path = tmp_path / "street.toml"
    path.write_text(PIPELINE)
    return path


def test_report_has_a_line_per_certificate(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["certs", str(file), "--out", str(tmp_path / "certs"), "--host", "cloud=fog.example"]
    assert main([*arguments, "--node", "broker.cloud"]) == 0
    authority, broker = capsys.readouterr().out.splitlines()
    assert authority.startswith("made    authority ")
    assert broker.startswith("made    broker.cloud  until ")
    assert "cloud.example, fog.example, localhost" in broker
    assert main(arguments) == 0
    assert "kept    broker.cloud " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("--host", "cloud", "--host cloud: not a site and a host name: expected SITE=NAME"),
        ("--host", "clout=x", "did you mean 'cloud'?"),
        ("--host", "cloud=a b", "--host cloud=a b: "),
        ("--host", f"cloud={'x' * 64}.example", "xxx"),
        ("--node", "viewr", "did you mean 'viewer'?"),
        ("--days", "0", "greater than or equal to 1"),
        ("--out", "{file}", "street.toml"),
        ("--out", "{file}/certs", "cannot be"),
        ("--out", "/proc/certs", "/proc/certs: cannot be written"),  # root can write everywhere else
        ("--out", "/proc", "/proc/authority: cannot be written"),
    ],
)
def test_bad_input_is_one_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, problem: str
) -> None:
    assert main(["certs", str(file), "--out", str(tmp_path / "certs"), option, value.format(file=file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert problem in line
    assert not (tmp_path / "certs").exists()
