"""The InfluxDB that the environment names, and the message for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from brokers.errors import UsageError
from monitor.stores.influx.config import InfluxTarget, influx_target, spool_folder

URL = {"SPARSE_INFLUX_URL": "http://db:8086"}
NOT_A_TOKEN = "not a token: expected one line of printable ASCII characters"


def test_no_url_is_no_target() -> None:
    assert influx_target({}) is None
    assert influx_target({"SPARSE_INFLUX_URL": "", "SPARSE_INFLUX_TOKEN": "x"}) is None


def test_url_alone_has_defaults() -> None:
    assert influx_target(URL) == InfluxTarget("http://db:8086", "sparse", "sparse", "", None)


def test_all_settings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("t0ken\n")
    settings = {"SPARSE_INFLUX_ORG": "o", "SPARSE_INFLUX_BUCKET": "b", "SPARSE_INFLUX_TOKEN_FILE": str(path)}
    target = influx_target({"SPARSE_INFLUX_URL": "https://[::1]:8086/", **settings})
    assert target == InfluxTarget("https://[::1]:8086", "o", "b", "t0ken")


def test_token_is_not_printed() -> None:
    target = influx_target({**URL, "SPARSE_INFLUX_TOKEN": "t0ken"})
    assert target is not None
    assert target.token == "t0ken"
    assert "t0ken" not in f"{target} {target!r}"


@pytest.mark.parametrize(
    "url",
    [
        "db:8086",
        "ftp://db",
        "http://",
        "http://db:port",
        "http://db:99999",
        "http://[::1",
        "http://d b",
        "http://db?x",
        "http://me:secret@db:8086",
    ],
)
def test_bad_url_raises_usage_error(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        influx_target({"SPARSE_INFLUX_URL": url})
    assert (caught.value.code, caught.value.fields["variable"]) == ("BadSetting", "SPARSE_INFLUX_URL")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("SPARSE_INFLUX_URL", "db:8086", "not the address of a server; expected http://HOST:PORT or https://HOST:PORT"),
        ("SPARSE_INFLUX_TOKEN_FILE", "{}/none", "cannot read {}/none: no such file or directory"),
        ("SPARSE_INFLUX_TOKEN_FILE", "{}", "cannot read {}: is a directory"),
        ("SPARSE_INFLUX_TOKEN_FILE", "{}/empty", "{}/empty is empty: expected a token"),
        ("SPARSE_INFLUX_TOKEN_FILE", "{}/binary", "cannot read {}/binary: not a text file"),
        ("SPARSE_INFLUX_TOKEN_FILE", "{}/lines", NOT_A_TOKEN),
        ("SPARSE_INFLUX_TOKEN", "tökén", NOT_A_TOKEN),
    ],
)
def test_message_names_variable_and_problem(tmp_path: Path, variable: str, value: str, problem: str) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "lines").write_text("one\ntwo\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError) as caught:
        influx_target({**URL, variable: value.replace("{}", str(tmp_path))})
    assert str(caught.value) == f"{variable}: {problem.replace('{}', str(tmp_path))}"


def test_ca_file_must_be_a_certificate(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(UsageError) as caught:
        influx_target({**URL, "SPARSE_INFLUX_CA": str(tmp_path / "ca.pem")})
    assert (caught.value.code, caught.value.fields["variable"]) == ("BadSetting", "SPARSE_INFLUX_CA")


def test_two_tokens_raise_usage_error() -> None:
    with pytest.raises(UsageError, match="set this or SPARSE_INFLUX_TOKEN_FILE, not both"):
        influx_target({**URL, "SPARSE_INFLUX_TOKEN": "a", "SPARSE_INFLUX_TOKEN_FILE": "b"})


def test_spool_folder_is_in_the_state_folder_of_the_user() -> None:
    assert spool_folder({"SPARSE_INFLUX_SPOOL": "there"}) == Path("there")
    assert spool_folder({"XDG_STATE_HOME": "/state"}) == Path("/state/sparse/influx-spool")
    assert spool_folder({}) == Path.home() / ".local/state/sparse/influx-spool"
