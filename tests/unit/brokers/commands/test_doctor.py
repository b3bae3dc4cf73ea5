"""Options of `sparse broker doctor`."""

from __future__ import annotations

import pytest

from brokers.commands import doctor
from brokers.errors import UsageError
from tests.support.errors import raises_error

URL = "mqtt://127.0.0.1"


@pytest.mark.parametrize(
    ("url", "across", "start", "to", "code"),
    [
        (None, None, None, None, "NoAddress"),
        (URL, "mqtt://other", None, None, "NoSites"),
        (URL, "mqtt://other", "a", None, "NoSites"),
        (URL, "mqtt://other", "a", "a", "NoSites"),
        (URL, "mqtt://other", "a/b", "c", "BadName"),
    ],
)
def test_incomplete_options_raise(
    monkeypatch: pytest.MonkeyPatch, url: str | None, across: str | None, start: str | None, to: str | None, code: str
) -> None:
    monkeypatch.delenv("SPARSE_BROKER", raising=False)
    with raises_error(UsageError, code):
        doctor._parse_options(url, None, across, start, to)


def test_options_default_to_the_address_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSE_BROKER", "mqtt://ann:secret@here:1")
    options = doctor._parse_options(None, None, None, None, None)
    assert options.broker == "mqtt://ann:secret@here:1"
    assert "secret" not in repr(options)
    assert not options.sizes_are_cuts


def test_cuts_that_take_too_long_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_CUTS_TIMEOUT_S", 0.001)
    with raises_error(UsageError, "CutsUnknown") as caught:
        doctor._cut_sizes("street.toml")
    assert caught.value.fields["path"] == "street.toml"
