"""What a part does at its ends: values become named tensors as they leave, and values again where they arrive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from stages.errors import NonTensorValue, TensorMissing


def unpack_value(tensors: Mapping[str, Tensor], name: str, copy: bool) -> Any:
    """The value that came under `name`, in one tensor or in the items `name[0]`, `name[1]`, ... of a tuple."""
    if name in tensors:
        return tensors[name].clone() if copy else tensors[name]
    items: list[Any] = []
    while any(key == (item := f"{name}[{len(items)}]") or key.startswith(f"{item}[") for key in tensors):
        items.append(unpack_value(tensors, item, copy))
    if not items:
        raise TensorMissing(name, tuple(tensors))
    return tuple(items)


def value_name(name: str) -> str:
    """The value that comes in a tensor of this name, whole or an item of it."""
    return name.partition("[")[0]


def pack_values(names: tuple[str, ...], *values: Any) -> dict[str, Tensor]:
    """The values that leave a part, as tensors with names."""
    return {key: tensor for name, value in zip(names, values, strict=True) for key, tensor in _items(name, value)}


def pack_result(result: Any) -> dict[str, Tensor]:
    """What the last part gives: `output` for one tensor, `0`, `1`, ... for a tuple, its keys for a dict; no None."""
    if isinstance(result, tuple | list):
        result = dict(enumerate(result))
    if not isinstance(result, Mapping):
        result = {"output": result}
    there = {str(key): value for key, value in result.items() if value is not None}
    return pack_values(tuple(there), *there.values())


def make_shape_tensor(tensor: Tensor) -> Tensor:
    """A tensor of no bytes with the shape and dtype of another, and a dimension of 0 behind; `expand_shape_tensor` undoes it."""
    return tensor.new_empty((*tensor.shape, 0))


def expand_shape_tensor(hollow: Tensor) -> Tensor:
    """A tensor that can be asked for its shape, dtype and device, and holds one number for all."""
    return hollow.new_zeros(()).expand(hollow.shape[:-1])


def _items(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        items = list(value)
        while items and items[-1] is None:  # attention gives (out, None): nothing reads the None
            items.pop()
        for index, item in enumerate(items):
            yield from _items(f"{name}[{index}]", item)
    else:
        raise NonTensorValue(name, type(value).__name__)
