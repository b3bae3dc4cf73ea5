"""A weights file is checked against its network as a whole; tied names, dtypes and lacking tensors are handled."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from brokers.errors import UsageError
from stages.loading import weights_file
from stages.loading.model_builder import build_without_parameters
from stages.loading.weights_file import PUBLISHED_WEIGHTS, WeightsFile, find_weights
from stages.models.darknet import Darknet, save_darknet_weights
from stages.models.registry import ModelSpec, get_model_spec
from tests.support.errors import raises_error
from tests.support.training.networks import randomize_parameters


class Tied(nn.Module):
    """The embedding is also the weight of the head, under the names of two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x))  # type: ignore[no-any-return]


class SharedMemory(nn.Module):
    """Two parameters with the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(4, 4))
        self.second = nn.Parameter(self.first.data)


def small_network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def on_meta(build: Callable[[], nn.Module]) -> Any:
    return build_without_parameters(ModelSpec("net", build), 0)


def save(state: dict[str, Tensor], folder: Path) -> Path:
    path = folder / "net.safetensors"
    save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    return path


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


# Reading ------------------------------------------------------------------------------------------------------------


def test_only_the_named_tensors_are_read_as_copies(tmp_path: Path) -> None:
    state = randomize_parameters(small_network()).state_dict()
    file = WeightsFile(save(state, tmp_path), on_meta(small_network))
    names = ["0.bias", "1.running_mean"]
    read = file.read(names)
    assert_same(read, {name: state[name] for name in names})
    read["0.bias"].zero_()
    assert torch.equal(file.read(names)["0.bias"], state["0.bias"])
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read.values())  # as torch allocates them


def test_whole_network_is_assigned(tmp_path: Path) -> None:
    expected = randomize_parameters(small_network()).requires_grad_(False)
    model = on_meta(lambda: small_network().requires_grad_(False))
    WeightsFile(save(expected.state_dict(), tmp_path), model).assign(model)
    assert_same(model.state_dict(), expected.state_dict())
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("of_network", "of_file"),
    [
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
    ],
)
def test_weights_have_the_dtype_of_the_network(of_network: torch.dtype, of_file: torch.dtype, tmp_path: Path) -> None:
    saved = {name: tensor.to(of_file) for name, tensor in nn.Linear(4, 4).state_dict().items()}
    model = on_meta(lambda: nn.Linear(4, 4).to(of_network))
    file = WeightsFile(save(saved, tmp_path), model)
    expected = {name: tensor.to(of_network) for name, tensor in saved.items()}
    assert_same(file.read(expected), expected)
    file.assign(model)
    assert_same(model.state_dict(), expected)


def test_file_may_lack_counters_and_tensors_that_are_not_required(tmp_path: Path) -> None:
    state = randomize_parameters(small_network()).state_dict()
    path = save({name: state[name] for name in state if name not in ("1.num_batches_tracked", "3.bias")}, tmp_path)
    model = on_meta(small_network)
    file = WeightsFile(path, model)
    file.require(name for name in state if name != "3.bias")
    with raises_error(UsageError, "WeightsDoNotFit", match=r"expected '3.bias' of shape \[3\]"):
        file.require(state)
    expected = state | {"1.num_batches_tracked": torch.tensor(0), "3.bias": torch.zeros(3)}
    assert_same(file.read(state), expected)
    file.assign(model)
    assert_same(model.state_dict(), expected)


def test_lazy_parameters_take_their_shape_from_the_file(tmp_path: Path) -> None:
    expected = nn.Linear(6, 3)
    model = on_meta(lambda: nn.LazyLinear(3))
    WeightsFile(save(expected.state_dict(), tmp_path), model).assign(model)
    assert_same(model.state_dict(), expected.state_dict())


def test_darknet_file_is_read(tmp_path: Path) -> None:
    spec = get_model_spec("yolov3-tiny")
    expected = randomize_parameters(spec.build())
    assert isinstance(expected, Darknet)
    save_darknet_weights(expected, tmp_path / "tiny.weights")
    file = WeightsFile(tmp_path / "tiny.weights", on_meta(spec.build))
    assert_same(file.read(expected.state_dict()), expected.state_dict())
    (tmp_path / "tiny.weights").write_bytes((tmp_path / "tiny.weights").read_bytes()[:1_000_000])
    with raises_error(UsageError, "DarknetTruncated"):
        WeightsFile(tmp_path / "tiny.weights", on_meta(spec.build))


# Tied tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("absent", ["embedding.weight", "head.weight", None])
def test_tied_tensor_is_taken_from_any_of_its_names(absent: str | None, tmp_path: Path) -> None:
    state = randomize_parameters(Tied()).state_dict()
    path = save({name: state[name] for name in state if name != absent}, tmp_path)
    model = on_meta(Tied)
    file = WeightsFile(path, model)
    read = file.read(state)
    assert_same(read, state)
    assert read["head.weight"] is read["embedding.weight"]
    file.assign(model)
    assert_same(model.state_dict(), state)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("build", [Tied, SharedMemory])
def test_names_that_save_model_leaves_out_are_found(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    expected = randomize_parameters(build())
    path = tmp_path / "net.safetensors"
    save_model(expected, str(path))
    model = on_meta(build)
    file = WeightsFile(path, model)
    assert_same(file.read(expected.state_dict()), expected.state_dict())
    file.assign(model)
    assert_same(model.state_dict(), expected.state_dict())


def test_last_of_tied_names_with_different_values_is_used_by_all_parts(tmp_path: Path) -> None:
    state = Tied().state_dict()
    different = state | {"embedding.weight": torch.ones(9, 4), "head.weight": torch.zeros(9, 4)}
    loaded = Tied()
    loaded.load_state_dict(different)
    file = WeightsFile(save(different, tmp_path), on_meta(Tied))
    for name in ("embedding.weight", "head.weight"):
        assert torch.equal(file.read([name])[name], loaded.state_dict()[name])


# Errors -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "fields", "text"),
    [
        (
            {"3.weight": torch.zeros(5, 8)},
            {"tensor": "3.weight", "expected": (3, 8), "actual": (5, 8)},
            r"\[3, 8\].*\[5, 8\]",
        ),
        ({"3.bias": None}, {"tensor": "3.bias", "expected": (3,), "actual": None}, "no such tensor"),
        (
            {"3.bias": None, "3.biass": torch.zeros(3)},
            {"tensor": "3.bias", "expected": (3,), "actual": None},
            "no such tensor .did you mean '3.biass'",
        ),
        (
            {"3.biass": torch.zeros(1)},
            {"tensor": "3.biass", "expected": None, "actual": (1,)},
            "it has '3.biass', which the network has not .did you mean '3.bias'",
        ),
    ],
)
def test_weights_of_another_network_are_refused(
    change: dict[str, Tensor | None], fields: dict[str, object], text: str, tmp_path: Path
) -> None:
    state = {**small_network().state_dict(), **change}
    path = save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path)
    with raises_error(UsageError, "WeightsDoNotFit", match=text) as caught:
        WeightsFile(path, on_meta(small_network)).require(state)
    assert caught.value.fields == {"path": str(path), **fields}
    assert caught.value.key == "pipeline.weights"


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.encoder."])
def test_prefix_of_all_names_is_reported(prefix: str, tmp_path: Path) -> None:
    plain = small_network().state_dict()
    prefixed = {prefix + name: tensor for name, tensor in plain.items()}
    with raises_error(UsageError, "WeightsDoNotFit", match=f"its names begin with '{prefix}'.*save them without it"):
        WeightsFile(save(prefixed, tmp_path), on_meta(small_network))

    def wrapped() -> nn.Module:
        model: nn.Module = small_network()
        for name in reversed(prefix.rstrip(".").split(".")):
            model = nn.ModuleDict({name: model})
        return model

    with raises_error(UsageError, "WeightsDoNotFit", match=f"of the network begin with '{prefix}'.*save them with it"):
        WeightsFile(save(plain, tmp_path), on_meta(wrapped))


@pytest.mark.parametrize("checkpoint", [None, "state_dict", "model_state_dict", "model"])
def test_printed_conversion_of_a_pickle_runs(checkpoint: str | None, tmp_path: Path) -> None:
    expected: Any = randomize_parameters(Tied())
    expected.head.weight.data = expected.head.weight.data.t().contiguous().t()
    state = expected.state_dict()
    path = tmp_path / 'my "best" net.pt'
    torch.save({checkpoint: state, "epoch": 3} if checkpoint else state, path)
    with raises_error(UsageError, "PickledWeights", match="can execute any code.*save_model") as caught:
        WeightsFile(path, on_meta(Tied))
    assert "\n" not in str(caught.value)
    command = str(caught.value).split("`")[1]
    subprocess.run(["bash", "-c", command], check=True, timeout=120)
    file = WeightsFile(path.with_suffix(".safetensors"), on_meta(Tied))
    assert_same(file.read(state), state)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl"])
def test_pickle_is_refused_unread(suffix: str, tmp_path: Path) -> None:
    with raises_error(UsageError, "PickledWeights"):
        WeightsFile(tmp_path / f"net{suffix}", small_network())


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("net.onnx", b"", "is not .safetensors or .weights, but .onnx"),
        ("net", b"", "but no suffix"),
        ("absent.safetensors", None, "does not exist"),
        ("net.safetensors", b"not at all", "is not a safetensors file"),
        ("net.weights", b"\0" * 64, "has weights of a Darknet network, the model is Sequential"),
    ],
)
def test_files_without_weights_are_refused(name: str, content: bytes | None, problem: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with raises_error(UsageError, "BadWeights", match=problem):
        WeightsFile(tmp_path / name, small_network())


# Published files ----------------------------------------------------------------------------------------------------


def test_existing_file_is_returned(tmp_path: Path) -> None:
    (tmp_path / "my.weights").write_bytes(b"w")
    assert find_weights(str(tmp_path / "my.weights")) == tmp_path / "my.weights"


def test_unknown_name_lists_the_registered_ones() -> None:
    with raises_error(UsageError, "UnknownWeights", match="'yolov9': expected a file, or one of yolov3, yolov3-tiny"):
        find_weights("yolov9")


def test_registered_name_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = ("toy.weights", hashlib.sha256(b"right").hexdigest(), ())
    monkeypatch.setattr(weights_file, "PUBLISHED_WEIGHTS", {"toy": published})
    (tmp_path / "toy.weights").write_bytes(b"right")
    assert find_weights("toy", cache=tmp_path) == tmp_path / "toy.weights"


def test_registered_weights_have_a_checksum_and_an_origin() -> None:
    for name, (_, sha256, origins) in PUBLISHED_WEIGHTS.items():
        assert len(bytes.fromhex(sha256)) == 32, name
        assert origins, name
