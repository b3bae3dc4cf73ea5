"""Darknet's weight files: read as Darknet reads them, written so that it can, refused in one clear line."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from brokers.errors import BadFile, UsageError
from stages.errors import DarknetTrailing, DarknetTruncated, NotDarknet
from stages.models.darknet_layers import Convolutional, Darknet, LayerSpec, MaxPool, Yolo
from stages.models.darknet_weights import (
    DarknetHeader,
    darknet_state_dict,
    load_darknet_weights,
    read_header,
    save_darknet_weights,
)
from stages.models.yolov3 import yolov3, yolov3_tiny
from tests.support.environment.darknet_reference import init_stable_weights, pretrained_weights

# Layer 0 has 4 * 2 + 2 * 3 * 9 = 62 numbers, layer 2 has 6 + 6 * 2 = 18: with the header 20 + 4 * 80 = 340 bytes.
SMALL_BYTES = 340
LAYER_2_BYTES = 20 + 62 * 4


def small() -> Darknet:
    """A network of four layers."""
    rows = [LayerSpec(Convolutional, filters=2, size=3), LayerSpec(MaxPool, size=2, stride=2)]
    return Darknet(
        [*rows, LayerSpec(Convolutional, filters=6, linear=True), LayerSpec(Yolo, anchors=((1, 1),))], classes=1
    )


def written(folder: Path, seed: int = 0) -> tuple[Darknet, Path]:
    model = small()
    init_stable_weights(model, seed)
    path = folder / "small.weights"
    save_darknet_weights(model, path)
    return model, path


def test_what_is_written_is_read_back_bit_by_bit(tmp_path: Path) -> None:
    model, path = written(tmp_path)
    other = small()
    load_darknet_weights(other, path)
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):  # a count that Darknet has no place for
            assert torch.equal(other.state_dict()[name], tensor), name


def test_the_trained_weights_are_written_as_they_were_read(tmp_path: Path) -> None:
    path = pretrained_weights("yolov3-tiny")
    model = yolov3_tiny()
    assert load_darknet_weights(model, path) == DarknetHeader(major=0, minor=2, revision=0, seen=32_013_312)
    save_darknet_weights(model, tmp_path / "again.weights", seen=32_013_312)
    assert (tmp_path / "again.weights").read_bytes() == path.read_bytes()


def test_a_convolution_is_biases_scales_means_variances_then_filters(tmp_path: Path) -> None:
    path = tmp_path / "counted.weights"
    path.write_bytes(DarknetHeader().encode() + struct.pack("<80f", *range(80)))
    model = small()
    load_darknet_weights(model, path)
    state = {name: tensor.flatten().tolist() for name, tensor in model.state_dict().items()}
    assert state["layers.0.norm.bias"] == [0, 1]
    assert state["layers.0.norm.weight"] == [2, 3]
    assert state["layers.0.norm.running_mean"] == [4, 5]
    assert state["layers.0.norm.running_var"] == [6, 7]
    assert state["layers.0.conv.weight"] == list(range(8, 62))
    assert state["layers.2.conv.bias"] == list(range(62, 68))
    assert state["layers.2.conv.weight"] == list(range(68, 80))


def test_an_old_header_counts_the_pictures_seen_in_four_bytes(tmp_path: Path) -> None:
    model, path = written(tmp_path)
    numbers = path.read_bytes()[20:]
    old = tmp_path / "old.weights"
    old.write_bytes(struct.pack("<4i", 0, 1, 0, 77) + numbers)
    other = small()
    assert load_darknet_weights(other, old) == DarknetHeader(0, 1, 0, 77)
    assert torch.equal(other.state_dict()["layers.2.conv.weight"], model.state_dict()["layers.2.conv.weight"])


def test_a_file_is_mapped_for_a_model_without_memory_of_its_own(tmp_path: Path) -> None:
    model, path = written(tmp_path)
    with torch.device("meta"):
        empty = small()
    state = darknet_state_dict(empty, path)
    empty.load_state_dict(state, assign=True)
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(empty.eval()(images)[0], model(images)[0])


def test_writing_to_the_mapped_state_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    _, path = written(tmp_path)
    before = path.read_bytes()
    for tensor in darknet_state_dict(small(), path).values():
        tensor.zero_()
    assert path.read_bytes() == before


def test_a_file_cut_off_anywhere_is_refused_and_says_how_long_it_should_be(tmp_path: Path) -> None:
    _, path = written(tmp_path)
    whole = path.read_bytes()
    assert len(whole) == SMALL_BYTES
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(NotDarknet if length < 20 else DarknetTruncated) as caught:
            load_darknet_weights(model, path)
        line = str(caught.value)
        assert str(path) in line
        assert "\n" not in line
        assert str(length) in line
        if length >= 20:
            assert f"inside layer {2 if length >= LAYER_2_BYTES else 0}:" in line
            assert f"needs {SMALL_BYTES} bytes" in line
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("more", [1, 4, 4000])
def test_bytes_after_the_last_layer_are_refused(tmp_path: Path, more: int) -> None:
    _, path = written(tmp_path)
    with path.open("ab") as file:
        file.write(bytes(more))
    with pytest.raises(DarknetTrailing) as caught:
        load_darknet_weights(small(), path)
    assert (caught.value.expected_bytes, caught.value.actual_bytes) == (SMALL_BYTES, SMALL_BYTES + more)
    assert "another network" in str(caught.value)


def test_the_weights_of_another_network_are_refused() -> None:
    path = pretrained_weights("yolov3-tiny")
    with torch.device("meta"):
        full = yolov3()
    with pytest.raises(DarknetTruncated, match=r"yolov3-tiny.weights ends inside layer \d+: .* 248007048 bytes"):
        darknet_state_dict(full, path)


@pytest.mark.parametrize(("what", "data"), [
    ("a web page", b"<!DOCTYPE html><html><body>404</body></html>"),
    ("safetensors", struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}      ' + bytes(4)),
    ("a zip", b"PK\x03\x04" + bytes(60)),
    ("nothing", b""),
])  # fmt: skip
def test_a_file_of_another_kind_is_not_a_darknet_file(tmp_path: Path, what: str, data: bytes) -> None:
    path = tmp_path / what
    path.write_bytes(data)
    with pytest.raises(NotDarknet, match="is not a Darknet weights file"):
        read_header(path)


def test_a_file_that_is_not_there_is_a_users_mistake_that_names_it(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.weights", tmp_path):
        with pytest.raises(UsageError, match=str(path)):
            load_darknet_weights(small(), path)


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    model = small()
    with pytest.raises(BadFile, match="cannot be written"):
        save_darknet_weights(model, tmp_path / "no such folder" / "a.weights")
    (tmp_path / "taken").mkdir()
    with pytest.raises(BadFile, match="cannot be written"):
        save_darknet_weights(model, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_weights_in_channels_last_are_written_in_darknets_order(tmp_path: Path) -> None:
    model, path = written(tmp_path)
    save_darknet_weights(model.to(memory_format=torch.channels_last), tmp_path / "last.weights")
    assert (tmp_path / "last.weights").read_bytes() == path.read_bytes()
