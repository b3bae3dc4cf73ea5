"""YOLOv3 and YOLOv3-tiny have the layers of their .cfg files and compute what OpenCV and Darknet compute."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from brokers.process.image_decode import decode_picture
from stages.models.darknet import (
    Convolutional,
    Darknet,
    MaxPool,
    RouteLayer,
    Shortcut,
    Upsample,
    Yolo,
    darknet_state_dict,
    save_darknet_weights,
)
from stages.models.image_preprocess import letterbox
from stages.models.yolo_postprocess import postprocess_detections
from stages.models.yolov3 import yolov3, yolov3_tiny
from stages.partition.partition import layer_names
from tests.support.environment.darknet_reference import (
    DarknetLibrary,
    FloatArray,
    assert_same_detections,
    darknet_file,
    init_stable_weights,
    opencv_forward,
    pretrained_weights,
    write_resized_cfg,
)

LAYER_CLASSES: dict[str, type[nn.Module]] = {
    "convolutional": Convolutional,
    "maxpool": MaxPool,
    "route": RouteLayer,
    "shortcut": Shortcut,
    "upsample": Upsample,
    "yolo": Yolo,
}
Factory = Callable[[], Darknet]


def on_meta(factory: Factory) -> Darknet:
    with torch.device("meta"):
        return factory()


def cfg_layers(cfg: Path) -> list[tuple[str, dict[str, str]]]:
    """The layers of a .cfg file: (kind, settings)."""
    sections: list[tuple[str, dict[str, str]]] = []
    for line in cfg.read_text().splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            sections.append((header[1], {}))
        elif setting := re.match(r"(\w+)\s*=\s*(.+)", line):
            sections[-1][1][setting[1]] = setting[2].strip()
    return sections[1:]  # the first is [net]


def integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


@pytest.mark.parametrize(("name", "factory"), [("yolov3", yolov3), ("yolov3-tiny", yolov3_tiny)])
def test_layers_equal_those_of_the_cfg_file(name: str, factory: Factory) -> None:
    model = on_meta(factory)
    layers = cfg_layers(darknet_file(f"cfg/{name}.cfg"))
    assert len(model.layers) == len(layers)
    for index, (layer, (kind, settings)) in enumerate(zip(model.layers, layers, strict=True)):
        assert type(layer) is LAYER_CLASSES[kind], index
        sources = [-1]
        if kind == "route":
            sources = integers(settings["layers"])
        elif kind == "shortcut":
            sources = [-1, int(settings["from"])]
        assert model.sources[index] == tuple(s if s >= 0 else index + s for s in sources), index
        if isinstance(layer, Convolutional):
            size = int(settings["size"])
            conv = layer.conv
            assert conv.out_channels == int(settings["filters"]), index
            assert conv.kernel_size == (size, size), index
            assert conv.stride == (int(settings["stride"]),) * 2, index
            assert (layer.norm is not None) == (settings.get("batch_normalize") == "1"), index
            assert (layer.norm is not None) == (settings["activation"] == "leaky"), index
        elif isinstance(layer, MaxPool):
            assert (layer.size, layer.stride) == (int(settings["size"]), int(settings["stride"])), index
        elif isinstance(layer, Upsample):
            assert layer.stride == int(settings["stride"]), index
        elif isinstance(layer, Yolo):
            flat = integers(settings["anchors"])
            pairs = list(zip(flat[::2], flat[1::2], strict=True))
            masks = integers(settings["mask"])
            if factory is yolov3_tiny and masks == [0, 1, 2]:
                masks = [1, 2, 3]  # as the published weights were trained: see YOLOV3_TINY_ANCHORS
            assert layer.anchors == tuple(pairs[mask] for mask in masks), index


@pytest.mark.parametrize(("factory", "count", "detections"), [(yolov3, 107, 3), (yolov3_tiny, 24, 2)])
def test_trace_has_one_node_per_layer_in_darknets_numbering(factory: Factory, count: int, detections: int) -> None:
    model = on_meta(factory)
    assert layer_names(model) == tuple(f"layers.{index}" for index in range(count))
    assert sum(isinstance(layer, Yolo) for layer in model.layers) == len(model.anchors) == detections


def test_meta_model_has_no_state_elsewhere() -> None:
    model = on_meta(yolov3_tiny)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    attributes = [value for module in model.modules() for value in vars(module).values()]
    assert not any(isinstance(value, torch.Tensor) for value in attributes)


@pytest.mark.parametrize(
    ("factory", "shapes"),
    [
        (yolov3_tiny, [(2, 3, 85, 3, 2), (2, 3, 85, 6, 4)]),
        (yolov3, [(2, 3, 85, 3, 2), (2, 3, 85, 6, 4), (2, 3, 85, 12, 8)]),
    ],
)
def test_output_shapes_follow_batch_and_input_size(factory: Factory, shapes: list[tuple[int, ...]]) -> None:
    images = torch.empty(2, 3, 96, 64, device="meta")
    assert [tuple(output.shape) for output in on_meta(factory).eval()(images)] == shapes


def test_pictures_of_one_batch_are_independent() -> None:
    model = yolov3_tiny()
    init_stable_weights(model, seed=1)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        together = model(images)
        alone = [model(image[None]) for image in images]
    for layer, output in enumerate(together):
        torch.testing.assert_close(output, torch.cat([one[layer] for one in alone]), rtol=1e-4, atol=1e-5)


def test_every_parameter_has_a_gradient() -> None:
    model = yolov3_tiny()
    init_stable_weights(model, seed=1)
    model.train()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    sum(output.square().sum() for output in model(images)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


# References ---------------------------------------------------------------------------------------------------------


def assert_same_outputs(model: Darknet, images: FloatArray, expected: list[FloatArray]) -> None:
    """Compare the inputs of the detection layers with `expected`, and their outputs with its logistic."""
    inputs: list[torch.Tensor] = []
    yolos = [layer for layer in model.layers if isinstance(layer, Yolo)]
    hooks = [yolo.register_forward_pre_hook(lambda _, x: inputs.append(x[0])) for yolo in yolos]
    with torch.inference_mode():
        outputs = model(torch.from_numpy(images))
    for hook in hooks:
        hook.remove()
    for yolo, actual, output, reference in zip(yolos, inputs, outputs, expected, strict=True):
        assert_close(actual.numpy(), reference)
        activated: FloatArray = reference.reshape(reference.shape[0], len(yolo.anchors), -1, *reference.shape[2:])
        sizes = activated[:, :, 2:4].copy()
        activated = (1 / (1 + np.exp(-activated))).astype(np.float32)
        activated[:, :, 2:4] = sizes
        assert_close(output.numpy(), activated)


def assert_close(actual: FloatArray, expected: FloatArray) -> None:
    """To 1e-3 of the layer's mean magnitude: single values pass through zero."""
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).mean())


