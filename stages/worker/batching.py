"""Batching of requests: grouping those that fit into one call, joining their tensors, and splitting the outputs."""

from collections.abc import Sequence
from typing import Any

from brokers.errors import SparseError

Tensors = dict[str, Any]


def group_compatible(requests: Sequence[Tensors]) -> list[list[int]]:
    """Group the indices of requests that fit into one call: same names, dtypes, and shapes except for dimension 0."""
    groups: dict[Any, list[int]] = {}
    for index, tensors in enumerate(requests):
        # Tensors without rows, or with different numbers of rows, cannot be split again: such a request stays alone.
        shapes = [getattr(value, "shape", ()) for value in tensors.values()]
        rows = {shape[0] if shape else None for shape in shapes}
        key: Any = index
        if len(rows) == 1 and None not in rows:
            key = tuple(sorted((name, str(value.dtype), tuple(value.shape[1:])) for name, value in tensors.items()))
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def join_requests(requests: Sequence[Tensors]) -> tuple[Tensors, list[int]]:
    """Concatenate the tensors of several requests along dimension 0; return them with the rows of each request."""
    if len(requests) == 1:
        return requests[0], []
    rows = [len(next(iter(tensors.values()))) for tensors in requests]
    return {name: _concatenate([tensors[name] for tensors in requests]) for name in requests[0]}, rows


def split_outputs(tensors: Tensors, rows: Sequence[int]) -> list[Tensors]:
    """Split outputs into those of each request. Raises `SparseError` "RowsDoNotMatch" if rows were added or lost."""
    if not rows:
        return [tensors]
    total = sum(rows)
    for name, value in tensors.items():
        actual = len(value) if value.ndim else 0
        if actual != total:
            message = (
                f"the executor returned {actual} rows in {name!r} for a batch of {total}: "
                "an executor whose rows depend on each other must not be batchable"
            )
            raise SparseError("RowsDoNotMatch", message, tensor=name, expected_rows=total, actual_rows=actual)
    outputs = []
    begin = 0
    for count in rows:
        outputs.append({name: value[begin : begin + count] for name, value in tensors.items()})
        begin += count
    return outputs


def _concatenate(values: list[Any]) -> Any:
    if type(values[0]).__module__.partition(".")[0] == "torch":
        import torch

        return torch.cat(values)
    import numpy as np

    return np.concatenate(values)
