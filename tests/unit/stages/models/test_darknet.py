"""Darknet's layers, and networks built of them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from brokers.errors import UsageError
from stages.models.darknet import (
    Convolutional,
    Darknet,
    LayerSpec,
    MaxPool,
    RouteLayer,
    Shortcut,
    Yolo,
    darknet_state_dict,
    header_bytes,
    save_darknet_weights,
)
from stages.models.yolov3 import yolov3, yolov3_tiny
from tests.support.environment.darknet_reference import init_stable_weights, pretrained_weights
from tests.support.errors import raises_error


def test_yolo_applies_the_logistic_except_to_width_and_height() -> None:
    x = torch.randn(2, 3 * 7, 4, 5, generator=torch.Generator().manual_seed(3)) * 3
    y = Yolo(((1, 1), (2, 2), (3, 3)), classes=2)(x)
    assert y.shape == (2, 3, 7, 4, 5)
    raw = x.numpy().reshape(2, 3, 7, 4, 5)
    expected = 1 / (1 + np.exp(-raw))
    expected[:, :, 2:4] = raw[:, :, 2:4]
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5)


def test_max_pool_of_stride_1_clips_windows_at_the_edge() -> None:
    x = torch.tensor([[[[-5.0, -1.0], [-3.0, -4.0]]]])
    assert MaxPool(2, 1)(x).tolist() == [[[[-1.0, -1.0], [-3.0, -4.0]]]]


def test_max_pool_of_an_odd_side_clips_its_last_windows() -> None:
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert MaxPool(2, 2)(x).tolist() == [[[[4.0, 5.0], [7.0, 8.0]]]]


def test_output_is_kept_until_its_last_reader() -> None:
    rows = [
        LayerSpec(Convolutional, filters=4),
        LayerSpec(Convolutional, filters=4),
        LayerSpec(Shortcut, (-1, 0)),
        LayerSpec(RouteLayer, (0, 2)),
        LayerSpec(Convolutional, filters=6, linear=True),
        LayerSpec(Yolo, anchors=((1, 1),)),
    ]
    model = Darknet(rows, classes=1)
    init_stable_weights(model, seed=4)
    images = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        first = model.layers[0](images)
        routed = torch.cat((first, model.layers[1](first) + first), dim=1)
        expected = model.layers[5](model.layers[4](routed))
        assert torch.equal(model(images)[0], expected)


# Layer 0 has 4 * 2 + 2 * 3 * 9 = 62 numbers, layer 2 has 6 + 6 * 2 = 18: with the header 20 + 4 * 80 = 340 bytes.
SMALL_BYTES = 340
LAYER_2_BYTES = 20 + 62 * 4


def small_network() -> Darknet:
    rows = [
        LayerSpec(Convolutional, filters=2, size=3),
        LayerSpec(MaxPool, size=2, stride=2),
        LayerSpec(Convolutional, filters=6, linear=True),
        LayerSpec(Yolo, anchors=((1, 1),)),
    ]
    return Darknet(rows, classes=1)


@pytest.fixture(name="saved")
def _saved(tmp_path: Path) -> tuple[Darknet, Path]:
    """A small network with random weights, and the file it was saved to."""
    model = small_network()
    init_stable_weights(model, seed=0)
    path = tmp_path / "small.weights"
    save_darknet_weights(model, path)
    return model, path


def test_saved_weights_are_loaded_bit_by_bit(saved: tuple[Darknet, Path]) -> None:
    model, path = saved
    other = small_network()
    other.load_state_dict(darknet_state_dict(other, path))
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):  # not in Darknet's format
            assert torch.equal(other.state_dict()[name], tensor), name


def test_published_weights_are_saved_as_they_were_loaded(tmp_path: Path) -> None:
    path = pretrained_weights("yolov3-tiny")
    model = yolov3_tiny()
    model.load_state_dict(darknet_state_dict(model, path))
    save_darknet_weights(model, tmp_path / "again.weights", seen=32_013_312)
    assert (tmp_path / "again.weights").read_bytes() == path.read_bytes()


def test_convolution_is_biases_scales_means_variances_filters(tmp_path: Path) -> None:
    path = tmp_path / "counted.weights"
    path.write_bytes(struct.pack("<3iq80f", 0, 2, 0, 0, *range(80)))
    model = small_network()
    model.load_state_dict(darknet_state_dict(model, path))
    state = {name: tensor.flatten().tolist() for name, tensor in model.state_dict().items()}
    assert state["layers.0.norm.bias"] == [0, 1]
    assert state["layers.0.norm.weight"] == [2, 3]
    assert state["layers.0.norm.running_mean"] == [4, 5]
    assert state["layers.0.norm.running_var"] == [6, 7]
    assert state["layers.0.conv.weight"] == list(range(8, 62))
    assert state["layers.2.conv.bias"] == list(range(62, 68))
    assert state["layers.2.conv.weight"] == list(range(68, 80))


def test_header_before_version_0_2_has_a_32_bit_counter(saved: tuple[Darknet, Path], tmp_path: Path) -> None:
    model, path = saved
    old = tmp_path / "old.weights"
    old.write_bytes(struct.pack("<4i", 0, 1, 0, 77) + path.read_bytes()[20:])
    other = small_network()
    other.load_state_dict(darknet_state_dict(other, old))
    assert torch.equal(other.state_dict()["layers.2.conv.weight"], model.state_dict()["layers.2.conv.weight"])


def test_meta_model_is_loaded_from_the_mapped_file(saved: tuple[Darknet, Path]) -> None:
    model, path = saved
    with torch.device("meta"):
        empty = small_network()
    empty.load_state_dict(darknet_state_dict(empty, path), assign=True)
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(empty.eval()(images)[0], model(images)[0])


def test_writing_to_the_state_does_not_change_the_file(saved: tuple[Darknet, Path]) -> None:
    _, path = saved
    before = path.read_bytes()
    for tensor in darknet_state_dict(small_network(), path).values():
        tensor.zero_()
    assert path.read_bytes() == before


def test_channels_last_weights_are_saved_in_darknets_order(saved: tuple[Darknet, Path], tmp_path: Path) -> None:
    model, path = saved
    save_darknet_weights(model.to(memory_format=torch.channels_last), tmp_path / "last.weights")
    assert (tmp_path / "last.weights").read_bytes() == path.read_bytes()


def test_failed_save_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        save_darknet_weights(small_network(), tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# Errors -------------------------------------------------------------------------------------------------------------


def test_truncated_file_names_the_layer_and_both_sizes(saved: tuple[Darknet, Path]) -> None:
    _, path = saved
    data = path.read_bytes()
    assert len(data) == SMALL_BYTES
    model = small_network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with raises_error(UsageError, "NotDarknet" if length < 20 else "DarknetTruncated") as caught:
            model.load_state_dict(darknet_state_dict(model, path))
        fields: dict[str, object] = {"path": str(path)}
        if length >= 20:
            layer = 2 if length >= LAYER_2_BYTES else 0
            fields |= {"layer": layer, "expected_bytes": SMALL_BYTES, "actual_bytes": length}
        assert caught.value.fields == fields
        assert str(caught.value).startswith(f"{path} ")
        assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("more", [1, 4, 4000])
def test_trailing_bytes_are_refused(saved: tuple[Darknet, Path], more: int) -> None:
    _, path = saved
    with path.open("ab") as file:
        file.write(bytes(more))
    with raises_error(UsageError, "DarknetTrailing", match="made for another network") as caught:
        darknet_state_dict(small_network(), path)
    assert caught.value.fields["expected_bytes"] == SMALL_BYTES
    assert caught.value.fields["actual_bytes"] == SMALL_BYTES + more


def test_weights_of_a_smaller_network_are_refused() -> None:
    path = pretrained_weights("yolov3-tiny")
    with torch.device("meta"):
        full = yolov3()
    with raises_error(UsageError, "DarknetTruncated", match="made for another network") as caught:
        darknet_state_dict(full, path)
    assert caught.value.fields["expected_bytes"] == 248_007_048


OTHER_FILES = {
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "safetensors": struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}      ' + bytes(4),
    "a zip": b"PK\x03\x04" + bytes(60),
    "empty": b"",
    "absent": None,
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_are_not_darknet(tmp_path: Path, kind: str) -> None:
    if (data := OTHER_FILES[kind]) is not None:
        (tmp_path / kind).write_bytes(data)
    with raises_error(UsageError, "NotDarknet", match=f"{kind} is not a Darknet weights file") as caught:
        header_bytes(tmp_path / kind)
    assert caught.value.key == "pipeline.weights"
