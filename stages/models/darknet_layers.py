"""Darknet's layers, and a network of them: one module for each layer, numbered as Darknet numbers them.

Letters in shapes: B pictures in a batch, C channels, H height, W width, A anchors of one detection layer, K classes.

Every layer is a leaf for `torch.fx` (`fx_leaf`): a traced network has exactly one node for each Darknet layer, so that
"cut k" is the cut after the first k of them, the same k as in a .cfg file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Darknet divides by sqrt(variance) + 1e-6 on a CPU and by sqrt(variance + 1e-5) on a GPU; OpenCV by
# sqrt(variance + 1e-6). They agree to 1e-3 where it matters: no trained variance is that small.
NORM_EPSILON = 1e-6
NORM_MOMENTUM = 0.01  # Darknet keeps 0.99 of its rolling mean and variance a step
LEAKY_SLOPE = 0.1
INPUT_INDEX = -1  # the index of the network's input, as the source of a layer

Anchors = tuple[tuple[float, float], ...]  # (width, height) in pixels of the network's input


class Convolutional(nn.Module):
    """Convolution, then batch normalisation and leaky ReLU; `linear` is a convolution with a bias and nothing more."""

    fx_leaf = True

    def __init__(self, channels_in: int, channels_out: int, size: int, stride: int = 1, linear: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=linear)
        self.norm = None if linear else nn.BatchNorm2d(channels_out, eps=NORM_EPSILON, momentum=NORM_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H / stride, W / stride)"""
        x = self.conv(x)
        if self.norm is None:
            return x
        return F.leaky_relu(self.norm(x), LEAKY_SLOPE, inplace=True)


class MaxPool(nn.Module):
    """The largest of each window; windows that reach past the right and lower edges see only what is inside."""

    fx_leaf = True

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.size = size
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))"""
        if self.stride == 1:  # ceil_mode adds no window then; Darknet's padding is all to the right and below
            x = F.pad(x, (0, self.size - 1, 0, self.size - 1), value=float("-inf"))
        return F.max_pool2d(x, self.size, self.stride, ceil_mode=True)


class Upsample(nn.Module):
    """Each pixel becomes a square of equal pixels."""

    fx_leaf = True

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H * stride, W * stride)"""
        return F.interpolate(x, scale_factor=float(self.stride), mode="nearest")


class RouteLayer(nn.Module):
    """The outputs of earlier layers, one behind the other along the channels."""

    fx_leaf = True

    def forward(self, *sources: Tensor) -> Tensor:
        """(B, C_i, H, W) each -> (B, sum of C_i, H, W)"""
        return sources[0] if len(sources) == 1 else torch.cat(sources, dim=1)


class Shortcut(nn.Module):
    """The sum of two layers of one shape."""

    fx_leaf = True

    def forward(self, x: Tensor, earlier: Tensor) -> Tensor:
        """(B, C, H, W) twice -> (B, C, H, W)"""
        return x + earlier


class Yolo(nn.Module):
    """A detection layer: x, y, objectness and classes through the logistic; width and height as they are."""

    fx_leaf = True

    def __init__(self, anchors: Anchors, classes: int) -> None:
        super().__init__()
        self.anchors = anchors
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        """(B, A * (5 + K), H, W) -> (B, A, 5 + K, H, W), in Darknet's order in memory"""
        batch, _, height, width = x.shape
        x = x.reshape(batch, len(self.anchors), 5 + self.classes, height, width)
        return torch.cat((x[:, :, :2].sigmoid(), x[:, :, 2:4], x[:, :, 4:].sigmoid()), dim=2)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer of a network's table; `sources` as in a .cfg file: negative from here, else from the start."""

    kind: type[nn.Module]
    sources: tuple[int, ...] = (-1,)
    filters: int = 0
    size: int = 1
    stride: int = 1
    linear: bool = False
    anchors: Anchors = ()


class Darknet(nn.Module):
    """A network of Darknet layers, made from its table.

    `sources[i]` are the indices of the layers that layer i reads; `anchors` has one entry for each detection layer, in
    the order of the outputs.
    """

    def __init__(self, table: Sequence[LayerSpec], classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.sources: list[tuple[int, ...]] = []
        channels = {INPUT_INDEX: 3}
        for index, row in enumerate(table):
            sources = tuple(source if source >= 0 else index + source for source in row.sources)
            channels_in = channels[sources[0]] if row.kind is not RouteLayer else sum(channels[s] for s in sources)
            self.layers.append(_build(row, channels_in, classes))
            self.sources.append(sources)
            channels[index] = row.filters or channels_in
        self.anchors = tuple(row.anchors for row in table if row.kind is Yolo)
        last_use = {source: index for index, sources in enumerate(self.sources) for source in sources}
        self._done = [[s for s in set(sources) if last_use[s] == i] for i, sources in enumerate(self.sources)]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Pictures (B, 3, H, W), float32, RGB, 0 to 1, H and W multiples of 32 -> what each detection layer says.

        One tensor (B, A, 5 + K, H / s, W / s) for each detection layer, in Darknet's order: s is 32, 16, then 8.
        """
        # Only what a later layer still reads: all 107 outputs of YOLOv3 at once are too much for a small device.
        held = {INPUT_INDEX: images}
        outputs = []
        for index, layer in enumerate(self.layers):
            x = layer(*(held[source] for source in self.sources[index]))
            for source in self._done[index]:
                del held[source]
            if isinstance(layer, Yolo):
                outputs.append(x)
            else:
                held[index] = x
        return tuple(outputs)


def _build(row: LayerSpec, channels_in: int, classes: int) -> nn.Module:
    if row.kind is Convolutional:
        return Convolutional(channels_in, row.filters, row.size, row.stride, row.linear)
    if row.kind is MaxPool:
        return MaxPool(row.size, row.stride)
    if row.kind is Upsample:
        return Upsample(row.stride)
    if row.kind is Yolo:
        return Yolo(row.anchors, classes)
    return row.kind()
