"""Darknet's layers, and networks built of them."""

from __future__ import annotations

import numpy as np
import torch

from stages.models.darknet_layers import Convolutional, Darknet, LayerSpec, MaxPool, RouteLayer, Shortcut, Yolo
from tests.support.environment.darknet_reference import init_stable_weights


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
