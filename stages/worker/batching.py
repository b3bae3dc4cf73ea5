"""Several requests in one call: which fit together, how they are joined, and how the answer is split. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stages.errors import RowsDoNotMatch

Tensors = dict[str, Any]


def group_compatible(requests: Sequence[Tensors]) -> list[list[int]]:
    """The indices of the requests, grouped by what fits into one call: same names, dtypes, and shapes but for rows."""
    found: dict[Any, list[int]] = {}
    for index, tensors in enumerate(requests):
        # Tensors without rows, or with different numbers of them, cannot be split again: such a request goes alone.
        rows = {_rows(value) for value in tensors.values()}
        key: Any = index
        if len(rows) == 1 and None not in rows:
            key = tuple(sorted((name, str(value.dtype), tuple(value.shape[1:])) for name, value in tensors.items()))
        found.setdefault(key, []).append(index)
    return list(found.values())


def join_requests(requests: Sequence[Tensors]) -> tuple[Tensors, list[int]]:
    """One call for several requests, rows (dimension 0) one after the other; and the rows that each has."""
    if len(requests) == 1:
        return requests[0], []
    rows = [len(next(iter(tensors.values()))) for tensors in requests]
    return {name: _concatenate([tensors[name] for tensors in requests]) for name in requests[0]}, rows


def split_outputs(tensors: Tensors, rows: Sequence[int]) -> list[Tensors]:
    """The answer for each request; raises `RowsDoNotMatch` when the rows are not those that went in."""
    if not rows:
        return [tensors]
    total = sum(rows)
    for name, value in tensors.items():
        if not value.ndim or len(value) != total:
            raise RowsDoNotMatch(name, total, len(value) if value.ndim else 0)
    answers = []
    begin = 0
    for count in rows:
        answers.append({name: value[begin : begin + count] for name, value in tensors.items()})
        begin += count
    return answers


def _rows(value: Any) -> int | None:
    shape = getattr(value, "shape", ())
    return int(shape[0]) if shape else None


def _concatenate(values: list[Any]) -> Any:
    if type(values[0]).__module__.partition(".")[0] == "torch":
        import torch

        return torch.cat(values)
    import numpy as np

    return np.concatenate(values)
