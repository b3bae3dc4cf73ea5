"""A network that is cut computes what it computed uncut, wherever it is cut, and changes nothing that it is given."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from stages.errors import CannotTrace, CutsNotIncreasing, NonTensorValue, NoSuchCut, TensorMissing
from stages.models.yolov3 import yolov3, yolov3_tiny
from stages.partition.fx_graph import TracedModel, trace
from stages.partition.partition import Part, fingerprint, layer_names, partition
from tests.support.training.networks import randomize_parameters

BATCH = 2
Function = Callable[["Small", Tensor], Any]
EVERY_CUT = ("vgg11", "resnet18", "mobilenet_v3_small", "yolov3-tiny", "yolov3")
# One of each family of torchvision's classifiers, the smallest, and the side of the smallest pictures it takes.
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
    "mobilenet_v3_large": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "resnet50": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "swin_v2_t": 32,
    "vgg11_bn": 32,
    "vit_b_32": 224,
    "wide_resnet50_2": 32,
}
# Cut where a tensor is permuted in memory: the wire makes it contiguous, and torch then takes another kernel, which
# adds up in another order. All others are equal to the last bit.
REORDERED = {"maxvit_t": 1e-5}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def network(name: str) -> tuple[TracedModel, Tensor, dict[str, Tensor]]:
    """A network with numbers of its own, two pictures (B, 3, H, W), and what it says of them uncut."""
    if name in ("yolov3", "yolov3-tiny", "vgg11"):
        with torch.device("meta"):  # their own initialisation takes seconds
            made = models.vgg11() if name == "vgg11" else yolov3() if name == "yolov3" else yolov3_tiny()
        made = made.to_empty(device="cpu")
    else:
        quick = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        made = models.get_model(name, weights=None, **quick)
    model = randomize_parameters(made).eval()
    side = 32 if name == "yolov3" else FAMILIES.get(name, 64)  # of 106 cuts each takes its time
    pictures = torch.rand(BATCH, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = model(pictures)
    answer = {"output": whole} if isinstance(whole, Tensor) else {str(i): item for i, item in enumerate(whole)}
    assert all(tensor.isfinite().all() and tensor.std() > 0 for tensor in answer.values())
    return trace(model), pictures, answer


def run(parts: Sequence[Part], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each part in turn, with the wire between them; whatever goes into a part must be the same afterwards."""
    given = dict(tensors)
    for part in parts:
        given = {name: load(save({name: tensor.contiguous()}))[name] for name, tensor in given.items()}
        before = {name: tensor.clone() for name, tensor in given.items()}
        result = part(given)
        assert list(given) == list(before)
        assert all(torch.equal(given[name], before[name]) for name in before)
        given = result
    return given


def same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 0.0) -> bool:
    """Equal names and equal numbers; `tolerance` is relative to the largest number."""
    return list(actual) == list(expected) and all(
        actual[name].shape == tensor.shape and (actual[name] - tensor).abs().max() <= tolerance * tensor.abs().max()
        for name, tensor in expected.items()
    )


def evenly(traced: TracedModel, count: int) -> list[int]:
    last = len(traced.layer_names) - 1
    return sorted({max(1, round(last * (step + 1) / (count + 1))) for step in range(count)})


