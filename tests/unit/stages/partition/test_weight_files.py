"""Weights are found by a registered name, or are a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from brokers.errors import UsageError
from stages.partition import weight_files
from stages.partition.weight_files import find_weights
from tests.support.errors import raises_error


def test_existing_file_is_returned(tmp_path: Path) -> None:
    (tmp_path / "my.weights").write_bytes(b"w")
    assert find_weights(str(tmp_path / "my.weights")) == tmp_path / "my.weights"


def test_unknown_name_lists_the_registered_ones() -> None:
    with raises_error(UsageError, "UnknownWeights", match="'yolov9': expected a file, or one of yolov3, yolov3-tiny"):
        find_weights("yolov9")


def test_registered_name_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = ("toy.weights", hashlib.sha256(b"right").hexdigest(), ())
    monkeypatch.setattr(weight_files, "PUBLISHED_WEIGHTS", {"toy": published})
    (tmp_path / "toy.weights").write_bytes(b"right")
    assert find_weights("toy", cache=tmp_path) == tmp_path / "toy.weights"


def test_registered_weights_have_a_checksum_and_an_origin() -> None:
    for name, (_, sha256, origins) in weight_files.PUBLISHED_WEIGHTS.items():
        assert len(bytes.fromhex(sha256)) == 32, name
        assert origins, name
