"""The modules and tensors of a network that the graph of a part uses, under their paths in the network."""

from collections.abc import Iterable, Mapping

from torch import Tensor, fx, nn


def collect_state(model: nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor]) -> nn.Module:
    """Return a module with the modules, parameters, buffers and other tensors that the nodes of `graph` name.

    They are those of `model`, not copies. Children are set as `nn.Module.__setattr__` does: `add_module` refuses names
    that another attribute has.
    """
    state = nn.Module()
    for node in graph.nodes:
        path = str(node.target)
        owner_path, _, name = path.rpartition(".")
        if node.op == "call_module":
            _container(state, owner_path)._modules[name] = model.get_submodule(path)
        elif node.op == "get_attr" and path in constants:
            state.register_buffer(path, constants[path], persistent=False)
        elif node.op == "get_attr":
            _add_tensor(_container(state, owner_path), model.get_submodule(owner_path), name)
    return state


def add_unused_state(state: nn.Module, model: nn.Module, used: Iterable[Tensor]) -> None:
    """Add to `state` those tensors of a network's state dict that are not among `used`."""
    used_ids = {id(tensor) for tensor in used}
    for path, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in used_ids:
            owner_path, _, name = path.rpartition(".")
            _add_tensor(_container(state, owner_path), model.get_submodule(owner_path), name)


def _container(state: nn.Module, path: str) -> nn.Module:
    """Return the module at a path; modules that are missing on the way are created."""
    for name in path.split(".") if path else ():
        state = state._modules.setdefault(name, nn.Module())  # type: ignore[assignment]
    return state


def _add_tensor(container: nn.Module, owner: nn.Module, name: str) -> None:
    if container is owner:  # a layer of the part, which has it already
        return
    if name in owner._parameters:
        container._parameters[name] = owner._parameters[name]
        return
    container._buffers[name] = getattr(owner, name)
    if name not in owner._buffers or name in owner._non_persistent_buffers_set:
        container._non_persistent_buffers_set.add(name)
