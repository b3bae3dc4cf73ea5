"""Networks whose forward computes or changes state, and networks with values of all kinds between their layers.

Each class is the factory that a pipeline file names. The outputs are (B, CLASSES).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from tests.support.training.unusual_modes import CLASSES, WIDTH, Layers

# State that the forward computes or changes ---------------------------------------------------------------------------


class WeightNormed(Layers):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.c)
        parametrizations.spectral_norm(self.b[0])


class WeightNormedByHooks(Layers):
    def __init__(self) -> None:
        super().__init__()
        weight_norm(self.c)
        spectral_norm(self.b[0])


class OrthogonalLayer(Layers):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.orthogonal(self.c)


class StandardisedWeight(Layers):
    """Computes a weight from a parameter in the forward."""

    def middle(self, x: Tensor) -> Any:
        weight = self.c.weight
        return F.linear(x, (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True))


class ScaledTwice(Layers):
    """Uses a value that depends on parameters only in several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(16))

    def middle(self, x: Tensor) -> Any:
        scale = self.log_scale.exp()
        return (x * scale + 1) * scale


class ChangedBuffer(Layers):
    """Keeps a moving average in a buffer, which evaluation uses."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(16))

    def middle(self, x: Tensor) -> Any:
        if self.training:
            with torch.no_grad():
                self.average.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.b(x - self.average)


class ReplacedBuffer(ChangedBuffer):
    def middle(self, x: Tensor) -> Any:
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.mean(0).detach()
        return self.b(x - self.average)


class KeptInTraining(Layers):
    """Adds the mean of the micro-batch before."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(1, 16)

    def middle(self, x: Tensor) -> Any:
        if self.training:
            x = x + self.last
            self.last = x.mean(0, keepdim=True).detach()
        return self.b(x)


class DecayedWeight(Layers):
    def middle(self, x: Tensor) -> Any:
        if self.training:
            self.c.weight.data.mul_(0.9)
        return self.b(x)


class CountedSteps(Layers):
    steps = 0

    def middle(self, x: Tensor) -> Any:
        self.steps += 1
        return self.b(x) * self.steps


class CountedLater(Layers):
    """Counts its calls in training, with an effect from the fifth on."""

    calls = 0

    def middle(self, x: Tensor) -> Any:
        if self.training:
            self.calls += 1
        return self.b(x) * (2 if self.calls > 4 else 1)


class GrowingScale(Layers):
    """Modifies a buffer that its backward needs."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(16))

    def middle(self, x: Tensor) -> Any:
        if self.training:
            self.scale.mul_(1.01)
        return self.b(x) * self.scale


# Values across cuts ---------------------------------------------------------------------------------------------------


class StridedValues(Layers):
    """Transposed, expanded, sliced and permuted values."""

    def middle(self, x: Tensor) -> Any:
        y = self.b(x).view(-1, 4, 4).transpose(1, 2)
        y = torch.tanh(y) + y.permute(0, 2, 1)[:, ::2].repeat_interleave(2, 1)
        y = y + y[:, :1].expand(-1, 4, -1)
        y = torch.matmul(y, y.transpose(1, 2))
        return y.flip(1).flatten(1) + y.mT.reshape(-1, 16)


class ExpandedGradients(nn.Module):
    """The gradient of its sum over pixels has stride 0, and the layer before adds in the order of the strides."""

    input_shape = (1, 3, 13, 13)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 24, 3)
        self.out = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.out(F.gelu(self.a(x).permute(0, 2, 3, 1)).sum((1, 2)) / 10)


class ChannelsLast(nn.Module):
    input_shape = (1, 3, 13, 13)

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3)
        self.a = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.b = nn.Conv2d(24, 24, 3, padding=1)
        self.out = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Any:
        strided = self.first(x).permute(0, 2, 3, 1)
        x = torch.relu(self.norm(self.a(x.contiguous(memory_format=torch.channels_last))))
        x = self.b(x).permute(0, 2, 3, 1)
        return self.out(F.gelu(x).mean((1, 2)) + F.gelu(strided).mean((1, 2)))


class ComplexValues(Layers):
    """Filters in the frequency domain with complex parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(9, 2))

    def middle(self, x: Tensor) -> Any:
        spectrum = torch.fft.rfft(self.b(x))
        spectrum = spectrum * torch.view_as_complex(self.filter)
        spectrum = spectrum * torch.tanh(spectrum)
        return torch.fft.irfft(spectrum, n=16) + spectrum.abs().sum(1, keepdim=True)


class ComplexParameter(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(9, dtype=torch.complex64))

    def middle(self, x: Tensor) -> Any:
        spectrum = torch.fft.rfft(self.b(x)).conj() * self.filter
        return torch.fft.irfft(spectrum, n=16)


class ManyUses(Layers):
    """Uses one value in each later layer."""

    def middle(self, x: Tensor) -> Any:
        y = torch.tanh(self.b[0](x)) * x
        y = torch.sigmoid(self.b[3](y)) + x / 3
        return y * x - torch.sin(y + x) + y / (1 + x)


class IntegerValues(Layers):
    """Sorts, and gathers by indices, which have no gradient."""

    def middle(self, x: Tensor) -> Any:
        values, order = torch.sort(self.b(x), dim=1)
        mask = values > 0.1
        return torch.gather(x, 1, order).masked_fill(mask, 0.5) + values


class UnusedOutputs(Layers):
    """Uses one item of a tuple; values that nothing depends on are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(16, 3)

    def middle(self, x: Tensor) -> Any:
        first, _, third, _ = self.b(x).chunk(4, 1)
        self.unused(x)
        return torch.cat([first, third, first, third], 1)


class Recurrent(nn.Module):
    input_shape = (1, 6, WIDTH)

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, 16, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2)
        self.gru = nn.GRU(32, 16, batch_first=True)
        self.out = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Any:
        states, (hidden, _) = self.lstm(x)
        outputs, _ = self.gru(torch.tanh(states))
        return self.out(torch.cat([outputs[:, -1], hidden[-1]], 1))


class InPlace(Layers):
    """Overwrites values, also parts of them."""

    def middle(self, x: Tensor) -> Any:
        y = self.b[0](x)
        y += x
        y = F.relu_(y) * 2
        y[:, :4] = 0.5 * x[:, 4:8]
        return y.mul_(x.detach() + 1)


class HalfPrecision(Layers):
    """A network of bfloat16; its input is float32 in a data set."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)


class HalfPrecisionMiddle(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.b.to(torch.bfloat16)

    def middle(self, x: Tensor) -> Any:
        return self.b(x.bfloat16()).float()


class DoublePrecision(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.to(torch.float64)


class OnePixelNorm(nn.Module):
    """A batch norm over one pixel: with one row its variance is undefined."""

    input_shape = (1, 3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.b = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.relu(self.norm(self.b(self.pool(self.a(x))))).flatten(1))


class SharedBuffer(ChangedBuffer):
    """Modifies a buffer in one layer, and uses it in a later one."""

    def middle(self, x: Tensor) -> Any:
        self.average.add_(1)
        return self.b(x) - self.average


class SharedNorm(Layers):
    """Calls a batch norm without parameters twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16, affine=False)

    def middle(self, x: Tensor) -> Any:
        return self.norm(self.b[0](self.norm(x)))