def test_tiny_with_published_weights_equals_opencv() -> None:
    weights = pretrained_weights("yolov3-tiny")
    images = letterbox(decode_picture(darknet_file("data/dog.jpg").read_bytes()), 416, 416).numpy()
    model = yolov3_tiny().eval()
    model.load_state_dict(darknet_state_dict(model, weights))
    expected = opencv_forward(darknet_file("cfg/yolov3-tiny.cfg"), weights, images, ["conv_15", "conv_22"])
    assert_same_outputs(model, images, expected)


def test_full_yolov3_equals_opencv_and_darknet_with_our_weights_file(tmp_path: Path) -> None:
    model = yolov3()
    init_stable_weights(model, seed=8)
    weights = tmp_path / "random.weights"
    save_darknet_weights(model, weights)
    cfg = write_resized_cfg("yolov3", 96, tmp_path)
    picture = decode_picture(darknet_file("data/dog.jpg").read_bytes())
    images = letterbox(picture, 96, 96)

    expected = opencv_forward(cfg, weights, images.numpy(), ["conv_81", "conv_93", "conv_105"])
    for layer in expected:  # vanishing or exploding signals would make the comparison meaningless
        assert 0.1 < layer.std() < 10
        assert layer.std(axis=(2, 3)).min() > 1e-3, "a channel is constant"
    assert_same_outputs(model, images.numpy(), expected)

    darknet = DarknetLibrary()
    detections = darknet.detect(darknet.load_network(cfg, weights), picture, 0.6, 0.45)
    weights.unlink()  # 248 MB, which pytest would keep
    assert len(detections) > 50  # of three sizes and many classes
    with torch.inference_mode():
        outputs = model(images)
    size = (picture.shape[1], picture.shape[0])
    assert_same_detections(postprocess_detections(outputs, (96, 96), size, 0.6), detections)
