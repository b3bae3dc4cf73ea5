"""Names of the tensors of a value: what crosses a cut, and what a network returns, as named tensors.

    a tensor returned by a network        output
    a tuple or list                       0, 1, ...
    a dict, a dataclass                   its keys, its fields
    items of these, at any depth          hidden[0], hidden[1], boxes.scores

None is omitted. A number becomes a tensor without dimensions.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx

from brokers.errors import UsageError, WireError


def name_results(result: Any) -> dict[str, Any]:
    """Name the results of a network, which are tensors, numbers, or values of a graph that is being traced."""
    items = _items(result)
    values = list(_flatten("output", result) if items is None else _flatten_items("", items))
    named = dict(values)
    for name, value in values:
        if named[name] is not value:
            message = f"the network returns two values that are both named {name!r}: rename a key"
            raise UsageError("NonTensorValue", message, key="pipeline.model", name=name)
        kind = type(value)
        if not issubclass(kind, fx.Proxy | Tensor) and kind not in (bool, int, float):
            message = (
                f"the network returns {name!r} of type {kind.__name__}: return tensors, numbers and collections of them"
            )
            raise UsageError("NonTensorValue", message, key="pipeline.model", name=name, kind=kind.__name__)
    return named


def pack_values(names: tuple[str, ...], *values: Any) -> dict[str, Tensor]:
    """Flatten tensors, and tuples and lists of them, to named tensors. Raises `UsageError` "NonTensorValue"."""
    return {
        key: _to_tensor(key, item)
        for name, value in zip(names, values, strict=True)
        for key, item in _flatten_sequence(name, value)
    }


def pack_result(result: Any) -> dict[str, Tensor]:
    """Flatten the result of a network to named tensors, as `name_results` names them."""
    values = name_results(result)
    return pack_values(tuple(values), *values.values())


def pack_output(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Flatten the values of `name_results` once they are known: a layer may return a collection."""
    return pack_result(values["output"] if values.keys() == {"output"} else values)


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


def _items(value: Any) -> list[tuple[str, Any]] | None:
    """Return the items of a collection with their names; None for a single value."""
    kind = type(value)  # not isinstance: a value that is being traced claims the class of its example
    if issubclass(kind, fx.Proxy):
        return None
    if issubclass(kind, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if issubclass(kind, tuple | list) and not issubclass(kind, torch.Size):
        return [(str(index), item) for index, item in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(each.name, getattr(value, each.name)) for each in fields(value)]
    return None


def _flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if value is None:
        return
    items = _items(value)
    if items is None:
        yield name, value
    else:
        yield from _flatten_items(name, items, is_sequence=issubclass(type(value), tuple | list))


def _flatten_items(name: str, items: list[tuple[str, Any]], *, is_sequence: bool = False) -> Iterator[tuple[str, Any]]:
    for key, item in items:
        path = f"{name}[{key}]" if is_sequence else f"{name}.{key}"
        yield from _flatten(path if name else key, item)


def _flatten_sequence(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Flatten what `unpack_value` can rebuild: tensors, and tuples of them at any depth."""
    if not issubclass(type(value), tuple | list) or issubclass(type(value), torch.Size):
        yield from () if value is None else ((name, value),)
        return
    for index, item in enumerate(value):
        yield from _flatten_sequence(f"{name}[{index}]", item)


def _to_tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if type(value) in (bool, int):
        return torch.tensor(value)
    if type(value) is float:
        return torch.tensor(value, dtype=torch.float64)
    kind = type(value).__name__
    message = f"{name!r} is of type {kind}, only tensors, numbers and tuples of them can cross a cut: cut elsewhere"
    raise UsageError("NonTensorValue", message, key="pipeline.cuts", name=name, kind=kind)
