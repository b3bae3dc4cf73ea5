"""Guards of a graph: what its trace has assumed about the shapes of its inputs, checked for each request.

A branch on a shape, or a loop over a dimension, is traced as it runs for the example. For a request of another shape
that would run otherwise, the part that has the shape raises an error instead of computing something else.
"""

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from brokers.errors import BadPayload

QUESTIONS: Mapping[str, Callable[[Any], Any]] = {
    "bool": bool,
    "len": len,
    "index": operator.index,
    "int": int,
    "float": float,
    "round": round,
    "ceil": math.ceil,
    "floor": math.floor,
    "hash": hash,
    "str": str,
}


def check_answer(value: Any, question: str, expected: Any, name: str) -> None:
    """Raise `BadPayload` if the answer to a question about a value is not the one for the example."""
    actual = QUESTIONS[question](value)
    if actual != expected:
        problem = (
            f"the shape of this input takes another path through the network than its example: {question}({name}) is "
            f"{actual}, expected {expected}; declare an example of this shape (`input_shape` or `example_inputs`)"
        )
        raise BadPayload("tensors", problem)


def is_guard(node: fx.Node) -> bool:
    """Return whether a node of a graph is a guard."""
    return node.target is check_answer
