"""Darknet's `.weights` files: a header, then the numbers of each convolution, little endian, with no names or shapes.

    int32 major, minor, revision; images seen (int64 from version 0.2 on, int32 before)
    for each convolution: biases, [scales, rolling means, rolling variances,] filters (C_out, C_in, height, width)

The bracketed arrays are there where the convolution is batch normalised; biases are then those of the normalisation.
Source: Darknet's parser.c, load_weights_upto and load_convolutional_weights.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brokers.errors import BadFile
from stages.errors import BadWeights, DarknetTrailing, DarknetTruncated, NotDarknet
from stages.models.darknet_layers import Convolutional, Darknet

VERSION_LIMIT = 1000  # Darknet's own bound: at 1000 and over the first bytes are no version of this format
FLOAT = np.dtype("<f4")


@dataclass(frozen=True, slots=True)
class DarknetHeader:
    """What stands before the numbers: the version of the format, and how many pictures the training saw."""

    major: int = 0
    minor: int = 2
    revision: int = 0
    seen: int = 0

    @property
    def size_bytes(self) -> int:
        return struct.calcsize(self._format)

    def encode(self) -> bytes:
        return struct.pack(self._format, self.major, self.minor, self.revision, self.seen)

    @property
    def _format(self) -> str:
        return "<3iq" if self.major * 10 + self.minor >= 2 else "<3ii"


def read_header(path: str | Path) -> DarknetHeader:
    """Read the header of a weights file; raise `NotDarknet` for a file that has none."""
    try:
        with open(path, "rb") as file:
            head = file.read(20)
    except OSError as problem:
        raise BadWeights(str(path), f"cannot be read: {problem.strerror}") from problem
    if len(head) < 16:
        raise NotDarknet(str(path), f"its header needs 16 or 20 bytes, it has {len(head)}")
    major, minor, revision = struct.unpack_from("<3i", head)
    if not all(0 <= number < VERSION_LIMIT for number in (major, minor, revision)):
        raise NotDarknet(
            str(path), f"its first numbers are {major}, {minor}, {revision}, expected 0 to {VERSION_LIMIT - 1}"
        )
    if DarknetHeader(major, minor).size_bytes > len(head):
        raise NotDarknet(str(path), f"its header needs 20 bytes, it has {len(head)}")
    (seen,) = struct.unpack_from("<q" if DarknetHeader(major, minor).size_bytes == 20 else "<i", head, 12)
    return DarknetHeader(major, minor, revision, seen)


def darknet_state_dict(model: Darknet, path: str | Path) -> dict[str, Tensor]:
    """The file as a state dict for `model`, which may be on the meta device: views of the mapped file.

    Nothing is read yet: of a stage that holds some of the layers, only their pages come from the disk. The views are
    copy on write, so the file never changes. Raises `NotDarknet`, `DarknetTruncated`, `DarknetTrailing`, `BadFile`.
    """
    header = read_header(path)
    _check_size(model, path, header)
    numbers = torch.from_numpy(np.memmap(path, FLOAT, mode="c", offset=header.size_bytes))
    state: dict[str, Tensor] = {}
    start = 0
    for _, name, tensor in _in_file_order(model):
        state[name] = numbers[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    for name, buffer in model.named_buffers():
        if name.endswith(".num_batches_tracked"):  # torch's own count, which Darknet does not keep
            state[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
    return state


def load_darknet_weights(model: Darknet, path: str | Path) -> DarknetHeader:
    """Fill `model` from a weights file, whole; raises as `darknet_state_dict` does, and then leaves the model as it was."""
    header = read_header(path)
    model.load_state_dict(darknet_state_dict(model, path))
    return header


def save_darknet_weights(model: Darknet, path: str | Path, *, seen: int = 0) -> None:
    """Write `model` as a weights file that Darknet reads; the file appears whole, or not at all."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(DarknetHeader(seen=seen).encode())
            for _, _, tensor in _in_file_order(model):
                tensor.detach().cpu().numpy().astype(FLOAT, copy=False).tofile(file)
        os.replace(partial, target)
    except OSError as problem:
        raise BadFile(str(target), f"cannot be written: {problem.strerror}") from problem
    finally:
        partial.unlink(missing_ok=True)


def _in_file_order(model: Darknet) -> Iterator[tuple[int, str, Tensor]]:
    """(layer, name in the state dict, tensor) of all that a weights file holds, as they follow one another in it."""
    for index, layer in enumerate(model.layers):
        if not isinstance(layer, Convolutional):
            continue
        prefix = f"layers.{index}"
        if layer.norm is None:
            assert layer.conv.bias is not None
            yield index, f"{prefix}.conv.bias", layer.conv.bias
        else:
            norm = layer.norm
            assert norm.running_mean is not None
            assert norm.running_var is not None
            yield index, f"{prefix}.norm.bias", norm.bias
            yield index, f"{prefix}.norm.weight", norm.weight
            yield index, f"{prefix}.norm.running_mean", norm.running_mean
            yield index, f"{prefix}.norm.running_var", norm.running_var
        yield index, f"{prefix}.conv.weight", layer.conv.weight


def _check_size(model: Darknet, path: str | Path, header: DarknetHeader) -> None:
    actual_bytes = os.path.getsize(path)
    ends_bytes = [(header.size_bytes, 0)]  # where the file is after each tensor, and which layer's it is
    for index, _, tensor in _in_file_order(model):
        ends_bytes.append((ends_bytes[-1][0] + tensor.numel() * FLOAT.itemsize, index))
    expected_bytes = ends_bytes[-1][0]
    if actual_bytes < expected_bytes:
        layer = next(index for end_bytes, index in ends_bytes if end_bytes > actual_bytes)
        raise DarknetTruncated(str(path), layer, expected_bytes, actual_bytes)
    if actual_bytes > expected_bytes:
        raise DarknetTrailing(str(path), expected_bytes, actual_bytes)
