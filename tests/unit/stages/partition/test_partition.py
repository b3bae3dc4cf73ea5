"""A partitioned network computes what the whole network computes, with its names and its state."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.resnet import BasicBlock, ResNet

from brokers.errors import UsageError
from stages.models import yolov3 as yolo
from stages.models.darknet import Convolutional, Darknet
from stages.models.vgg import SmallVgg
from stages.partition.partition import fingerprint, partition
from stages.partition.tracing import TracedModel, trace
from tests.support.errors import raises_error
from tests.support.training.networks import randomize_parameters
from tests.support.training.partition_checks import (
    Function,
    FunctionNetwork,
    check_all_cuts,
    is_same,
    name_outputs,
    run_parts,
    spread_cuts,
)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def narrow_yolov3() -> Darknet:
    """YOLOv3 with an eighth of its channels."""
    rows = [
        row if row.kind is not Convolutional or row.linear else replace(row, filters=row.filters // 8)
        for row in yolo.yolov3_rows(80)
    ]
    return Darknet(rows, 80)


def short_mobilenet_v3() -> MobileNetV3:
    """MobileNetV3 with one block of each kind: with and without expansion, squeeze-excitation and residual."""
    blocks = [
        InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
        InvertedResidualConfig(16, 3, 72, 24, False, "RE", 2, 1, 1.0),
        InvertedResidualConfig(24, 5, 96, 24, True, "HS", 1, 1, 1.0),
    ]
    return MobileNetV3(blocks, 64, num_classes=10)


# Networks small enough to be cut at each of their layers.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "vgg": lambda: SmallVgg("vgg11-small"),
    "resnet": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10),
    "mobilenet": short_mobilenet_v3,
    "yolov3-tiny": yolo.yolov3_tiny,
    "yolov3": narrow_yolov3,
}


@cache
def network(name: str) -> tuple[TracedModel, Tensor, dict[str, Tensor]]:
    """Return a traced network, a batch of two pictures (2, 3, 32, 32), and the outputs for it."""
    return traced_example(NETWORKS[name](), 32)


def traced_example(model: nn.Module, side: int) -> tuple[TracedModel, Tensor, dict[str, Tensor]]:
    randomize_parameters(model).eval()
    pictures = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        outputs = name_outputs(model(pictures))
    assert all(tensor.isfinite().all() and tensor.std() > 0 for tensor in outputs.values())
    return trace(model, {"input": pictures}), pictures, outputs


# Equality with the whole network ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_every_single_cut_gives_the_outputs_of_the_whole(name: str) -> None:
    traced, pictures, expected = network(name)
    with torch.inference_mode():
        wrong = [
            traced.layer_names[cut - 1]
            for cut in range(1, len(traced.layer_names))
            if not is_same(run_parts(partition(traced, [cut]), {"input": pictures}), expected)
        ]
    assert wrong == []


@pytest.mark.parametrize("name", NETWORKS)
def test_two_cuts_give_the_outputs_of_the_whole(name: str) -> None:
    traced, pictures, expected = network(name)
    generator = random.Random(name)
    with torch.inference_mode():
        for _ in range(6):
            cuts = sorted(generator.sample(range(1, len(traced.layer_names)), 2))
            assert is_same(run_parts(partition(traced, cuts), {"input": pictures}), expected), cuts


@pytest.mark.parametrize("name", NETWORKS)
def test_one_part_per_layer_gives_the_outputs_of_the_whole(name: str) -> None:
    traced, pictures, expected = network(name)
    with torch.inference_mode():
        parts = partition(traced, range(1, len(traced.layer_names)))
        assert len(parts) == len(traced.layer_names)
        assert is_same(run_parts(parts, {"input": pictures}), expected)


# The smallest of each family of torchvision's classifiers, and the side of the smallest pictures that it accepts.
FAMILIES = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "resnet50": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "swin_v2_t": 32,
    "vgg11_bn": 32,
    "vit_b_32": 224,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_classifier_of_every_family_can_be_cut(name: str) -> None:
    skip_slow_init = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = models.get_model(name, weights=None, **skip_slow_init)
    traced, pictures, expected = traced_example(model, FAMILIES[name])
    with torch.inference_mode():
        actual = run_parts(partition(traced, spread_cuts(traced, 7)), {"input": pictures})
    assert is_same(actual, expected)


def test_families_are_all_of_torchvision() -> None:
    def family(name: str) -> str:
        module: str = models.get_model_builder(name).__module__
        return module

    assert {family(name) for name in models.list_models(module=models)} == {family(name) for name in FAMILIES}


def test_value_needed_later_passes_through_the_parts_between() -> None:
    traced, pictures, _ = network("yolov3-tiny")
    parts = partition(traced, [10, 12, 14])  # the route at 20 reads layer 8
    assert all("layers.8" in part.output_names for part in parts[:3])
    assert all("layers.8" in part.input_names for part in parts[1:])
    tensors = {"input": pictures}
    with torch.inference_mode():
        for part in parts[:3]:
            tensors = part(tensors)
            assert tuple(tensors) == part.output_names


def test_gradients_through_the_parts_equal_those_of_the_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).train()
    x = torch.rand(2, 4)
    model(x).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for cut in (1, 2):
        model.zero_grad()
        head, tail = partition(model, [cut])
        sent = head({"input": x})
        received = {name: tensor.detach().requires_grad_() for name, tensor in sent.items()}
        torch.autograd.backward(tail(received)["output"].sum())
        (name,) = sent
        torch.autograd.backward(sent[name], received[name].grad)
        actual = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(torch.equal(actual[name], expected[name]) for name in expected)  # type: ignore[arg-type]


# Names --------------------------------------------------------------------------------------------------------------


def test_output_is_named_after_its_layer() -> None:
    traced, pictures, _ = network("vgg")
    head, tail = partition(traced, [11])
    assert (head.input_names, head.output_names) == (("input",), ("features.10",))
    assert (tail.input_names, tail.output_names) == (("features.10",), ("output",))
    assert head({"input": pictures})["features.10"].shape == (2, 256, 4, 4)


def test_outputs_are_named_by_the_structure_of_the_result() -> None:
    def output_names(function: Function) -> tuple[str, ...]:
        parts = partition(FunctionNetwork(function), [1])
        outputs = run_parts(parts, {"input": torch.ones(2, 4)})
        assert tuple(outputs) == parts[-1].output_names
        return parts[-1].output_names

    assert output_names(lambda m, x: x + 1 + 1) == ("output",)
    assert output_names(lambda m, x: (x + 1, x * 2)) == ("0", "1")
    assert output_names(lambda m, x: {"boxes": x + 1, "scores": x * 2}) == ("boxes", "scores")
    assert output_names(lambda m, x: (x + 1 + 1, None)) == ("0",)


def test_several_inputs_are_named_after_the_arguments() -> None:
    class Two(nn.Module):
        def forward(self, image: Tensor, depth: Tensor, scale: float = 2.0) -> Tensor:
            return (image + 1) * depth * scale

    head, tail = partition(Two(), [1])
    assert head.input_names == ("image", "depth")
    assert tail.input_names == ("depth", "add")
    image, depth = torch.rand(1, 3), torch.rand(1, 3)
    assert is_same(run_parts((head, tail), {"image": image, "depth": depth}), {"output": Two()(image, depth)})


# State --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_states_of_the_parts_are_together_that_of_the_whole(name: str) -> None:
    traced, _, _ = network(name)
    whole = traced.model.state_dict()
    parts = partition(traced, spread_cuts(traced, 3))
    together = [(key, tensor) for part in parts for key, tensor in part.module.state_dict().items()]
    assert sorted(key for key, _ in together) == sorted(whole)  # each once, under its own name
    assert all(tensor.data_ptr() == whole[key].data_ptr() for key, tensor in together if tensor.numel())


def test_module_used_on_both_sides_of_a_cut_is_in_both_parts() -> None:
    model = FunctionNetwork(lambda m, x: m.a(m.relu(m.a(x))), a=nn.Linear(4, 4), relu=nn.ReLU())
    head, tail = partition(model, [2])
    assert head.module.state_dict().keys() == tail.module.state_dict().keys() == model.state_dict().keys()
    check_all_cuts(model, torch.rand(3, 4))


def test_parameters_and_buffers_read_by_forward_keep_their_names() -> None:
    class Scaled(nn.Module):
        shift: Tensor
        unsaved: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(4))
            self.register_buffer("shift", torch.rand(4))
            self.register_buffer("unsaved", torch.rand(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale + self.shift + 1 + self.unsaved + torch.tensor([1.0, 2.0, 3.0, 4.0])) * self.scale

    model = Scaled()
    head, tail = partition(model, [3])
    assert set(head.module.state_dict()) == {"scale", "shift"}
    assert set(tail.module.state_dict()) == {"scale"}
    check_all_cuts(model, torch.rand(2, 4))


# Shapes -------------------------------------------------------------------------------------------------------------


def test_shapes_cross_without_data() -> None:
    def flat(m: FunctionNetwork, x: Tensor) -> Tensor:
        rows, columns = x.shape[0], x.size(1) * 2
        return (torch.cat((x, x), dim=1) + 1).relu().reshape(rows, 1, columns)

    traced = trace(FunctionNetwork(flat))
    head, tail = partition(traced, [traced.layer_names.index("relu") + 1])
    assert tail.input_names == ("input:shape", "relu")
    assert head({"input": torch.rand(2, 4)})["input:shape"].numel() == 0
    check_all_cuts(FunctionNetwork(flat), torch.rand(2, 4))


def test_shape_passes_through_the_parts_between() -> None:
    def resize_to_input(m: FunctionNetwork, x: Tensor) -> Tensor:
        y = m.b(m.a(x))
        return F.interpolate(y, size=x.shape[-2:]).to(x.dtype)

    model = FunctionNetwork(resize_to_input, a=nn.Conv2d(3, 4, 3, stride=2), b=nn.Conv2d(4, 4, 3, stride=2))
    head, middle, _ = partition(model, [1, 2])
    assert head.output_names == ("input:shape", "a")
    assert middle.output_names == ("input:shape", "b")
    check_all_cuts(model, torch.rand(2, 3, 17, 19))


# Cuts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "nearest"), [(0, "1, is between 'features.0'"), (-1, "1, is"), (23, "22, is between 'flatten'"), (99, "22")]
)
def test_missing_cut_names_the_nearest(cut: int, nearest: str) -> None:
    expected = f"cut {cut} does not exist: the network has 23 layers and cuts 1 to 22; the nearest, {nearest}"
    with raises_error(UsageError, "NoSuchCut", match=expected) as caught:
        partition(network("vgg")[0], [cut])
    assert caught.value.fields == {"cut": cut, "layers": 23}
    assert caught.value.key == "pipeline.cuts"


def test_network_of_one_layer_cannot_be_cut() -> None:
    with raises_error(UsageError, "NoSuchCut", match="a network of 1 layer cannot be cut"):
        partition(nn.Sequential(nn.ReLU()), [1])


@pytest.mark.parametrize("cuts", [(5, 5), (7, 3)])
def test_cuts_must_increase(cuts: tuple[int, ...]) -> None:
    with raises_error(UsageError, "CutsNotIncreasing") as caught:
        partition(network("vgg")[0], cuts)
    assert caught.value.fields == {"cuts": cuts}


def test_no_cuts_make_one_part() -> None:
    traced, pictures, expected = network("resnet")
    with torch.inference_mode():
        assert is_same(run_parts(partition(traced, []), {"input": pictures}), expected)


# Fingerprints -------------------------------------------------------------------------------------------------------


def test_equal_parts_have_equal_fingerprints() -> None:
    def fingerprints() -> list[str]:
        model = randomize_parameters(models.get_model("shufflenet_v2_x0_5", weights=None)).eval()
        traced = trace(model, {"input": torch.rand(1, 3, 32, 32)})
        return [fingerprint(part) for part in partition(traced, [40, 48])]

    first = fingerprints()
    assert first == fingerprints()
    assert len(set(first)) == 3


def test_one_changed_weight_changes_the_fingerprint() -> None:
    first = nn.Linear(4, 4)
    head, tail = partition(nn.Sequential(first, nn.ReLU(), nn.Linear(4, 4)), [1])
    before = fingerprint(head), fingerprint(tail)
    with torch.no_grad():
        first.weight[3, 3] += 1e-6
    assert fingerprint(head) != before[0]
    assert fingerprint(tail) == before[1]


def test_another_cut_changes_the_fingerprint_of_a_part_without_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh(), nn.ReLU())
    assert fingerprint(partition(model, [1, 2])[1]) != fingerprint(partition(model, [1, 3])[1])


def test_fingerprint_does_not_depend_on_object_addresses() -> None:
    def fingerprints() -> list[str]:
        def mix(m: FunctionNetwork, x: Tensor) -> Tensor:
            a, b, c = x + 1, x + 2, x + 3
            return torch.relu(x).reshape(a.shape[0], b.size(1), c.shape[2])

        return [fingerprint(part) for part in partition(FunctionNetwork(mix), [4])]

    assert len({tuple(fingerprints()) for _ in range(20)}) == 1
