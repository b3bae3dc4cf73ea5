"""Darknet's layers, and networks of them: one module per layer, numbered as Darknet numbers them; and their weights.

Letters in shapes: B batch size, C channels, H height, W width, A anchors of one detection layer, K classes.

A `.weights` file has a header, then the numbers of each convolution, little endian, without names or shapes:

    int32 major, minor, revision; images seen (int64 from version 0.2 on, int32 before)
    for each convolution: biases, [scales, rolling means, rolling variances,] filters (C_out, C_in, height, width)

The bracketed arrays exist where the convolution is batch normalised; the biases are then those of the normalisation.
Source: Darknet's parser.c, load_weights_upto and load_convolutional_weights.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brokers.errors import UsageError
from brokers.process.files import atomic_path

# Darknet divides by sqrt(variance) + 1e-6 on a CPU and by sqrt(variance + 1e-5) on a GPU, OpenCV by
# sqrt(variance + 1e-6). They agree to 1e-3 for trained networks, whose variances are much larger.
NORM_EPSILON = 1e-6
NORM_MOMENTUM = 0.01  # Darknet keeps 0.99 of its rolling statistics per step
LEAKY_SLOPE = 0.1
INPUT_INDEX = -1  # the network's input, as the source of a layer

Anchors = tuple[tuple[float, float], ...]  # (width, height) in pixels of the network's input
VERSION_LIMIT = 1000  # Darknet's own bound of each of the three version numbers
FLOAT = np.dtype("<f4")


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


def header_bytes(path: str | Path) -> int:
    """Return the size of the header of a weights file. Raises `UsageError` "NotDarknet"."""
    try:
        with open(path, "rb") as file:
            data = file.read(20)
    except OSError as error:
        raise _weights_error("NotDarknet", path, f"is not a Darknet weights file: {error.strerror}") from error
    version = struct.unpack_from("<3i", data.ljust(12, b"\0"))
    size = 20 if version[:2] >= (0, 2) else 16
    if size > len(data):
        problem = f"the header needs {'16 or 20' if len(data) < 16 else size} bytes, the file has {len(data)}"
    elif not all(0 <= number < VERSION_LIMIT for number in version):
        problem = f"the first three integers are {version}, expected 0 to {VERSION_LIMIT - 1}"
    else:
        return size
    raise _weights_error("NotDarknet", path, f"is not a Darknet weights file: {problem}")


def darknet_state_dict(model: Darknet, path: str | Path) -> dict[str, Tensor]:
    """Return the file as a state dict of `model`, which may be on the meta device.

    The tensors are copy-on-write views of the mapped file: only the pages that are used are read, and the file never
    changes. Raises `UsageError` "NotDarknet", "DarknetTruncated" or "DarknetTrailing".
    """
    offset = header_bytes(path)
    _check_size(model, path, offset)
    numbers = torch.from_numpy(np.memmap(path, FLOAT, mode="c", offset=offset))
    state: dict[str, Tensor] = {}
    start = 0
    for _, name, tensor in _in_file_order(model):
        state[name] = numbers[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    for name, buffer in model.named_buffers():
        if name.endswith(".num_batches_tracked"):  # torch's counter, which Darknet does not have
            state[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
    return state


def save_darknet_weights(model: Darknet, path: str | Path, *, seen: int = 0) -> None:
    """Write `model` atomically as a weights file that Darknet can read. Raises `OSError`."""
    with atomic_path(Path(path)) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<3iq", 0, 2, 0, seen))
        for _, _, tensor in _in_file_order(model):
            tensor.detach().cpu().numpy().astype(FLOAT, copy=False).tofile(file)


def _in_file_order(model: Darknet) -> Iterator[tuple[int, str, Tensor]]:
    """Yield (layer, name in the state dict, tensor) in the order of the file."""
    for index, layer in enumerate(model.layers):
        if not isinstance(layer, Convolutional):
            continue
        prefix = f"layers.{index}"
        if layer.norm is None:
            assert layer.conv.bias is not None
            yield index, f"{prefix}.conv.bias", layer.conv.bias
        else:
            for name in ("bias", "weight", "running_mean", "running_var"):
                yield index, f"{prefix}.norm.{name}", getattr(layer.norm, name)
        yield index, f"{prefix}.conv.weight", layer.conv.weight


def _check_size(model: Darknet, path: str | Path, offset: int) -> None:
    actual_bytes = Path(path).stat().st_size
    expected_bytes = offset
    truncated_layer = None
    for layer, _, tensor in _in_file_order(model):
        expected_bytes += tensor.numel() * FLOAT.itemsize
        if expected_bytes > actual_bytes and truncated_layer is None:
            truncated_layer = layer
    sizes = {"expected_bytes": expected_bytes, "actual_bytes": actual_bytes}
    comparison = f"the network needs {expected_bytes} bytes, the file has {actual_bytes}"
    if truncated_layer is not None:
        problem = f"ends inside layer {truncated_layer}: {comparison}: truncated, or made for another network"
        raise _weights_error("DarknetTruncated", path, problem, layer=truncated_layer, **sizes)
    if actual_bytes > expected_bytes:
        problem = f"continues after the last layer: {comparison}: made for another network"
        raise _weights_error("DarknetTrailing", path, problem, **sizes)


def _weights_error(code: str, path: str | Path, problem: str, **fields: int) -> UsageError:
    return UsageError(code, f"{path} {problem}", key="pipeline.weights", path=str(path), **fields)
