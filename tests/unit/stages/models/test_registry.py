"""What a name stands for: how the network is built, what it eats, and what its outputs mean."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from stages.errors import BadModel, UnknownModel
from stages.models.darknet_layers import Darknet
from stages.models.registry import ModelSpec, get_model_spec
from stages.partition.partition import partition
from tests.support.training.networks import randomize_parameters


def picture(width: int = 90, height: int = 60) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def evaluate(spec: ModelSpec, part_inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    (whole,) = partition(randomize_parameters(spec.build()).eval(), [])
    with torch.inference_mode():
        result: dict[str, torch.Tensor] = whole({spec.input_name: part_inputs})
    return result


@pytest.fixture
def user_module(tmp_path: Path) -> Iterator[Path]:
    """A folder with a module of a user's own, which no other test sees."""
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())\n"
        "net.input_shape = (1, 4)\n"
        "def parts():\n    return [nn.Linear(4, 3), nn.ReLU()]\n"
        "def nothing():\n    return None\n"
        "number = 3\n"
    )
    path, loaded = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - loaded:
        if name == "own_nets":
            del sys.modules[name]


@pytest.mark.parametrize("name", ["yolov3", "yolov3-tiny"])
def test_a_detector_takes_letterboxed_pictures(name: str) -> None:
    spec = get_model_spec(name)
    assert spec.input_size == (416, 416)
    assert spec.preprocess is not None
    assert spec.preprocess(picture()).shape == (1, 3, 416, 416)
    with torch.device("meta"):
        assert isinstance(spec.build(), Darknet)


def test_a_detector_ends_in_boxes_scores_classes_and_labels() -> None:
    spec = get_model_spec("yolov3-tiny", threshold=0.3)
    assert spec.postprocess is not None
    outputs = {"0": torch.zeros(1, 3, 85, 13, 13), "1": torch.zeros(1, 3, 85, 26, 26)}
    outputs["0"][0, 1, :5, 6, 6] = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.9])
    outputs["0"][0, 1, 5 + 16, 6, 6] = 0.8  # class 16 of COCO is a dog
    found = spec.postprocess(outputs, (416, 416))
    assert found.metadata == {"format": "detections", "labels": '["dog"]'}
    assert found.tensors["boxes"].tolist() == [[208 - 135 / 2, 208 - 169 / 2, 135, 169]]
    assert found.tensors["scores"].tolist() == pytest.approx([0.72])
    assert found.tensors["classes"].tolist() == [16]
    strict = get_model_spec("yolov3-tiny", threshold=0.8).postprocess
    assert strict is not None
    assert json.loads(strict(outputs, (416, 416)).metadata["labels"]) == []


def test_a_classifier_takes_pictures_as_its_weights_were_trained_on() -> None:
    spec = get_model_spec("torchvision:resnet18")
    assert spec.input_size == (224, 224)
    assert spec.preprocess is not None
    expected = models.ResNet18_Weights.DEFAULT.transforms()(torch.from_numpy(picture()).permute(2, 0, 1))
    torch.testing.assert_close(
        spec.preprocess(picture())[0], expected, rtol=0, atol=0.03
    )  # a level of 8 bits, normalised


def test_a_classifier_ends_in_its_five_likeliest_classes_by_name() -> None:
    spec = get_model_spec("torchvision:squeezenet1_1")
    assert spec.postprocess is not None
    logits = torch.zeros(1, 1000)
    logits[0, [207, 1, 2, 3, 4]] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])
    found = spec.postprocess({"output": logits}, (90, 60))
    assert found.tensors["classes"].tolist() == [207, 1, 2, 3, 4]
    assert found.tensors["scores"].tolist() == pytest.approx(logits.softmax(1)[0, [207, 1, 2, 3, 4]].tolist())
    assert found.metadata["format"] == "classes"
    assert json.loads(found.metadata["labels"])[0] == "golden retriever"


@pytest.mark.parametrize("name", ["torchvision:googlenet", "torchvision:mobilenet_v3_small"])
def test_a_picture_goes_from_prepare_through_the_network_to_finish(name: str) -> None:
    spec = get_model_spec(name)
    assert spec.preprocess is not None
    assert spec.postprocess is not None
    found = spec.postprocess(evaluate(spec, spec.preprocess(picture())), (90, 60))
    assert found.tensors["scores"].shape == (5,)


def test_every_classifier_of_torchvision_has_a_spec() -> None:
    for name in models.list_models(module=models):
        size = get_model_spec(f"torchvision:{name}").input_size
        assert size is not None
        assert size[0] >= 224


def test_a_factory_of_ones_own_is_found_in_the_folder_given(user_module: Path) -> None:
    spec = get_model_spec("own_nets:net", folder=str(user_module))
    assert isinstance(spec.build(), nn.Sequential)
    assert (spec.input_shape, spec.input_size, spec.preprocess, spec.postprocess) == ((1, 4), None, None, None)
    assert list(evaluate(spec, torch.rand(2, 4))) == ["output"]


def test_a_factory_is_found_in_the_current_folder(user_module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_module)
    assert isinstance(get_model_spec("own_nets:net").build(), nn.Sequential)


def test_a_factory_may_give_a_list_of_modules(user_module: Path) -> None:
    built = get_model_spec("own_nets:parts", folder=str(user_module)).build()
    assert [name for name, _ in built.named_children()] == ["0", "1"]


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("own_netz:net", "No module named 'own_netz'"),
        ("own_nets:nets", "module own_nets has no nets"),
        ("own_nets:number", "expected a function that builds a module, found int"),
        (":net", "expected package.module:name"),
    ],
)
def test_a_factory_that_cannot_be_had_says_why(user_module: Path, address: str, problem: str) -> None:
    with pytest.raises(BadModel, match=problem):
        get_model_spec(address, folder=str(user_module))


def test_a_factory_that_builds_no_network_says_what_it_gave(user_module: Path) -> None:
    spec = get_model_spec("own_nets:nothing", folder=str(user_module))
    with pytest.raises(BadModel, match="expected a module or a list of modules, it gave NoneType"):
        spec.build()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("vgg11", "did you mean torchvision:vgg11?"),
        ("torchvision:resnet19", "torchvision:resnet18"),
        ("resnet19", "torchvision:resnet18"),
        ("yolov3tiny", "did you mean yolov3-tiny"),
        ("quite something else", "There are yolov3, yolov3-tiny, vgg11-small, vgg13-small"),
    ],
)
def test_an_unknown_name_gets_the_nearest_known_ones(name: str, nearest: str) -> None:
    with pytest.raises(UnknownModel) as failure:
        get_model_spec(name)
    assert nearest in str(failure.value)
    assert "yolov3" in str(failure.value)