class Small(nn.Module):
    """A network out of one function of its layers, for one point at a time."""

    a: nn.Module
    attention: nn.Module
    b: nn.Module
    between: nn.Module
    conv: nn.Module
    dropout: nn.Module
    lstm: nn.Module
    pick: nn.Module
    relu: nn.Module
    shared: nn.Module

    def __init__(self, function: Function, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def check_all_cuts(model: nn.Module | list[nn.Module], x: Tensor) -> None:
    """Every single cut, and all cuts at once, against the uncut network."""
    traced = trace(model)
    with torch.no_grad():
        whole = traced.model(x.clone())
        expected = {"output": whole} if isinstance(whole, Tensor) else {str(i): v for i, v in enumerate(whole)}
        count = len(traced.layer_names)
        for cuts in [*([cut] for cut in range(1, count)), list(range(1, count))]:
            assert same(run(partition(traced, cuts), {"input": x}), expected), f"cuts {cuts} of {traced.layer_names}"


# Cut equals uncut -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_CUT)
def test_every_single_cut_gives_the_outputs_of_the_uncut_network(name: str) -> None:
    traced, pictures, expected = network(name)
    with torch.inference_mode():
        wrong = [
            traced.layer_names[cut - 1]
            for cut in range(1, len(traced.layer_names))
            if not same(run(partition(traced, [cut]), {"input": pictures}), expected)
        ]
    assert wrong == []


@pytest.mark.parametrize("name", EVERY_CUT)
def test_two_cuts_give_the_outputs_of_the_uncut_network(name: str) -> None:
    traced, pictures, expected = network(name)
    chance = random.Random(name)
    with torch.inference_mode():
        for _ in range(6):
            cuts = sorted(chance.sample(range(1, len(traced.layer_names)), 2))
            assert same(run(partition(traced, cuts), {"input": pictures}), expected), cuts


@pytest.mark.parametrize("name", [name for name in EVERY_CUT if name != "vgg11"])
def test_a_part_for_each_layer_gives_the_outputs_of_the_uncut_network(name: str) -> None:
    traced, pictures, expected = network(name)
    with torch.inference_mode():
        parts = partition(traced, range(1, len(traced.layer_names)))
        assert len(parts) == len(traced.layer_names)
        assert same(run(parts, {"input": pictures}), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_classifiers_of_every_family_can_be_cut(name: str) -> None:
    traced, pictures, expected = network.__wrapped__(name)  # not kept: together they are large
    with torch.inference_mode():
        for cuts in [*([cut] for cut in evenly(traced, 3)), evenly(traced, 7)]:
            actual = run(partition(traced, cuts), {"input": pictures})
            assert same(actual, expected, REORDERED.get(name, 0.0)), [traced.layer_names[cut - 1] for cut in cuts]


def test_no_family_of_torchvision_is_left_out() -> None:
    def family(name: str) -> str:
        module: str = models.get_model_builder(name).__module__
        return module

    tried = {family(name) for name in (*FAMILIES, *EVERY_CUT) if not name.startswith("yolo")}
    assert {family(name) for name in models.list_models(module=models)} == tried


def test_a_cut_inside_a_residual_block_carries_the_shortcut_along() -> None:
    traced, _, _ = network("resnet18")
    cut = traced.layer_names.index("layer1.0.conv2")
    _, tail = partition(traced, [cut])
    assert len(tail.input_names) == 2


def test_a_value_needed_later_passes_through_the_parts_between() -> None:
    traced, pictures, _ = network("yolov3-tiny")
    parts = partition(traced, [10, 12, 14])  # layer 8 is read again by the route at 20
    assert all("layers.8" in part.output_names for part in parts[:3])
    assert all("layers.8" in part.input_names for part in parts[1:])
    given = {"input": pictures}
    with torch.inference_mode():
        for part in parts[:3]:
            given = part(given)
            assert tuple(given) == part.output_names


def test_gradients_flow_through_the_parts_as_through_the_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)).train()
    x = torch.rand(2, 4)
    model(x).sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for cut in (1, 2):
        model.zero_grad()
        head, tail = partition(model, [cut])
        sent = head({"input": x})
        arrived = {name: tensor.detach().requires_grad_() for name, tensor in sent.items()}
        tail(arrived)["output"].sum().backward()
        (name,) = sent
        sent[name].backward(arrived[name].grad)
        actual = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert all(torch.equal(actual[name], expected[name]) for name in expected)  # type: ignore[arg-type]


# Names ------------------------------------------------------------------------------------------------------------


def test_layers_are_named_as_in_the_network() -> None:
    assert layer_names(network("vgg11")[0])[:3] == ("features.0", "features.1", "features.2")
    assert layer_names(network("vgg11")[0])[20:24] == ("features.20", "avgpool", "flatten", "classifier.0")
    assert layer_names(network("yolov3-tiny")[0]) == tuple(f"layers.{index}" for index in range(24))
    assert len(layer_names(network("yolov3")[0])) == 107


def test_what_crosses_a_cut_is_named_after_its_layer() -> None:
    traced, _, _ = network("vgg11")
    head, tail = partition(traced, [11])
    assert (head.input_names, head.output_names) == (("input",), ("features.10",))
    assert (tail.input_names, tail.output_names) == (("features.10",), ("output",))
    with torch.inference_mode():
        crossing = head({"input": torch.zeros(1, 3, 224, 224)})
    assert crossing["features.10"].shape == (1, 256, 28, 28)


def test_a_layer_that_is_used_twice_has_two_names() -> None:
    names = layer_names(network("resnet18")[0])
    assert {"layer1.0.relu", "layer1.0.relu_1"} <= set(names)
    assert len(set(names)) == len(names)


