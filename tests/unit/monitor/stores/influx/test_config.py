"""Which InfluxDB the environment names: what is right, and the one line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from brokers.errors import UsageError
from monitor.stores.influx.config import InfluxTarget, influx_target, spool_folder

URL = {"SPARSE_INFLUX_URL": "http://db:8086"}


def test_nothing_named_is_no_server() -> None:
    assert influx_target({}) is None
    assert influx_target({"SPARSE_INFLUX_URL": "", "SPARSE_INFLUX_TOKEN": "x"}) is None


def test_a_url_is_enough() -> None:
    assert influx_target(URL) == InfluxTarget("http://db:8086", "sparse", "sparse", "", None)


def test_all_can_be_said(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("t0ken\n")
    named = {"SPARSE_INFLUX_ORG": "o", "SPARSE_INFLUX_BUCKET": "b", "SPARSE_INFLUX_TOKEN_FILE": str(path)}
    assert influx_target({"SPARSE_INFLUX_URL": "https://[::1]:8086/", **named}) == InfluxTarget(
        "https://[::1]:8086", "o", "b", "t0ken"
    )
    found = influx_target({**URL, "SPARSE_INFLUX_TOKEN": "t0ken"})
    assert found is not None
    assert found.token == "t0ken"
    assert "t0ken" not in f"{found} {found!r}"


NO_URLS = [
    "db:8086",
    "ftp://db",
    "http://",
    "http://db:port",
    "http://db:99999",
    "http://[::1",
    "http://d b",
    "http://db?x",
]
NO_TOKEN = "the token has characters that no token has: expected one line of printable ASCII"


@pytest.mark.parametrize("url", NO_URLS)
def test_a_url_that_is_none_is_one_line(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        influx_target({"SPARSE_INFLUX_URL": url})
    assert str(caught.value).startswith("SPARSE_INFLUX_URL: ")
    assert str(caught.value).endswith("expected http://HOST:PORT or https://HOST:PORT")


def test_a_password_in_the_url_is_not_shown() -> None:
    with pytest.raises(UsageError) as caught:
        influx_target({"SPARSE_INFLUX_URL": "http://me:secret@db:8086"})
    assert str(caught.value) == (
        "SPARSE_INFLUX_URL: no user and no password belong there: SPARSE_INFLUX_TOKEN_FILE names a file with the token"
    )


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        ("SPARSE_INFLUX_TOKEN_FILE", "{}/none", "{}/none cannot be read: no such file or directory"),
        ("SPARSE_INFLUX_TOKEN_FILE", "{}", "{} cannot be read: is a directory"),
        ("SPARSE_INFLUX_TOKEN_FILE", "{}/empty", "{}/empty is empty: expected a token"),
        ("SPARSE_INFLUX_TOKEN_FILE", "{}/binary", "{}/binary cannot be read: it is no text"),
        ("SPARSE_INFLUX_TOKEN_FILE", "{}/lines", NO_TOKEN),
        ("SPARSE_INFLUX_TOKEN", "tökén", NO_TOKEN),
        ("SPARSE_INFLUX_BUCKET", "a\nb", "'a\\nb' is no name"),
        ("SPARSE_INFLUX_CA", "{}/lines", "{}/lines: expected a PEM certificate"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_variable(tmp_path: Path, variable: str, value: str, problem: str) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "lines").write_text("one\ntwo\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError) as caught:
        influx_target({**URL, variable: value.replace("{}", str(tmp_path))})
    assert str(caught.value) == f"{variable}: {problem.replace('{}', str(tmp_path))}"


def test_two_tokens_are_one_too_many() -> None:
    with pytest.raises(UsageError, match=r"^SPARSE_INFLUX_TOKEN: SPARSE_INFLUX_TOKEN_FILE is there, too"):
        influx_target({**URL, "SPARSE_INFLUX_TOKEN": "a", "SPARSE_INFLUX_TOKEN_FILE": "b"})


def test_points_wait_where_programs_keep_what_they_need_again() -> None:
    assert spool_folder({"SPARSE_INFLUX_SPOOL": "there"}) == Path("there")
    assert spool_folder({"XDG_STATE_HOME": "/state"}) == Path("/state/sparse/influx-spool")
    assert spool_folder({}) == Path.home() / ".local/state/sparse/influx-spool"
