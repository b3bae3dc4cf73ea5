"""YOLOv3 and YOLOv3-tiny compute what Darknet's networks compute, layer by layer in Darknet's numbering."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from stages.models.darknet_layers import (
    Convolutional,
    Darknet,
    LayerSpec,
    MaxPool,
    RouteLayer,
    Shortcut,
    Upsample,
    Yolo,
)
from stages.models.darknet_weights import load_darknet_weights, save_darknet_weights
from stages.models.image_preprocess import decode_image, letterbox
from stages.models.yolov3 import yolov3, yolov3_tiny
from tests.support.environment.darknet_reference import (
    FloatArray,
    darknet_file,
    init_stable_weights,
    opencv_forward,
    pretrained_weights,
    write_resized_cfg,
)

KINDS = {
    "convolutional": Convolutional,
    "maxpool": MaxPool,
    "route": RouteLayer,
    "shortcut": Shortcut,
    "upsample": Upsample,
    "yolo": Yolo,
}
NETWORKS = [("yolov3", yolov3), ("yolov3-tiny", yolov3_tiny)]
Make = Callable[[], Darknet]


class LayerTracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return bool(getattr(m, "fx_leaf", False)) or super().is_leaf_module(m, module_qualified_name)


def on_meta(make: Make) -> Darknet:
    with torch.device("meta"):
        return make()


def sections(cfg: Path) -> list[tuple[str, dict[str, str]]]:
    """The layers of a .cfg file: (kind, settings)."""
    found: list[tuple[str, dict[str, str]]] = []
    for line in cfg.read_text().splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            found.append((header[1], {}))
        elif setting := re.match(r"(\w+)\s*=\s*(.+)", line):
            found[-1][1][setting[1]] = setting[2].strip()
    return found[1:]  # the first is [net]


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


@pytest.mark.parametrize(("name", "make"), NETWORKS)
def test_each_layer_is_what_the_cfg_file_says(name: str, make: Make) -> None:
    model = on_meta(make)
    layers = sections(darknet_file(f"cfg/{name}.cfg"))
    assert len(model.layers) == len(layers)
    for index, (layer, (kind, setting)) in enumerate(zip(model.layers, layers, strict=True)):
        assert type(layer) is KINDS[kind], index
        sources = [-1]
        if kind == "route":
            sources = numbers(setting["layers"])
        elif kind == "shortcut":
            sources = [-1, int(setting["from"])]
        assert model.sources[index] == tuple(s if s >= 0 else index + s for s in sources), index
        if isinstance(layer, Convolutional):
            size = int(setting["size"])
            conv = layer.conv
            assert conv.out_channels == int(setting["filters"]), index
            assert conv.kernel_size == (size, size), index
            assert conv.stride == (int(setting["stride"]),) * 2, index
            assert (layer.norm is not None) == (setting.get("batch_normalize") == "1"), index
            assert (layer.norm is not None) == (setting["activation"] == "leaky"), index
        elif isinstance(layer, MaxPool):
            assert (layer.size, layer.stride) == (int(setting["size"]), int(setting["stride"])), index
        elif isinstance(layer, Upsample):
            assert layer.stride == int(setting["stride"]), index
        elif isinstance(layer, Yolo):
            flat = numbers(setting["anchors"])
            pairs = list(zip(flat[::2], flat[1::2], strict=True))
            masks = numbers(setting["mask"])
            if make is yolov3_tiny and masks == [0, 1, 2]:
                masks = [1, 2, 3]  # as the published weights were trained: see YOLOV3_TINY_ANCHORS
            assert layer.anchors == tuple(pairs[mask] for mask in masks), index


@pytest.mark.parametrize(("make", "count", "detections"), [(yolov3, 107, 3), (yolov3_tiny, 24, 2)])
def test_a_trace_has_one_node_for_each_layer_in_darknets_numbering(make: Make, count: int, detections: int) -> None:
    model = on_meta(make)
    nodes = [node for node in LayerTracer().trace(model).nodes if node.op not in ("placeholder", "output")]
    assert [node.target for node in nodes] == [f"layers.{index}" for index in range(count)]
    assert sum(isinstance(layer, Yolo) for layer in model.layers) == len(model.anchors) == detections


def test_a_model_on_the_meta_device_has_no_state_elsewhere() -> None:
    model = on_meta(yolov3_tiny)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    others = [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    assert others == []


@pytest.mark.parametrize(("make", "shapes"), [
    (yolov3_tiny, [(2, 3, 85, 3, 2), (2, 3, 85, 6, 4)]),
    (yolov3, [(2, 3, 85, 3, 2), (2, 3, 85, 6, 4), (2, 3, 85, 12, 8)]),
])  # fmt: skip
def test_any_batch_and_any_multiple_of_32_gives_one_output_for_each_detection_layer(
    make: Make, shapes: list[tuple[int, ...]]
) -> None:
    images = torch.empty(2, 3, 96, 64, device="meta")
    assert [tuple(output.shape) for output in on_meta(make).eval()(images)] == shapes


def test_pictures_in_one_batch_do_not_touch_each_other() -> None:
    model = yolov3_tiny()
    init_stable_weights(model, seed=1)
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        together = model(images)
        alone = [model(image[None]) for image in images]
    for layer, output in enumerate(together):
        torch.testing.assert_close(output, torch.cat([one[layer] for one in alone]), rtol=1e-4, atol=1e-5)


def test_every_parameter_learns() -> None:
    model = yolov3_tiny()
    init_stable_weights(model, seed=1)
    model.train()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    sum(output.square().sum() for output in model(images)).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_outputs_pass_the_logistic_except_width_and_height() -> None:
    x = torch.randn(2, 3 * 7, 4, 5, generator=torch.Generator().manual_seed(3)) * 3
    y = Yolo(((1, 1), (2, 2), (3, 3)), classes=2)(x)
    assert y.shape == (2, 3, 7, 4, 5)
    raw = x.numpy().reshape(2, 3, 7, 4, 5)
    expected = 1 / (1 + np.exp(-raw))
    expected[:, :, 2:4] = raw[:, :, 2:4]
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5)


def test_the_window_of_a_pool_that_moves_one_pixel_ends_at_the_edge() -> None:
    x = torch.tensor([[[[-5.0, -1.0], [-3.0, -4.0]]]])
    assert MaxPool(2, 1)(x).tolist() == [[[[-1.0, -1.0], [-3.0, -4.0]]]]


def test_the_last_windows_of_a_pool_over_an_odd_side_are_cut_off_by_the_edge() -> None:
    x = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert MaxPool(2, 2)(x).tolist() == [[[[4.0, 5.0], [7.0, 8.0]]]]


def test_a_layer_that_several_layers_read_is_held_until_the_last_of_them() -> None:
    rows = [
        LayerSpec(Convolutional, filters=4),
        LayerSpec(Convolutional, filters=4),
        LayerSpec(Shortcut, (-1, 0)),
        LayerSpec(RouteLayer, (0, 2)),
    ]
    model = Darknet(
        [*rows, LayerSpec(Convolutional, filters=6, linear=True), LayerSpec(Yolo, anchors=((1, 1),))], classes=1
    )
    init_stable_weights(model, seed=4)
    images = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        first = model.layers[0](images)
        routed = torch.cat((first, model.layers[1](first) + first), dim=1)
        expected = model.layers[5](model.layers[4](routed))
        assert torch.equal(model(images)[0], expected)


def assert_same_outputs(model: Darknet, blob: FloatArray, raw: list[FloatArray]) -> None:
    """`raw` is what the reference says in front of each detection layer; the logistic of it is compared as well."""
    inputs: list[torch.Tensor] = []
    yolos = [layer for layer in model.layers if isinstance(layer, Yolo)]
    hooks = [yolo.register_forward_pre_hook(lambda _, x: inputs.append(x[0])) for yolo in yolos]
    with torch.inference_mode():
        outputs = model(torch.from_numpy(blob))
    for hook in hooks:
        hook.remove()
    for yolo, ours, output, theirs in zip(yolos, inputs, outputs, raw, strict=True):
        assert_close(ours.numpy(), theirs)
        activated: FloatArray = theirs.reshape(theirs.shape[0], len(yolo.anchors), -1, *theirs.shape[2:])
        sizes = activated[:, :, 2:4].copy()
        activated = (1 / (1 + np.exp(-activated))).astype(np.float32)
        activated[:, :, 2:4] = sizes
        assert_close(output.numpy(), activated)


def assert_close(ours: FloatArray, theirs: FloatArray) -> None:
    """To 1e-3 of the typical number of the layer: single ones pass through zero."""
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).mean())


def test_tiny_with_its_trained_weights_agrees_with_opencv() -> None:
    weights = pretrained_weights("yolov3-tiny")
    blob = letterbox(decode_image(darknet_file("data/dog.jpg").read_bytes()), 416, 416).numpy()
    model = yolov3_tiny().eval()
    load_darknet_weights(model, weights)
    raw = opencv_forward(darknet_file("cfg/yolov3-tiny.cfg"), weights, blob, ["conv_15", "conv_22"])
    assert_same_outputs(model, blob, raw)


@pytest.fixture
def random_yolov3(tmp_path: Path) -> Iterator[tuple[Darknet, Path]]:
    model = yolov3()
    init_stable_weights(model, seed=6)
    path = tmp_path / "random.weights"
    save_darknet_weights(model, path)
    yield model, path
    path.unlink()  # 248 MB, which pytest would keep


def test_full_yolov3_agrees_with_opencv_that_reads_the_weights_we_wrote(
    random_yolov3: tuple[Darknet, Path], tmp_path: Path
) -> None:
    model, weights = random_yolov3
    blob = letterbox(decode_image(darknet_file("data/dog.jpg").read_bytes()), 96, 96).numpy()
    raw = opencv_forward(write_resized_cfg("yolov3", 96, tmp_path), weights, blob, ["conv_81", "conv_93", "conv_105"])
    for layer in raw:  # neither dead nor exploded, or agreement would mean nothing
        assert 0.1 < layer.std() < 10
        assert layer.std(axis=(2, 3)).min() > 1e-3, "a channel is the same for every place in the picture"
    assert_same_outputs(model, blob, raw)
