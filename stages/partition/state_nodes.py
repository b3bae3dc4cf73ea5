"""The nodes of a graph that depend only on the network's state: parameters, buffers and constants."""

from torch import fx

from stages.partition.in_place import LAYER_OPS, mutated_inputs, mutates_input

# In the names of torch's functions that draw random numbers; a layer that is taken for one is still computed exactly.
_RANDOM_WORDS = ("rand", "bernoulli", "normal", "multinomial", "poisson", "uniform", "dropout", "exponential", "cauchy")
# Methods and functions whose result may share memory with their first argument.
# fmt: off
_VIEWS = frozenset(
    {
        "getitem", "getattr", "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "squeeze",
        "unsqueeze", "transpose", "t", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "expand", "expand_as",
        "broadcast_to", "narrow", "select", "diagonal", "unfold", "chunk", "split", "tensor_split", "hsplit", "vsplit",
        "unbind", "detach", "contiguous", "to", "type", "float", "double", "half", "bfloat16", "type_as", "real",
        "view_as_real", "view_as_complex", "alias",
    }
)
# fmt: on


def find_state_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on nothing but state, are not random, and that no layer modifies."""
    modified: set[fx.Node] = set()
    pending = [each for node in graph.nodes for each in mutated_inputs(node)]
    while pending:
        node = pending.pop()
        if node.op in LAYER_OPS and node not in modified:
            modified.add(node)
            if _name_of(node) in _VIEWS:  # its memory is that of its first argument
                pending += node.all_input_nodes[:1]
            pending += mutated_inputs(node)
    state_nodes: set[fx.Node] = set()
    for node in graph.nodes:
        is_pure_call = node.op in ("call_function", "call_method") and not mutates_input(node) and not _is_random(node)
        is_of_state = is_pure_call and node not in modified and state_nodes >= set(node.all_input_nodes)
        if is_of_state or node.op == "get_attr":
            state_nodes.add(node)
    return state_nodes


def _is_random(node: fx.Node) -> bool:
    return any(word in _name_of(node) for word in _RANDOM_WORDS)


def _name_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
