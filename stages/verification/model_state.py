"""What a forward may change of a network besides its result: buffers, plain attributes, and random generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from stages.partition.python_state import PythonState


class ModelState:
    """The tensors and the Python state of a network at one time; parameters only by their version counters."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._names = root.state_dict().keys()
        self._python = PythonState(root)
        self._contents = [(tensor, tensor.detach().clone()) for tensor in self._python.tensors]
        self._versions = [(parameter, parameter._version) for parameter in root.parameters()]

    @property
    def is_changed(self) -> bool:
        """Whether a buffer, another tensor, an attribute or a container has another value now."""
        return self._python.is_changed or any(not is_same_tensor(*pair) for pair in self._contents)

    @property
    def python_values(self) -> list[object]:
        """The numbers and texts of the network now, and the sizes of its containers; equal if none has changed."""
        return self._python.values

    @property
    def created_names(self) -> list[str]:
        """The names of parameters and saved buffers that the network has now, but had not."""
        return [name for name in self._root.state_dict() if name not in self._names]

    @property
    def positions(self) -> list[object]:
        """The positions of counters and generators of the network, which cannot be restored."""
        return self._python.positions

    @property
    def has_changed_parameters(self) -> bool:
        return any(parameter._version != version for parameter, version in self._versions)

    def restore(self) -> None:
        self._python.restore()
        with torch.no_grad():
            for tensor, content in self._contents:
                if not is_same_tensor(tensor, content):
                    tensor.copy_(content)


class GlobalRandomState:
    """The random state of Python and of numpy, which tracing cannot see."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state(legacy=False)

    @property
    def is_changed(self) -> bool:
        return random.getstate() != self._python or repr(np.random.get_state(legacy=False)) != repr(self._numpy)

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)


@contextmanager
def seeded(device: torch.device, seed: int = 0) -> Iterator[None]:
    """Seed torch's generators of the CPU and of `device`, and restore them afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def is_same_tensor(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors have the same dtype, shape and numbers; not-a-number equals itself."""
    if (left.dtype, left.shape, left.layout) != (right.dtype, right.shape, right.layout):
        return False
    if left.layout is not torch.strided:
        left, right = left.to_dense(), right.to_dense()
    if torch.equal(left, right):
        return True
    if not (left.is_floating_point() or left.is_complex()):
        return False
    return bool(((left == right) | (left.isnan() & right.isnan())).all())
