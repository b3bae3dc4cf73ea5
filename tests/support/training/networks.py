"""Parameters for networks in which every layer changes the output."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stages.models.registry import ModelSpec


def randomize_parameters(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set all parameters and statistics to random values with which activations neither vanish nor explode.

    The initial values hide mistakes, such as the layer scales of ConvNeXt (1e-6) and the means of batch norms (0).
    """
    generator = torch.Generator().manual_seed(seed)

    def between(tensor: Tensor, low: float, high: float) -> None:
        with torch.no_grad():
            tensor.uniform_(low, high, generator=generator)

    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        if tensor.dim() >= 2:
            limit = 1.5 * math.sqrt(3 * tensor.shape[0] / tensor.numel())
            between(tensor, -limit, limit)
        elif name.endswith(("weight", "running_var")):
            between(tensor, 0.5, 1.5)
        else:
            between(tensor, -0.2, 0.2)
    for name, tensor in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            tensor.zero_()
    return model


def state_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a model's state, without allocating it."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in spec.build().state_dict().items()}
