"""Runs of a network for its check: what it computes for the examples, and what else it changes."""

from collections.abc import Callable
from typing import TypeVar

import torch

from brokers.errors import describe_error
from stages.verification.model_state import GlobalRandomState, ModelState

T = TypeVar("T")
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)  # says nothing about the network, and is not kept as a verdict
KEEPS_STATE = (
    "its forward keeps numbers or lists from one call to the next, which tracing cannot see: keep them in buffers"
)


class CheckFailed(Exception):
    """The parts must not be used; the message says why."""


def run_network(state: ModelState, run: Callable[[], T]) -> T:
    """Return the result of a run of the network's own forward. Raises `CheckFailed` if it does what parts cannot."""
    outside = GlobalRandomState()
    positions = state.positions
    try:
        result = run()
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        raise CheckFailed(f"it fails for the example: {describe_error(error)}") from error
    if outside.is_changed:
        outside.restore()
        message = (
            "its forward draws random numbers of Python or numpy, which tracing draws only once: draw them by torch"
        )
        raise CheckFailed(message)
    if state.positions != positions:
        raise CheckFailed(KEEPS_STATE)
    if created := state.created_names:
        raise CheckFailed(f"its forward creates {', '.join(map(repr, created))}: create that in its constructor")
    if state.has_changed_parameters:
        raise CheckFailed("its forward modifies its parameters: compute with a copy")
    return result
