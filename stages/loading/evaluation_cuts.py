"""The cuts of a network in evaluation mode that belong to its cuts in training mode.

The two modes have different graphs: dropout paths, checkpoints and auxiliary outputs come and go. A stage evaluates
with the parameters and statistics that it trains, so each layer of the evaluation graph must be in the part whose state
it uses.
"""

from collections.abc import Sequence, Set

from torch import fx

from brokers.errors import UsageError
from stages.partition.partition import Part
from stages.partition.traced_value import find_attribute
from stages.partition.tracing import TracedModel


def find_evaluation_cuts(
    trained: TracedModel, parts: Sequence[Part], cuts: Sequence[int], evaluated: TracedModel
) -> tuple[int, ...]:
    """Return the cuts of the evaluation graph, at the same layer as in training where there is a choice.

    Raises `UsageError` "CannotEvaluate" if some stage would need state that another one trains.
    """
    owners = _owners(parts)
    users = [{owners[key] for key in _state_of(evaluated, node) if key in owners} for node in evaluated.layer_nodes]
    result: list[int] = []
    for index, cut in enumerate(cuts):
        layer = trained.layer_names[cut - 1]
        before = [position for position, used in enumerate(users) if any(part <= index for part in used)]
        after = [position for position, used in enumerate(users) if any(part > index for part in used)]
        first = 1 + max(before, default=0)
        last = min(after, default=len(users) - 1)
        first = max([first, *(previous + 1 for previous in result[-1:])])
        if first > last:
            raise _evaluation_error(trained, cut)
        names = evaluated.layer_names
        same = names.index(layer) + 1 if layer in names else first
        result.append(min(max(same, first), last))
    return tuple(result)


def _owners(parts: Sequence[Part]) -> dict[int, int]:
    """Return the part that trains each parameter or buffer, by its id. State that several parts use is not trained."""
    owners: dict[int, int] = {}
    shared: set[int] = set()
    for index, part in enumerate(parts):
        for tensor in {*part.module.parameters(), *part.module.buffers()}:
            if owners.setdefault(id(tensor), index) != index:
                shared.add(id(tensor))
    return {key: index for key, index in owners.items() if key not in shared}


def _state_of(traced: TracedModel, node: fx.Node) -> Set[int]:
    """Return the ids of the parameters and buffers that a layer uses, directly or through nodes of state."""
    if node.op == "call_module":
        module = traced.model.get_submodule(str(node.target))
        used = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    elif node.op == "get_attr" and node.target not in traced.constants:
        used = {id(find_attribute(traced.model, str(node.target)))}
    else:
        used = set()
    for argument in node.all_input_nodes:
        if argument in traced.state_nodes:
            used |= _state_of(traced, argument)
    return used


def _evaluation_error(trained: TracedModel, cut: int) -> UsageError:
    layer = trained.layer_names[cut - 1]
    message = (
        f"cut {cut}, after layer {layer!r}: evaluation has other layers than training, so that a stage would need "
        "parameters that another one trains, or would have no layer; cut elsewhere"
    )
    return UsageError("CannotEvaluate", message, key="pipeline.cuts", cut=cut, layer=layer)