def test_outputs_are_named_by_the_structure_of_the_result() -> None:
    def outputs(function: Function) -> tuple[str, ...]:
        *_, last = partition(Small(function), [1])
        given = run(partition(Small(function), [1]), {"input": torch.ones(2, 4)})
        assert tuple(given) == last.output_names
        return last.output_names

    assert outputs(lambda m, x: x + 1 + 1) == ("output",)
    assert outputs(lambda m, x: (x + 1, x * 2)) == ("0", "1")
    assert outputs(lambda m, x: {"boxes": x + 1, "scores": x * 2}) == ("boxes", "scores")
    assert outputs(lambda m, x: (x + 1 + 1, None)) == ("0",)


def test_several_inputs_have_the_names_of_the_arguments() -> None:
    class Two(nn.Module):
        def forward(self, image: Tensor, depth: Tensor, scale: float = 2.0) -> Tensor:
            return (image + 1) * depth * scale

    head, tail = partition(Two(), [1])
    assert head.input_names == ("image", "depth")
    assert tail.input_names == ("depth", "add")
    image, depth = torch.rand(1, 3), torch.rand(1, 3)
    assert same(run((head, tail), {"image": image, "depth": depth}), {"output": Two()(image, depth)})


def test_an_argument_with_a_default_keeps_it() -> None:
    class WithTargets(nn.Module):
        def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
            y = x * 2 + 1
            return y if targets is None else F.mse_loss(y, targets)

    parts = partition(WithTargets(), [1])
    assert parts[0].input_names == ("input",)
    assert same(run(parts, {"input": torch.ones(1, 2)}), {"output": torch.full((1, 2), 3.0)})


# State ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_CUT)
def test_the_states_of_the_parts_together_are_the_state_of_the_network(name: str) -> None:
    traced, _, _ = network(name)
    whole = traced.model.state_dict()
    parts = partition(traced, evenly(traced, 3))
    together = [(key, tensor) for part in parts for key, tensor in part.state_dict().items()]
    assert sorted(key for key, _ in together) == sorted(whole)  # each once, under its own name
    assert all(tensor.data_ptr() == whole[key].data_ptr() for key, tensor in together if tensor.numel())


def test_a_module_on_both_sides_of_a_cut_is_in_both_parts() -> None:
    model = Small(lambda m, x: m.shared(m.between(m.shared(x))), shared=nn.Linear(4, 4), between=nn.ReLU())
    head, tail = partition(model, [2])
    assert head.state_dict().keys() == tail.state_dict().keys() == model.state_dict().keys()
    check_all_cuts(model, torch.rand(3, 4))


def test_parameters_and_buffers_read_by_the_forward_itself_keep_their_names() -> None:
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
    assert set(head.state_dict()) == {"scale", "shift"}
    assert set(tail.state_dict()) == {"scale"}
    check_all_cuts(model, torch.rand(2, 4))


# What crosses -----------------------------------------------------------------------------------------------------


def test_tuples_cross_item_by_item() -> None:
    def halves(m: Small, x: Tensor) -> Any:
        left, right = (x + 1).chunk(2, dim=1)
        return torch.cat((right * 2, left), dim=1)

    head, _ = partition(Small(halves), [2])
    assert sorted(head({"input": torch.rand(2, 4)})) == ["chunk[0]", "chunk[1]"]
    check_all_cuts(Small(halves), torch.rand(2, 4))


def test_tuples_in_tuples_cross() -> None:
    def last_state(m: Small, x: Tensor) -> Any:
        output, (hidden, cell) = m.lstm(x)
        return output.sum() + hidden.sum() * 2 + cell.sum() * 3

    model = Small(last_state, lstm=nn.LSTM(3, 4))
    head, _ = partition(model, [1])
    assert sorted(head({"input": torch.rand(5, 2, 3)})) == ["lstm[0]", "lstm[1][0]", "lstm[1][1]"]
    check_all_cuts(model, torch.rand(5, 2, 3))


def test_attention_that_gives_no_weights_can_be_cut_after() -> None:
    def attend(m: Small, x: Tensor) -> Any:
        y, _ = m.attention(x, x, x, need_weights=False)
        return y + x

    check_all_cuts(Small(attend, attention=nn.MultiheadAttention(4, 2)).eval(), torch.rand(3, 2, 4))


def test_shapes_do_not_cross_and_need_no_bytes() -> None:
    def flat(m: Small, x: Tensor) -> Any:
        rows, columns = x.shape[0], x.size(1) * 2
        return (torch.cat((x, x), dim=1) + 1).relu().reshape(rows, 1, columns)

    traced = trace(Small(flat))
    head, tail = partition(traced, [traced.layer_names.index("relu") + 1])
    assert tail.input_names == ("input:shape", "relu")
    crossing = head({"input": torch.rand(2, 4)})
    assert crossing["input:shape"].numel() == 0
    check_all_cuts(Small(flat), torch.rand(2, 4))


