"""One part of a network with its weights: only this part takes memory, only its own tensors are read from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stages.errors import BadWeights, PickledWeights, SharedWeights, WeightsDoNotFit
from stages.models.registry import ModelSpec
from stages.partition.fx_graph import trace
from stages.partition.partition import Part, partition

PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl"})
BATCHES_TRACKED_SUFFIX = (
    ".num_batches_tracked"  # torch's own count in batch norms: no result depends on it, older files lack it
)
META_DEVICE = torch.device("meta")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class _WeightsFile:
    """A weights file: the shapes of all that is in it, and a way to read some of it into memory of its own.

    Views of the mapped file would do, but they start at any byte, where torch's kernels add up in another order: two
    workers with the same weights would differ in their last bits.
    """

    shapes: Mapping[str, Shape]
    read: Callable[[Sequence[str]], dict[str, Tensor]]


def load_part(
    spec: ModelSpec,
    cuts: Sequence[int],
    index: int,
    weights: Path | None,
    seed: int,
    device: str | torch.device,
    training: bool = False,
) -> Part:
    """Part `index` of the network, on `device`, for evaluation unless `training`.

    Without a file the whole network gets the random weights of `seed`, so that all parts together are that network.
    Raises what `partition` raises, `PickledWeights`, `WeightsDoNotFit`, and `BadWeights` for one that cannot be read.
    """
    example = None if spec.input_shape is None else {spec.input_name: torch.empty(spec.input_shape, device=META_DEVICE)}
    if weights is None:
        with torch.random.fork_rng(devices=[]):  # networks are built on the CPU: leave the generators of GPUs alone
            torch.default_generator.manual_seed(seed)
            model = spec.build()
        return partition(model.train(training), cuts, example)[index].to(device)
    _check_kind(weights)
    model = _skeleton(spec).train(training)
    part = partition(model, cuts, example)[index]
    contents = _fitting(model, weights)
    expected = part.state_dict()
    state = contents.read([name for name in expected if name in contents.shapes])
    for name, tensor in expected.items():
        loaded = state[name] if name in state else torch.zeros(tensor.shape, dtype=tensor.dtype)
        state[name] = loaded.to(tensor.dtype)
    part.load_state_dict(state, assign=True)
    assert not _on_meta(part), "a part would be left without some of its numbers"
    return part.to(device)


def load_trainable_part(
    spec: ModelSpec,
    cuts: Sequence[int],
    index: int,
    weights: Path | None,
    seed: int,
    device: str | torch.device,
) -> tuple[Part, Part | None]:
    """Part `index` of the network as it is trained, and as it is evaluated: two graphs over the same modules.

    None for the second where the network in evaluation has no such cut. The network is built as it would be in one
    piece, so that its weights are those that the uncut network begins with. Raises what `load_part` raises, and
    `SharedWeights`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = spec.build()
    if weights is not None:
        _check_kind(weights)
        contents = _fitting(model, weights)
        model.load_state_dict(contents.read(list(contents.shapes)), strict=False)
    trained = trace(model.train())
    parts = partition(trained, cuts)
    _check_shared(parts)
    evaluated = trace(model.eval())
    ends = [trained.layer_names[cut - 1] for cut in cuts]
    same = set(ends) <= set(evaluated.layer_names)
    evaluation = (
        partition(evaluated, [evaluated.layer_names.index(name) + 1 for name in ends])[index].to(device)
        if same
        else None
    )
    return parts[index].to(device).train(), evaluation


def _check_shared(parts: Sequence[Part]) -> None:
    owners: dict[int, int] = {}
    for index, part in enumerate(parts):
        for name, parameter in part.named_parameters():
            first = owners.setdefault(id(parameter), index)
            if first != index:
                raise SharedWeights(name, first, index)


def _skeleton(spec: ModelSpec) -> nn.Module:
    """The network without numbers; built in full where some are in no file, or are looked at while it is built."""
    try:
        with META_DEVICE:
            model = spec.build()
    except (NotImplementedError, RuntimeError):  # it looked at a value, of which there is none on the meta device
        return spec.build()
    kept = model.state_dict().keys()
    in_no_file = any(name not in kept for name, _ in model.named_buffers())
    return spec.build() if in_no_file or _has_bare_tensors(model) else model


def _has_bare_tensors(model: nn.Module) -> bool:
    return any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())


def _on_meta(part: Part) -> bool:
    return any(tensor.is_meta for tensor in (*part.parameters(), *part.buffers()))


def _fitting(model: nn.Module, weights: Path) -> _WeightsFile:
    """What is in a file that fits the whole network. Raises `WeightsDoNotFit`, and what reading it raises."""
    contents = _open_safetensors(weights) if weights.suffix != ".weights" else _darknet(model, weights)
    _check_fit(weights, model.state_dict(), contents.shapes)
    return contents


def _check_kind(path: Path) -> None:
    if path.suffix in PICKLE_SUFFIXES:
        raise PickledWeights(str(path))
    if path.suffix not in (".safetensors", ".weights"):
        raise BadWeights(str(path), f"expected .safetensors or .weights, got {path.suffix or 'no ending'}")
    if not path.is_file():
        raise BadWeights(str(path), "there is no such file")


def _check_fit(path: Path, expected: Mapping[str, Tensor], actual: Mapping[str, Shape]) -> None:
    """The file is compared with the whole network, so that every worker says the same of a wrong one."""
    for name, tensor in expected.items():
        if actual.get(name) != tuple(tensor.shape) and not (
            name not in actual and name.endswith(BATCHES_TRACKED_SUFFIX)
        ):
            raise WeightsDoNotFit(str(path), name, tuple(tensor.shape), actual.get(name))
    for name, shape in actual.items():
        if name not in expected:
            raise WeightsDoNotFit(str(path), name, None, shape)


def _open_safetensors(path: Path) -> _WeightsFile:
    def read(names: Sequence[str]) -> dict[str, Tensor]:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in names}

    try:
        with safe_open(path, framework="pt") as file:
            names: list[str] = list(file.keys())
            return _WeightsFile({name: tuple(file.get_slice(name).get_shape()) for name in names}, read)
    except (SafetensorError, OSError) as problem:
        raise BadWeights(str(path), f"is no safetensors file: {problem}") from problem


def _darknet(model: nn.Module, path: Path) -> _WeightsFile:
    from stages.models.darknet_layers import Darknet
    from stages.models.darknet_weights import darknet_state_dict

    if not isinstance(model, Darknet):
        raise BadWeights(str(path), f"holds weights for Darknet's networks, the model is {type(model).__name__}")
    state = darknet_state_dict(model, path)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return _WeightsFile(shapes, lambda names: {name: state[name].clone() for name in names})
