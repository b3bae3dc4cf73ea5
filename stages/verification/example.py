"""Example inputs of a network: those that its factory declares, or ones that fit its first layer."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brokers.errors import UsageError
from stages.models.registry import ModelSpec, random_tensor
from stages.partition.boundary import is_differentiable
from stages.partition.forward_arguments import name_arguments, split_arguments
from stages.verification.model_state import ModelState

Inputs = dict[str, Tensor]  # by argument name
_GUESSED_SIZES = (224, 32, 64, 28, 16, 8)  # pixels, or samples of a sequence


def declared_example(spec: ModelSpec, model: nn.Module) -> Inputs | None:
    """Return the inputs of one request by argument name; None if the model declares none."""
    inputs = spec.make_example()
    if inputs is None:
        return None
    dtype = _float_dtype(model)
    cast = {name: tensor.to(dtype) if tensor.dtype is torch.float32 else tensor for name, tensor in inputs.items()}
    named = name_arguments(model, cast)
    positional, keywords = split_arguments(model, named)
    if {*positional, *keywords} != named.keys():
        problem = (
            f"`example_inputs` has {', '.join(map(repr, named))}, the forward takes {', '.join(positional + keywords)}"
        )
        raise UsageError("BadModel", f"model {spec.name!r}: {problem}", key="pipeline.model", model=spec.name)
    return named


def guess_example(model: nn.Module) -> Inputs | None:
    """Return inputs with which a network of one argument runs, from its first layer; otherwise None."""
    positional, keywords = split_arguments(model, ())
    if len(positional) != 1 or keywords:
        return None
    state = ModelState(model)
    for tensor in _guesses(model):
        inputs = {positional[0]: tensor}
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                call_model(model, inputs)
        except Exception:  # noqa: BLE001 - the network's own code, called with a guess
            continue
        finally:
            state.restore()  # in training mode the statistics of batch norms change
        return inputs
    return None


def second_example(inputs: Mapping[str, Tensor]) -> Inputs:
    """Return other inputs of the same shapes, with values of the same range, and another mean and maximum."""
    return {name: _other_values(tensor) for name, tensor in inputs.items()}


def count_rows(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of rows that all tensors of a request have; 0 if there is no such number."""
    rows = {len(tensor) if tensor.dim() else 0 for tensor in tensors.values()}
    return rows.pop() if len(rows) == 1 else 0


def join_requests(requests: Sequence[Mapping[str, Tensor]]) -> Inputs | None:
    """Concatenate the tensors of several requests as a stage does; None if those of a request differ in rows."""
    if not all(map(count_rows, requests)):
        return None
    return {name: torch.cat([tensors[name] for tensors in requests]) for name in requests[0]}


def call_model(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """Call a network with copies of inputs, which it may modify, by the names of its forward's arguments."""
    positional, keywords = split_arguments(model, inputs)
    values = {name: tensor.clone() for name, tensor in inputs.items()}
    return model(*(values[name] for name in positional), **{name: values[name] for name in keywords})


def _other_values(tensor: Tensor) -> Tensor:
    other = _move_values(tensor)
    if not torch.equal(other, tensor):
        return other
    if is_differentiable(tensor):
        return random_tensor(tensor.shape).to(tensor.device, tensor.dtype)
    flat = tensor.flatten().clone()  # all are equal, such as a mask of ones: the second half is 0 or 1 instead
    half = flat[len(flat) // 2 :]
    half.copy_(half == 0)
    return flat.view(tensor.shape)


def _move_values(tensor: Tensor) -> Tensor:
    moved = tensor.flatten().roll(tensor.numel() // 2 + 1).view(tensor.shape)
    if tensor.is_floating_point() or tensor.is_complex():
        return moved * 0.75
    return moved if tensor.dtype is torch.bool else moved - (moved > 1).to(moved.dtype)  # a mask of 0 and 1 remains one


def _float_dtype(model: nn.Module) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _guesses(model: nn.Module) -> Iterator[Tensor]:
    first = next((module for module in model.modules() if type(module) in _SHAPES), None)
    if first is None:
        return
    for size in _GUESSED_SIZES:
        for shape in _SHAPES[type(first)](first, size):
            if isinstance(first, nn.Embedding):
                yield torch.arange(torch.Size(shape).numel()).view(shape) % first.num_embeddings
            else:
                yield random_tensor(shape).to(_float_dtype(model))


_Shapes = Callable[[Any, int], tuple[tuple[int, ...], ...]]
_SHAPES: Mapping[type[nn.Module], _Shapes] = {
    nn.Conv1d: lambda layer, size: ((1, layer.in_channels, size),),
    nn.Conv2d: lambda layer, size: ((1, layer.in_channels, size, size),),
    nn.Conv3d: lambda layer, size: ((1, layer.in_channels, min(size, 16), size, size),),
    nn.Linear: lambda layer, size: ((1, layer.in_features), (1, size, layer.in_features)),
    nn.Embedding: lambda layer, size: ((1, min(size, 16)),),
    nn.LSTM: lambda layer, size: ((1, min(size, 16), layer.input_size),),
    nn.GRU: lambda layer, size: ((1, min(size, 16), layer.input_size),),
    nn.RNN: lambda layer, size: ((1, min(size, 16), layer.input_size),),
}
