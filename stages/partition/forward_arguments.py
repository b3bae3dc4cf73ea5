"""The arguments of a network's forward: by which names its inputs are passed."""

import inspect
from collections.abc import Collection, Mapping

from torch import Tensor, nn


def name_arguments(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs by the names of the forward's arguments: a single input may have any name."""
    if len(inputs) != 1:
        return dict(inputs)
    parameters = inspect.signature(model.forward).parameters
    ((name, value),) = inputs.items()
    return {name if name in parameters else next(iter(parameters), name): value}


def split_arguments(model: nn.Module, given: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the forward's arguments that are passed by position and by keyword.

    Those are the ones without a default, and those in `given`; others keep their defaults, since a value for
    `targets=None` would take another branch.
    """
    positional: list[str] = []
    keywords: list[str] = []
    is_gap = False
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name not in given and parameter.default is not parameter.empty:
            is_gap = True
        elif is_gap or parameter.kind is parameter.KEYWORD_ONLY:
            keywords.append(name)
        else:
            positional.append(name)
    return tuple(positional), tuple(keywords)