def test_a_shape_can_be_asked_for_at_the_far_end_of_many_parts() -> None:
    def like_the_input(m: Small, x: Tensor) -> Any:
        y = m.b(m.a(x))
        return F.interpolate(y, size=x.shape[-2:]).to(x.dtype)

    model = Small(like_the_input, a=nn.Conv2d(3, 4, 3, stride=2), b=nn.Conv2d(4, 4, 3, stride=2))
    head, middle, _ = partition(model, [1, 2])
    assert head.output_names == ("input:shape", "a")
    assert middle.output_names == ("input:shape", "b")
    check_all_cuts(model, torch.rand(2, 3, 17, 19))


def test_a_value_that_is_no_tensor_says_where_to_cut_instead() -> None:
    model = Small(lambda m, x: m.pick(x)["kept"] + 1, pick=Opaque(lambda x: {"kept": x}))
    head, _ = partition(model, [1])
    with pytest.raises(NonTensorValue, match=r"'pick' is of type dict.* cut elsewhere"):
        head({"input": torch.rand(1)})


def test_a_message_without_a_tensor_that_a_part_takes_is_refused() -> None:
    head, _ = partition(network("vgg11")[0], [11])
    with pytest.raises(TensorMissing, match="expected a tensor 'input', the message has 'x'"):
        head({"x": torch.rand(1, 3, 64, 64)})


class Opaque(nn.Module):
    """A layer that torch.fx does not look into."""

    fx_leaf = True

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


# In-place layers --------------------------------------------------------------------------------------------------


def _iadd(m: Small, x: Tensor) -> Any:
    y = m.conv(x)
    y += x
    return y * x


IN_PLACE: dict[str, Function] = {
    "a module": lambda m, x: m.relu(m.conv(x)) + x,
    "a module on the input": lambda m, x: m.conv(m.relu(x)) * 2,
    "an operator": _iadd,
    "a function with inplace=True": lambda m, x: F.relu(m.conv(x), inplace=True) + x,
    "a function with an underscore": lambda m, x: torch.relu_(m.conv(x)) + x,
    "a method behind a view": lambda m, x: m.conv(x).flatten(1).sub_(1.0).sum(1) + 1,
    "a module behind one that does nothing": lambda m, x: m.relu(m.dropout(m.conv(x))) + x,
    "an item": lambda m, x: m.conv(x).chunk(2, dim=1)[1].mul_(3.0) + 1,
    "the value that is read again": lambda m, x: (lambda y: m.relu(y) + y)(m.conv(x)),
}


@pytest.mark.parametrize("how", IN_PLACE)
def test_in_place_layers_never_change_what_a_part_is_given(how: str) -> None:
    conv = nn.Conv2d(4, 4, 1)
    model = Small(IN_PLACE[how], conv=conv, relu=nn.ReLU(inplace=True), dropout=nn.Dropout()).eval()
    check_all_cuts(model, torch.randn(2, 4, 3, 3))


def test_only_what_an_in_place_layer_can_reach_is_copied() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True))
    copied = [
        [node.args[2] for node in part.graph.nodes if node.name.startswith("received")]
        for part in partition(model, [1, 2])
    ]
    assert copied == [[False], [True], [False]]


# Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "yolov3-tiny", "shufflenet_v2_x0_5", "vit_b_32", "swin_t"])
def test_stages_may_batch_requests_and_split_them_again(name: str) -> None:
    traced, pictures, _ = network.__wrapped__(name) if name in FAMILIES else network(name)
    one, two, three = pictures[:1], pictures[1:], torch.rand_like(pictures)
    parts = partition(traced, evenly(traced, 5), example={"input": torch.empty_like(one, device="meta")})
    with torch.inference_mode():
        alone = [run(parts, {"input": request}) for request in (one, two, three)]
        batched = [{"input": request} for request in (one, two, three)]
        for part in parts:
            if part.batchable:
                rows = [next(iter(tensors.values())).shape[0] for tensors in batched]
                joined = part({key: torch.cat([tensors[key] for tensors in batched]) for key in batched[0]})
                split = {key: tensor.split(rows) for key, tensor in joined.items()}
                batched = [{key: items[index] for key, items in split.items()} for index in range(len(rows))]
            else:
                batched = [part(tensors) for tensors in batched]
    assert sum(part.batchable for part in parts) >= len(parts) - 2
    for actual, expected in zip(batched, alone, strict=True):
        for key, tensor in expected.items():  # another batch size takes other kernels: the last bits may differ
            torch.testing.assert_close(actual[key], tensor, rtol=1e-3, atol=1e-3)


