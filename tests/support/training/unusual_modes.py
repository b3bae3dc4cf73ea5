"""Networks whose forward sets modes of torch, has hooks or checkpoints, or draws random numbers.

Each class is the factory that a pipeline file names. The outputs are (B, CLASSES).
"""

from __future__ import annotations

import random
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

CLASSES = 5
WIDTH = 12


class Layers(nn.Module):
    """Three linear layers, of which a subclass uses `b` in its own way: (B, WIDTH) -> (B, CLASSES)."""

    input_shape: ClassVar[tuple[int, ...]] = (1, WIDTH)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, 16)
        self.b = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16))
        self.c = nn.Linear(16, 16)
        self.out = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.relu(self.c(self.middle(torch.relu(self.a(x))))))

    def middle(self, x: Tensor) -> Any:
        return self.b(x)


# Gradients that are not recorded --------------------------------------------------------------------------------------


class FrozenBackbone(Layers):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = self.b(torch.relu(self.a(x)))
        return self.out(torch.relu(self.c(x)))


class NoGradMiddle(Layers):
    def middle(self, x: Tensor) -> Any:
        with torch.no_grad():
            offset = self.b(x)
        return x + offset


class NoGradDecorator(Layers):
    @torch.no_grad()
    def encode(self, x: Tensor) -> Any:
        return self.b(x)

    def middle(self, x: Tensor) -> Any:
        return self.encode(x) * x


class GradInsideNoGrad(Layers):
    def middle(self, x: Tensor) -> Any:
        with torch.no_grad():
            x = x * 2
            with torch.enable_grad():
                y = self.b(x)
            x = x + 1
        return x + y


class SetGradEnabled(Layers):
    def middle(self, x: Tensor) -> Any:
        torch.set_grad_enabled(False)
        y = self.b(x)
        torch.set_grad_enabled(True)
        return x + y


class Detached(Layers):
    def middle(self, x: Tensor) -> Any:
        return x + self.b(x.detach())


class StraightThrough(Layers):
    """Rounds, with the gradient of the identity."""

    def middle(self, x: Tensor) -> Any:
        y = self.b(x)
        return y + (y.round() - y).detach()


class FrozenParameters(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.a.requires_grad_(False)
        self.b[0].requires_grad_(False)


class FrozenAll(Layers):
    """Only the head is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.out.requires_grad_(True)


# Autocast -------------------------------------------------------------------------------------------------------------


class AutocastMiddle(Layers):
    def middle(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(x)
        return y.float()


class AutocastDecorator(Layers):
    @torch.autocast("cpu", dtype=torch.bfloat16)  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class AutocastTwice(Layers):
    """Uses one layer twice, whose weight autocast converts once."""

    def middle(self, x: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b[0](self.b[0](x))
            with torch.autocast("cpu", enabled=False):
                z = self.c(y.float())
        return z + self.b[3](y.float())


# Checkpoints ----------------------------------------------------------------------------------------------------------


class Checkpointed(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def block(self, x: Tensor) -> Any:
        return self.drop(torch.relu(self.b[0](x)))

    def middle(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=False)


class CheckpointedReentrant(Checkpointed):
    def middle(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=True)


class CheckpointedInTraining(Checkpointed):
    def middle(self, x: Tensor) -> Any:
        if self.training:
            return checkpoint(self.block, x, use_reentrant=False)
        return self.block(x)


class CheckpointedSequence(Layers):
    def middle(self, x: Tensor) -> Any:
        return checkpoint_sequential(self.b, 2, x, use_reentrant=False)  # type: ignore[no-untyped-call]


# Hooks ----------------------------------------------------------------------------------------------------------------


class RootHooks(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
        self.register_forward_hook(lambda module, inputs, output: output * 3)


class ChildHooks(Layers):
    """Hooks on a layer, and on a module of several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.c.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
        self.c.register_forward_hook(lambda module, inputs, output: output * 0.5)
        self.b.register_forward_hook(lambda module, inputs, output: output + inputs[0])


class ParameterHook(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.c.weight.register_hook(lambda gradient: gradient * 2)  # type: ignore[no-untyped-call]


def _double(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return (inputs[0] * 2,)


class LayerBackwardHook(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.c.register_full_backward_hook(_double)


class ContainerBackwardHook(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.b.register_full_backward_hook(_double)


class RootBackwardHook(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.register_full_backward_pre_hook(lambda module, outputs: _double(module, outputs, outputs))


class ValueHook(Layers):
    def middle(self, x: Tensor) -> Any:
        y = self.b(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 2)
        return y


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 5


class OwnAutogradFunction(Layers):
    def middle(self, x: Tensor) -> Any:
        return _Doubled.apply(self.b(x))


# The training flag ----------------------------------------------------------------------------------------------------


class FrozenNorms(Layers):
    """Keeps its batch norms in evaluation mode, as many detectors do."""

    def train(self, mode: bool = True) -> FrozenNorms:
        super().train(mode)
        self.b[1].eval()
        return self


class FlagsOneByOne(Layers):
    """Sets the flag of some modules, not by `train`."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> FlagsOneByOne:
        super().train(mode)
        self.drop.training = False
        self.b.training = not mode
        return self

    def middle(self, x: Tensor) -> Any:
        y = self.drop(self.b(x))
        return y if self.b.training else y * 2


class ModeSetInForward(Layers):
    def middle(self, x: Tensor) -> Any:
        self.b[1].eval()
        return self.b(x)


class DropPath(Layers):
    """Leaves out a branch of some rows in training only."""

    def middle(self, x: Tensor) -> Any:
        y = self.b(x)
        if self.training:
            kept = torch.floor(0.7 + torch.rand((x.shape[0], 1), dtype=x.dtype, device=x.device))
            y = y / 0.7 * kept
        return x + y


class DropPathBernoulli(Layers):
    def middle(self, x: Tensor) -> Any:
        y = self.b(x)
        if self.training:
            y = y * x.new_empty(x.shape[:1] + (1,) * (x.dim() - 1)).bernoulli_(0.7).div_(0.7)
        return x + y


class NoisyInTraining(Layers):
    def middle(self, x: Tensor) -> Any:
        y = self.b(x)
        return y + 0.1 * torch.randn_like(y) * torch.randn(16) if self.training else y


# Random numbers of others ---------------------------------------------------------------------------------------------


class PythonLayerDrop(Layers):
    def middle(self, x: Tensor) -> Any:
        return x if self.training and random.random() < 0.5 else self.b(x)


class NumpyLayerDrop(Layers):
    def middle(self, x: Tensor) -> Any:
        return x if self.training and np.random.rand() < 0.5 else self.b(x)


class NumpyNoise(Layers):
    def middle(self, x: Tensor) -> Any:
        return self.b(x) + float(np.random.randn())


class TorchLayerDrop(Layers):
    def middle(self, x: Tensor) -> Any:
        return x if self.training and torch.rand(()) < 0.5 else self.b(x)


class TorchLayerDropItem(Layers):
    def middle(self, x: Tensor) -> Any:
        return x if self.training and torch.rand(1).item() < 0.5 else self.b(x)
