"""The check that requests may be computed in one batch: the rows of a part's inputs do not influence each other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.partition.boundary import is_differentiable
from stages.partition.partition import Part
from stages.verification.comparison import describe_difference
from stages.verification.example import Inputs, second_example
from stages.verification.part_chain import PartChain, PartRun, Tensors

LARGEST_CHECKED_BATCH = 8
_EXTREME_FACTOR = 1000.0


def find_batchable(parts: PartChain, example: Inputs, max_batch: int, *, is_exact: bool) -> list[bool]:
    """Return for each part whether it computes for requests together what it computes for each alone.

    The batch has `max_batch` requests, at most `LARGEST_CHECKED_BATCH`. Alone and together, and at another place in the
    batch, results may differ by rounding. But among batches of one size, a row does not depend on the others: bit
    for bit if `is_exact`, as on a CPU.
    """
    requests = [example]
    while len(requests) < min(max(max_batch, 2), LARGEST_CHECKED_BATCH):
        requests.append(second_example(requests[-1]))
    try:
        runs = [parts.run(inputs) for inputs in requests]
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # noqa: BLE001 - values in another order may not be valid for the network
        return [False] * len(parts.parts)
    return [
        _is_batchable(part, part_runs, is_exact=is_exact) for part, *part_runs in zip(parts.parts, *runs, strict=True)
    ]


def _is_batchable(part: Part, runs: Sequence[PartRun], *, is_exact: bool) -> bool:
    rows = [_count_rows(run.inputs) for run in runs]
    if None in rows or rows != [_count_rows(run.outputs) for run in runs]:
        return False
    inputs = [run.inputs for run in runs]
    others = [_make_extreme(tensors) for tensors in reversed(inputs[1:])]
    states = _random_states()
    try:
        alone = _join([run.outputs for run in runs])
        alone_backward = _join([run.outputs for run in reversed(runs)])
        forward, backward = part(_join(inputs)), part(_join(inputs[::-1]))
        as_first, as_last = part(_join([inputs[0], *others])), part(_join([*others, inputs[0]]))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # noqa: BLE001 - of torch, or of the network's own code
        return False
    if not all(map(torch.equal, states, _random_states())):  # each request would draw other numbers than alone
        return False
    count = rows[0] or 0
    first, last = slice(0, count), slice(-count, None)
    return not (
        describe_difference(forward, alone, allow_rounding=True)
        or describe_difference(backward, alone_backward, allow_rounding=True)
        or describe_difference(_take(as_first, first), _take(forward, first), allow_rounding=not is_exact)
        or describe_difference(_take(as_last, last), _take(backward, last), allow_rounding=not is_exact)
    )


def _count_rows(tensors: Tensors) -> int | None:
    """Return the number of rows, 1 or more, that all tensors of a request have; None if there is no such number."""
    rows = {len(tensor) if tensor.dim() else 0 for tensor in tensors.values()}
    return rows.pop() or None if len(rows) == 1 else None


def _join(requests: Sequence[Tensors]) -> Tensors:
    return {name: torch.cat([tensors[name] for tensors in requests]) for name in requests[0]}


def _take(tensors: Tensors, rows: slice) -> Tensors:
    return {name: tensor[rows] for name, tensor in tensors.items()}


def _make_extreme(tensors: Tensors) -> Tensors:
    return {name: tensor * _EXTREME_FACTOR if is_differentiable(tensor) else tensor for name, tensor in tensors.items()}


def _random_states() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
