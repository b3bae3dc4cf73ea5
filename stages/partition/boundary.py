"""Values at the boundaries of parts: flattened into named tensors where they leave, rebuilt where they arrive."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from brokers.errors import UsageError, WireError


def unpack_value(tensors: Mapping[str, Tensor], name: str, copy: bool) -> Any:
    """Return the value `name`: one tensor, or a tuple rebuilt from `name[0]`, `name[1]`, ...

    Raises `WireError` "TensorMissing".
    """
    if name in tensors:
        return tensors[name].clone() if copy else tensors[name]
    items: list[Any] = []
    while any(key == (item := f"{name}[{len(items)}]") or key.startswith(f"{item}[") for key in tensors):
        items.append(unpack_value(tensors, item, copy))
    if not items:
        actual = ", ".join(map(repr, tensors)) or "none"
        message = f"missing tensor {name!r}: the message has {actual}"
        raise WireError("TensorMissing", message, name=name, actual=tuple(tensors))
    return tuple(items)


def value_name(tensor_name: str) -> str:
    """Return the name of the value that a tensor belongs to: "chunk" for "chunk[0]"."""
    return tensor_name.partition("[")[0]


def pack_values(names: tuple[str, ...], *values: Any) -> dict[str, Tensor]:
    """Flatten the outputs of a part to named tensors. Raises `UsageError` "NonTensorValue"."""
    return {key: tensor for name, value in zip(names, values, strict=True) for key, tensor in _flatten(name, value)}


def name_results(result: Any) -> dict[str, Any]:
    """Name the results of a network: `output` for one, `0`, `1`, ... for a tuple, the keys of a dict; omit None."""
    if isinstance(result, tuple | list):
        result = dict(enumerate(result))
    if not isinstance(result, Mapping):
        result = {"output": result}
    return {str(key): value for key, value in result.items() if value is not None}


def pack_result(result: Any) -> dict[str, Tensor]:
    """Flatten the result of a network to named tensors, as `name_results` names them."""
    values = name_results(result)
    return pack_values(tuple(values), *values.values())


def make_shape_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor without data that has the shape and dtype of another, with a last dimension of 0 added."""
    return tensor.new_empty((*tensor.shape, 0))


def expand_shape_tensor(shape_tensor: Tensor) -> Tensor:
    """Return a tensor of the shape, dtype and device that `make_shape_tensor` encoded; it stores one element."""
    return shape_tensor.new_zeros(()).expand(shape_tensor.shape[:-1])


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        items = list(value)
        while items and items[-1] is None:  # attention without weights returns (output, None)
            items.pop()
        for index, item in enumerate(items):
            yield from _flatten(f"{name}[{index}]", item)
    else:
        kind = type(value).__name__
        message = f"{name!r} is of type {kind}, only tensors and tuples of tensors can cross a cut: cut elsewhere"
        raise UsageError("NonTensorValue", message, key="pipeline.cuts", name=name, kind=kind)
