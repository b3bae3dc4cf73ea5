"""Trained weights are found by a registered name, or are a file."""

import hashlib
from pathlib import Path

import pytest

from brokers.errors import UsageError
from stages.partition import weight_files as weights
from stages.partition.weight_files import PublishedWeights, UnknownWeights, find_weights
from tests.support.errors import raises_error


def test_a_file_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "my.weights").write_bytes(b"w")
    assert find_weights(str(tmp_path / "my.weights")) == tmp_path / "my.weights"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        UnknownWeights, match="weights 'yolov9': expected a file, or one of the names yolov3, yolov3-tiny"
    ):
        find_weights("yolov9")


def test_a_registered_name_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = PublishedWeights("toy.weights", hashlib.sha256(b"right").hexdigest(), ())
    monkeypatch.setattr(weights, "PUBLISHED_WEIGHTS", {"toy": toy})
    (tmp_path / "toy.weights").write_bytes(b"right")
    assert find_weights("toy", cache=tmp_path) == tmp_path / "toy.weights"


def test_a_cached_file_with_a_broken_checksum_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = PublishedWeights("toy.weights", hashlib.sha256(b"right").hexdigest(), ())
    monkeypatch.setattr(weights, "PUBLISHED_WEIGHTS", {"toy": toy})
    (tmp_path / "toy.weights").write_bytes(b"wrong")
    with raises_error(UsageError, "DownloadFailed", match=r"toy\.weights: the file there has another SHA-256"):
        find_weights("toy", cache=tmp_path)


def test_every_registered_entry_is_pinned_by_a_sum() -> None:
    for name, entry in weights.PUBLISHED_WEIGHTS.items():
        assert len(bytes.fromhex(entry.sha256)) == 32, name
        assert entry.origins, name
