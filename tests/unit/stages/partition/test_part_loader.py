"""A part and its weights: from a file only what it needs, from a seed what every other part would get as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from brokers.errors import BadFile
from stages.errors import DarknetTruncated, PickledWeights, WeightsDoNotFit
from stages.models.darknet_layers import Darknet
from stages.models.darknet_weights import save_darknet_weights
from stages.models.registry import ModelSpec, get_model_spec
from stages.partition.part_loader import load_part
from stages.partition.partition import Part
from tests.support.training.networks import randomize_parameters

RESNET_CUTS = [12, 40]


def spec_of(build: Callable[[], nn.Module], shape: tuple[int, ...] | None = None) -> ModelSpec:
    return ModelSpec("net", build, input_shape=shape)


def all_parts(spec: ModelSpec, cuts: list[int], weights: Path | None, seed: int = 0) -> list[Part]:
    return [load_part(spec, cuts, index, weights, seed, "cpu") for index in range(len(cuts) + 1)]


def run(parts: list[Part], x: Tensor) -> dict[str, Tensor]:
    tensors = {"input": x}
    with torch.inference_mode():
        for part in parts:
            tensors = part(tensors)
    return tensors


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def resnet_file(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = randomize_parameters(models.resnet18()).eval()
    path = tmp_path / "resnet18.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def test_parts_from_a_file_together_are_the_network_of_that_file(resnet_file: tuple[nn.Module, Path]) -> None:
    model, path = resnet_file
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    parts = all_parts(get_model_spec("torchvision:resnet18"), RESNET_CUTS, path)
    assert torch.equal(run(parts, x)["output"], expected)
    assert all(part.batchable and not part.training for part in parts)


def test_a_part_reads_only_its_own_tensors(
    resnet_file: tuple[nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import stages.partition.part_loader

    read: list[str] = []
    really = stages.partition.part_loader._open_safetensors

    def noting(path: Path) -> stages.partition.part_loader._WeightsFile:
        contents = really(path)

        def reading(names: Sequence[str]) -> dict[str, Tensor]:
            read.extend(names)
            return contents.read(names)

        return stages.partition.part_loader._WeightsFile(contents.shapes, reading)

    monkeypatch.setattr(stages.partition.part_loader, "_safetensors", noting)
    part = load_part(get_model_spec("torchvision:resnet18"), RESNET_CUTS, 0, resnet_file[1], 0, "cpu")
    assert set(read) == set(part.state_dict())
    assert len(read) < 40


def test_parts_from_a_seed_together_are_the_network_of_that_seed() -> None:
    torch.manual_seed(7)
    expected = models.resnet18().eval()
    x = torch.rand(1, 3, 64, 64)
    parts = all_parts(get_model_spec("torchvision:resnet18"), RESNET_CUTS, None, seed=7)
    with torch.inference_mode():
        assert torch.equal(run(parts, x)["output"], expected(x))
    assert not torch.equal(
        run(all_parts(get_model_spec("torchvision:resnet18"), [12], None, seed=8), x)["output"], expected(x)
    )


def test_a_seed_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_part(spec_of(small), [1], 0, None, 5, "cpu")
    assert torch.equal(torch.rand(3), expected)


def test_a_part_for_training_is_in_that_mode() -> None:
    part = load_part(spec_of(small), [1], 1, None, 0, "cpu", training=True)
    assert part.training
    assert all(module.training for module in part.modules())


@pytest.mark.parametrize("name", ["torchvision:regnet_x_400mf", "torchvision:swin_t", "torchvision:googlenet"])
def test_networks_that_look_at_numbers_while_they_are_built_can_be_loaded(name: str, tmp_path: Path) -> None:
    spec = get_model_spec(name)
    model = randomize_parameters(spec.build()).eval()
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    assert torch.equal(run(all_parts(spec, [9], tmp_path / "net.safetensors"), x)["output"], expected)


def test_numbers_that_are_in_no_file_are_still_there(tmp_path: Path) -> None:
    class Positions(nn.Module):
        steps: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.register_buffer("steps", torch.arange(4.0), persistent=False)
            self.bare = torch.arange(4.0) * 10

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + self.steps + self.bare

    save_file({"weight": torch.full((4,), 2.0)}, tmp_path / "net.safetensors")
    parts = all_parts(spec_of(Positions), [1], tmp_path / "net.safetensors")
    assert run(parts, torch.ones(1, 4))["output"].tolist() == [[2.0, 13.0, 24.0, 35.0]]


def test_weights_of_another_dtype_become_the_networks_own(tmp_path: Path) -> None:
    model = small()
    save_file(
        {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()},
        tmp_path / "h.safetensors",
    )
    part = load_part(spec_of(small), [1], 0, tmp_path / "h.safetensors", 0, "cpu")
    assert part.state_dict()["0.weight"].dtype == torch.float32
    torch.testing.assert_close(part.state_dict()["0.weight"], model.state_dict()["0.weight"], rtol=1e-3, atol=1e-3)


def test_a_file_without_batch_counts_fits(tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in small().state_dict().items() if "num_batches" not in name}
    save_file(state, tmp_path / "net.safetensors")
    part = load_part(spec_of(small), [1], 1, tmp_path / "net.safetensors", 0, "cpu")
    assert part.state_dict()["1.num_batches_tracked"].item() == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"3.weight": torch.zeros(5, 8)}, r"expected '3.weight' of shape \[3, 8\], the file has \[5, 8\]"),
        ({"3.bias": None}, r"expected '3.bias' of shape \[3\], the file has none of that name"),
        ({"4.bias": torch.zeros(1)}, "it has a tensor '4.bias', the network has none of that name"),
    ],
)
@pytest.mark.parametrize("index", [0, 1])
def test_weights_that_do_not_fit_are_refused_by_every_part(
    index: int, change: dict[str, Tensor | None], text: str, tmp_path: Path
) -> None:
    state = {**small().state_dict(), **change}
    path = tmp_path / "other.safetensors"
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
    with pytest.raises(WeightsDoNotFit, match=text) as failure:
        load_part(spec_of(small), [1], index, path, 0, "cpu")
    assert str(path) in str(failure.value)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
def test_pickles_are_refused_unread_with_the_way_to_convert_them(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(PickledWeights, match=r"can run any code.*save_file"):
        load_part(spec_of(small), [1], 0, tmp_path / f"net{suffix}", 0, "cpu")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("net.onnx", b"", "expected .safetensors or .weights, got .onnx"),
        ("net", b"", "got no ending"),
        ("absent.safetensors", None, "there is no such file"),
        ("net.safetensors", b"not at all", "is no safetensors file"),
        ("net.weights", b"\0" * 64, "holds weights for Darknet's networks, the model is Sequential"),
    ],
)
def test_files_that_hold_no_weights_are_refused(name: str, content: bytes | None, problem: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadFile, match=problem):
        load_part(spec_of(small), [1], 0, tmp_path / name, 0, "cpu")


def test_parts_from_darknets_own_file_are_the_network_of_that_file(tmp_path: Path) -> None:
    spec = get_model_spec("yolov3-tiny")
    model = randomize_parameters(spec.build()).eval()
    assert isinstance(model, Darknet)
    path = tmp_path / "tiny.weights"
    save_darknet_weights(model, path)
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
    actual = run(all_parts(spec, [8, 13], path), x)
    assert all(torch.equal(actual[str(index)], tensor) for index, tensor in enumerate(expected))
    path.write_bytes(path.read_bytes()[:1_000_000])
    with pytest.raises(DarknetTruncated):
        load_part(spec, [8, 13], 0, path, 0, "cpu")


def test_parts_with_the_same_weights_have_the_same_state_wherever_they_come_from(tmp_path: Path) -> None:
    spec = spec_of(partial(randomize_parameters, small()), (1, 4))
    save_file(spec.build().state_dict(), tmp_path / "net.safetensors")
    one = load_part(spec, [2], 0, tmp_path / "net.safetensors", 0, "cpu")
    other = load_part(spec, [2], 0, None, 3, "cpu")
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
