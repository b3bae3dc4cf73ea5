"""The check that requests may be computed in one batch: the rows of a part's inputs do not influence each other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.partition.boundary import is_differentiable
from stages.partition.partition import Part
from stages.verification.comparison import describe_difference
from stages.verification.example import Inputs, count_rows, join_requests, second_example
from stages.verification.network_run import OUT_OF_MEMORY
from stages.verification.part_chain import PartChain, PartRun, Tensors

_DISTINCT_REQUESTS = 4
_EXTREME_FACTOR = 1000.0


def find_batchable(parts: PartChain, example: Inputs, max_batch: int, *, is_exact: bool) -> list[bool]:
    """Return for each part whether it computes for `max_batch` requests together what it computes for each alone.

    Alone and together, and at another place in the batch, results may differ by rounding. But among batches of one size
    a row does not depend on the others: bit for bit if `is_exact`, as on a CPU.
    """
    requests = [example]
    while len(requests) < min(max_batch, _DISTINCT_REQUESTS):
        requests.append(second_example(requests[-1]))
    try:
        runs = [parts.run(inputs) for inputs in requests]
    except OUT_OF_MEMORY:
        raise
    except Exception:  # noqa: BLE001 - values in another order may not be valid for the network
        return [False] * len(parts.parts)
    places = [index % len(runs) for index in range(max_batch)]
    return [
        _is_batchable(part, [part_runs[place] for place in places], is_exact=is_exact)
        for part, *part_runs in zip(parts.parts, *runs, strict=True)
    ]


def _is_batchable(part: Part, runs: Sequence[PartRun], *, is_exact: bool) -> bool:
    rows = [count_rows(run.inputs) for run in runs]
    if not all(rows) or rows != [count_rows(run.outputs) for run in runs]:
        return False
    first, *others, last = (run.inputs for run in runs)
    extreme = [first, *map(_make_extreme, others), last]
    if not others:  # two requests: one batch for each of them
        extreme = [first, _make_extreme(last)]
    states = _random_states()
    try:
        alone, alone_reversed = (_join([run.outputs for run in order]) for order in (runs, runs[::-1]))
        forward, backward = (part(_join([run.inputs for run in order])) for order in (runs, runs[::-1]))
        beside_extreme = part(_join(extreme))
    except OUT_OF_MEMORY:
        raise
    except Exception:  # noqa: BLE001 - of torch, or of the network's own code
        return False
    if not all(map(torch.equal, states, _random_states())):  # each request would draw other numbers than alone
        return False
    ends = [slice(0, rows[0])] + ([slice(-rows[-1], None)] if others else [])
    return not (
        describe_difference(forward, alone, allow_rounding=True)
        or describe_difference(backward, alone_reversed, allow_rounding=True)
        or any(
            describe_difference(_take(beside_extreme, end), _take(forward, end), allow_rounding=not is_exact)
            for end in ends
        )
    )


def _join(requests: Sequence[Tensors]) -> Tensors:
    joined = join_requests(requests)
    assert joined is not None  # their rows have been counted
    return joined


def _take(tensors: Tensors, rows: slice) -> Tensors:
    return {name: tensor[rows] for name, tensor in tensors.items()}


def _make_extreme(tensors: Tensors) -> Tensors:
    return {name: tensor * _EXTREME_FACTOR if is_differentiable(tensor) else tensor for name, tensor in tensors.items()}


def _random_states() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
