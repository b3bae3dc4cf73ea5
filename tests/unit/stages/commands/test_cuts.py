"""The output of `sparse cuts`."""

from __future__ import annotations

import json

import pytest

from stages.commands.cuts import command
from tests.support.environment.checkout import ROOT

STREET = ROOT / "examples" / "street.toml"


def test_cuts_are_listed_with_their_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(STREET) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "after 8: head to body, 346,112 bytes as float32: layers.7 1x128x26x26"
    assert len(lines) == 2


def test_json_has_all_possible_cuts(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(STREET, every=True, json=True) == 0
    output = json.loads(capsys.readouterr().out)
    assert (output["pipeline"], output["rows"]) == ("street", 1)
    assert [cut["after"] for cut in output["cuts"]] == list(range(1, 24))
    assert output["cuts"][7] == {
        "after": 8,
        "sender": "head",
        "receiver": "tail",
        "wire": "float32",
        "float32_bytes": 346_112,
        "wire_bytes": 346_112,
        "tensors": {"layers.7": [1, 128, 26, 26]},
    }


def test_pipeline_without_a_network_has_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "examples" / "sensor.toml"
    assert command(path) == 0
    assert capsys.readouterr().out == f"{path}: no network that is cut\n"