def test_without_an_example_no_part_claims_to_be_batchable() -> None:
    assert not any(part.batchable for part in partition(network("resnet18")[0], [10]))


def test_a_value_whose_first_dimension_is_not_the_batch_is_noticed() -> None:
    def turned(m: Small, x: Tensor) -> Any:
        return ((x + 1).transpose(0, 1) * 2).transpose(0, 1) - 1

    traced = trace(Small(turned))
    example = {"input": torch.empty(1, 2, 4, device="meta")}
    by_cut = {cut: [part.batchable for part in partition(traced, [cut], example)] for cut in range(1, 5)}
    assert by_cut == {1: [True, True], 2: [False, False], 3: [False, False], 4: [True, True]}


def test_an_output_without_rows_is_noticed() -> None:
    model = Small(lambda m, x: (x + 1).mean())
    head, tail = partition(model, [1], {"input": torch.empty(1, 4, device="meta")})
    assert (head.batchable, tail.batchable) == (True, False)


# By hand ----------------------------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Looks at values: torch.fx cannot follow. Changes what it is given, as well."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x += 1
        return x * self.weight


def test_a_network_that_cannot_be_traced_says_so_and_how_to_cut_it() -> None:
    with pytest.raises(CannotTrace) as failure:
        partition(Branching(2.0), [1])
    text = str(failure.value)
    assert "Branching" in text
    assert "control flow" in text
    assert "nn.Sequential" in text
    assert "list of modules" in text
    assert "\n" not in text


@pytest.mark.parametrize("container", [list, lambda children: nn.Sequential(*children)])
def test_such_a_network_is_cut_between_the_children_of_a_sequential_or_of_a_list(
    container: Callable[..., object],
) -> None:
    children: Sequence[nn.Module] = [Branching(2.0), nn.Conv2d(3, 4, 1), Branching(-3.0)]
    model = container(children)
    assert isinstance(model, nn.Sequential | list)
    assert layer_names(model) == ("0", "1", "2")
    check_all_cuts(model, torch.rand(2, 3, 4, 4))
    assert set(partition(model, [1])[1].state_dict()) == {"1.weight", "1.bias", "2.weight"}


def test_children_cut_by_hand_may_pass_tuples_on() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (x + 1, x) if x.sum() > 0 else (x, x)

    class Join(nn.Module):
        def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
            return pair[0] * pair[1]

    check_all_cuts([Pair(), Join(), Branching(1.5)], torch.rand(2, 3))


# Wrong cuts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, -1, 30, 99])
def test_a_cut_that_does_not_exist_is_refused_with_the_nearest_layers(cut: int) -> None:
    near = "'features.0' and 'features.1'" if cut < 1 else "'classifier.5' and 'classifier.6'"
    with pytest.raises(NoSuchCut, match=rf"cut {cut} does not exist.*30 layers and cuts 1 to 29.*{near}"):
        partition(network("vgg11")[0], [cut])


def test_a_network_of_one_layer_has_no_cuts() -> None:
    with pytest.raises(NoSuchCut, match="1 layer and no cuts"):
        partition(nn.Sequential(nn.ReLU()), [1])


@pytest.mark.parametrize("cuts", [(5, 5), (7, 3)])
def test_cuts_that_do_not_increase_are_refused(cuts: tuple[int, ...]) -> None:
    with pytest.raises(CutsNotIncreasing, match=r"\[\d, \d\] must increase"):
        partition(network("vgg11")[0], cuts)


def test_no_cuts_make_one_part() -> None:
    traced, pictures, expected = network("resnet18")
    with torch.inference_mode():
        assert same(run(partition(traced, []), {"input": pictures}), expected)


# Fingerprints -----------------------------------------------------------------------------------------------------


def test_equal_parts_have_equal_fingerprints() -> None:
    def prints() -> list[str]:
        model = randomize_parameters(models.get_model("shufflenet_v2_x0_5", weights=None)).eval()
        return [fingerprint(part) for part in partition(model, [40, 48])]

    first = prints()
    assert first == prints()
    assert len(set(first)) == 3


def test_one_changed_number_changes_the_fingerprint() -> None:
    first = nn.Linear(4, 4)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(4, 4))
    head, tail = partition(model, [1])
    before = fingerprint(head), fingerprint(tail)
    with torch.no_grad():
        first.weight[3, 3] += 1e-6
    assert fingerprint(head) != before[0]
    assert fingerprint(tail) == before[1]


def test_another_cut_changes_the_fingerprint_of_parts_without_numbers_as_well() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh(), nn.ReLU())
    assert fingerprint(partition(model, [1, 2])[1]) != fingerprint(partition(model, [1, 3])[1])
