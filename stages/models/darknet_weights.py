"""Darknet's `.weights` files: a header, then the numbers of each convolution, little endian, without names or shapes.

    int32 major, minor, revision; images seen (int64 from version 0.2 on, int32 before)
    for each convolution: biases, [scales, rolling means, rolling variances,] filters (C_out, C_in, height, width)

The bracketed arrays exist where the convolution is batch normalised; the biases are then those of the normalisation.
Source: Darknet's parser.c, load_weights_upto and load_convolutional_weights.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brokers.errors import UsageError
from brokers.process.files import atomic_path
from stages.models.darknet_layers import Convolutional, Darknet

VERSION_LIMIT = 1000  # Darknet's own bound of each of the three version numbers
FLOAT = np.dtype("<f4")


def header_bytes(path: str | Path) -> int:
    """Return the size of the header of a weights file. Raises `UsageError` "NotDarknet"."""
    try:
        with open(path, "rb") as file:
            data = file.read(20)
    except OSError as error:
        raise _not_darknet_error(path, error.strerror) from error
    if len(data) < 16:
        raise _not_darknet_error(path, f"the header needs 16 or 20 bytes, the file has {len(data)}")
    version = struct.unpack_from("<3i", data)
    if not all(0 <= number < VERSION_LIMIT for number in version):
        raise _not_darknet_error(path, f"the first three integers are {version}, expected 0 to {VERSION_LIMIT - 1}")
    size = 20 if version[:2] >= (0, 2) else 16
    if size > len(data):
        raise _not_darknet_error(path, f"the header needs {size} bytes, the file has {len(data)}")
    return size


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


def _not_darknet_error(path: str | Path, reason: str | None) -> UsageError:
    return _weights_error("NotDarknet", path, f"is not a Darknet weights file: {reason}")


def _weights_error(code: str, path: str | Path, problem: str, **fields: int) -> UsageError:
    return UsageError(code, f"{path} {problem}", key="pipeline.weights", path=str(path), **fields)
