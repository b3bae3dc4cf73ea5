"""Darknet's layers, and networks of them: one module per layer, numbered as Darknet numbers them.

Letters in shapes: B batch size, C channels, H height, W width, A anchors of one detection layer, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Darknet divides by sqrt(variance) + 1e-6 on a CPU and by sqrt(variance + 1e-5) on a GPU, OpenCV by
# sqrt(variance + 1e-6). They agree to 1e-3 for trained networks, whose variances are much larger.
NORM_EPSILON = 1e-6
NORM_MOMENTUM = 0.01  # Darknet keeps 0.99 of its rolling statistics per step
LEAKY_SLOPE = 0.1
INPUT_INDEX = -1  # the network's input, as the source of a layer

Anchors = tuple[tuple[float, float], ...]  # (width, height) in pixels of the network's input


class DarknetLayer(nn.Module):
    """One layer of a .cfg file: a leaf for torch.fx, so that cut k comes after the first k layers of that file."""

    fx_leaf = True


class Convolutional(DarknetLayer):
    """Convolution, batch normalisation and leaky ReLU; or, if `linear`, a convolution with bias only."""

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


class MaxPool(DarknetLayer):
    """Maximum pooling; windows that reach past the right and lower edges are clipped."""

    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.size = size
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, ceil(H / stride), ceil(W / stride))"""
        if self.stride == 1:  # where ceil_mode adds no window: Darknet pads only on the right and below
            x = F.pad(x, (0, self.size - 1, 0, self.size - 1), value=float("-inf"))
        return F.max_pool2d(x, self.size, self.stride, ceil_mode=True)


class Upsample(DarknetLayer):
    """Nearest-neighbour upsampling by an integer factor."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H * stride, W * stride)"""
        return F.interpolate(x, scale_factor=float(self.stride), mode="nearest")


class RouteLayer(DarknetLayer):
    """Concatenation of the outputs of earlier layers along the channels."""

    def forward(self, *sources: Tensor) -> Tensor:
        """(B, C_i, H, W) each -> (B, sum of C_i, H, W)"""
        return sources[0] if len(sources) == 1 else torch.cat(sources, dim=1)


class Shortcut(DarknetLayer):
    """Sum of two layers of equal shape."""

    def forward(self, x: Tensor, earlier: Tensor) -> Tensor:
        """(B, C, H, W) twice -> (B, C, H, W)"""
        return x + earlier


class Yolo(DarknetLayer):
    """Detection layer: the logistic function of x, y, objectness and classes; width and height pass unchanged."""

    def __init__(self, anchors: Anchors, classes: int) -> None:
        super().__init__()
        self.anchors = anchors
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        """(B, A * (5 + K), H, W) -> (B, A, 5 + K, H, W), in Darknet's memory order"""
        batch, _, height, width = x.shape
        x = x.reshape(batch, len(self.anchors), 5 + self.classes, height, width)
        return torch.cat((x[:, :, :2].sigmoid(), x[:, :, 2:4], x[:, :, 4:].sigmoid()), dim=2)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer of a network; `sources` as in a .cfg file: negative relative to this layer, else absolute."""

    kind: type[nn.Module]
    sources: tuple[int, ...] = (-1,)
    filters: int = 0
    size: int = 1
    stride: int = 1
    linear: bool = False
    anchors: Anchors = ()

    def build(self, channels_in: int, classes: int) -> nn.Module:
        if self.kind is Convolutional:
            return Convolutional(channels_in, self.filters, self.size, self.stride, self.linear)
        if self.kind is MaxPool:
            return MaxPool(self.size, self.stride)
        if self.kind is Upsample:
            return Upsample(self.stride)
        if self.kind is Yolo:
            return Yolo(self.anchors, classes)
        return self.kind()


class Darknet(nn.Module):
    """A network of Darknet layers.

    `sources[i]` are the indices of the layers that layer i reads; `anchors` has one entry per detection layer, in the
    order of the outputs.
    """

    def __init__(self, table: Sequence[LayerSpec], classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.sources: list[tuple[int, ...]] = []
        channels = {INPUT_INDEX: 3}
        for index, row in enumerate(table):
            sources = tuple(source if source >= 0 else index + source for source in row.sources)
            channels_in = channels[sources[0]] if row.kind is not RouteLayer else sum(channels[s] for s in sources)
            self.layers.append(row.build(channels_in, classes))
            self.sources.append(sources)
            channels[index] = row.filters or channels_in
        self.anchors = tuple(row.anchors for row in table if row.kind is Yolo)
        last_use = {source: index for index, sources in enumerate(self.sources) for source in sources}
        self._last_reads = [[s for s in set(sources) if last_use[s] == i] for i, sources in enumerate(self.sources)]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) -> one (B, A, 5 + K, H / s, W / s) per detection layer, for s = 32, 16, 8.

        Images are float32 RGB in 0..1; H and W are multiples of 32.
        """
        # Outputs that no later layer reads are freed: all 107 of YOLOv3 do not fit into a small device.
        saved = {INPUT_INDEX: images}
        outputs = []
        for index, layer in enumerate(self.layers):
            x = layer(*(saved[source] for source in self.sources[index]))
            for source in self._last_reads[index]:
                del saved[source]
            if isinstance(layer, Yolo):
                outputs.append(x)
            else:
                saved[index] = x
        return tuple(outputs)
