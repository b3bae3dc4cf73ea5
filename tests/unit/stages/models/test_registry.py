"""Models by name: how each is found and built, its inputs and outputs, its settings and labels."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from brokers.errors import UsageError
from brokers.process.image_decode import RgbImage
from stages.models.darknet import Darknet
from stages.models.registry import ModelSpec, get_model_spec
from stages.partition.partition import partition
from tests.support.errors import raises_error
from tests.support.training.networks import randomize_parameters, state_shapes

USER_MODULE = """
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())
net.input_shape = (1, 4)

def layers(width, depth=1):
    return [nn.Linear(width, width) for _ in range(depth)]

def odd(width):
    raise ValueError(f"{width} is not even")

def nothing():
    return None

def broken():
    return 1 + ""

number = 3
"""


def picture(width: int = 90, height: int = 60) -> RgbImage:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def evaluate(spec: ModelSpec, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    (whole,) = partition(randomize_parameters(spec.build()).eval(), [])
    with torch.inference_mode():
        outputs: dict[str, torch.Tensor] = whole({spec.input_name: inputs})
    return outputs


@pytest.fixture
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "user_nets.py").write_text(USER_MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield str(tmp_path)
    sys.modules.pop("user_nets", None)


# Detectors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["yolov3", "yolov3-tiny"])
def test_detector_input_is_a_letterboxed_picture(name: str) -> None:
    spec = get_model_spec(name)
    assert spec.input_shape == (1, 3, 416, 416)
    assert spec.preprocess is not None
    assert spec.preprocess(picture()).shape == (1, 3, 416, 416)
    with torch.device("meta"):
        assert isinstance(spec.build(), Darknet)


def test_detector_result_is_boxes_scores_classes_and_labels() -> None:
    spec = get_model_spec("yolov3-tiny", threshold=0.3)
    assert spec.postprocess is not None
    outputs = {"0": torch.zeros(1, 3, 85, 13, 13), "1": torch.zeros(1, 3, 85, 26, 26)}
    outputs["0"][0, 1, :5, 6, 6] = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.9])
    outputs["0"][0, 1, 5 + 16, 6, 6] = 0.8  # class 16 of COCO is a dog
    result = spec.postprocess(outputs, (416, 416))
    assert result.metadata == {"format": "detections", "labels": '["dog"]'}
    assert result.tensors["boxes"].tolist() == [[208 - 135 / 2, 208 - 169 / 2, 135, 169]]
    assert result.tensors["scores"].tolist() == pytest.approx([0.72])
    assert result.tensors["classes"].tolist() == [16]
    strict = get_model_spec("yolov3-tiny", threshold=0.8).postprocess
    assert strict is not None
    assert json.loads(strict(outputs, (416, 416)).metadata["labels"]) == []


# Classifiers --------------------------------------------------------------------------------------------------------


def test_classifier_input_equals_that_of_its_weights() -> None:
    spec = get_model_spec("torchvision:resnet18")
    assert spec.input_shape == (1, 3, 224, 224)
    assert spec.preprocess is not None
    expected = models.ResNet18_Weights.DEFAULT.transforms()(torch.from_numpy(picture()).permute(2, 0, 1))
    one_level = 0.03  # a step of 1 in 255, normalised
    torch.testing.assert_close(spec.preprocess(picture())[0], expected, rtol=0, atol=one_level)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:vit_b_16"])
def test_normalise_equals_the_transform_of_the_weights(name: str) -> None:
    spec = get_model_spec(name)
    preset = models.get_model_weights(name.partition(":")[2]).DEFAULT.transforms()
    x = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (preset.mean, preset.std))
    assert spec.normalise is not None
    assert np.array_equal(spec.normalise(x).numpy(), (x.numpy().astype(np.float32) / np.float32(255) - mean) / std)


def test_classifier_result_is_the_five_most_likely_classes() -> None:
    spec = get_model_spec("torchvision:squeezenet1_1")
    assert spec.postprocess is not None
    logits = torch.zeros(1, 1000)
    logits[0, [207, 1, 2, 3, 4]] = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0])
    result = spec.postprocess({"output": logits}, (90, 60))
    assert result.tensors["classes"].tolist() == [207, 1, 2, 3, 4]
    assert result.tensors["scores"].tolist() == pytest.approx(logits.softmax(1)[0, [207, 1, 2, 3, 4]].tolist())
    assert result.metadata["format"] == "classes"
    assert json.loads(result.metadata["labels"])[0] == "golden retriever"


@pytest.mark.parametrize("name", ["torchvision:googlenet", "torchvision:mobilenet_v3_small"])
def test_preprocess_network_and_postprocess_fit_together(name: str) -> None:
    spec = get_model_spec(name, settings={"init_weights": False} if "googlenet" in name else {})
    assert spec.preprocess is not None
    assert spec.postprocess is not None
    result = spec.postprocess(evaluate(spec, spec.preprocess(picture())), (90, 60))
    assert result.tensors["scores"].shape == (5,)


def test_every_torchvision_classifier_has_a_spec() -> None:
    for name in models.list_models(module=models):
        shape = get_model_spec(f"torchvision:{name}").input_shape
        assert shape is not None
        assert shape[2] >= 224


# Factories ----------------------------------------------------------------------------------------------------------


def test_factory_is_found_in_the_folder(user_folder: str) -> None:
    spec = get_model_spec("user_nets:net", folder=user_folder)
    assert isinstance(spec.build(), nn.Sequential)
    assert (spec.input_shape, spec.preprocess, spec.postprocess) == ((1, 4), None, None)
    assert list(evaluate(spec, torch.rand(2, 4))) == ["output"]


def test_factory_is_found_in_the_current_folder(user_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(user_folder)
    assert isinstance(get_model_spec("user_nets:net").build(), nn.Sequential)


def test_factory_may_return_a_list_of_modules(user_folder: str) -> None:
    spec = get_model_spec("user_nets:layers", settings={"width": 3, "depth": 2}, folder=user_folder)
    assert state_shapes(spec) == {"0.weight": (3, 3), "0.bias": (3,), "1.weight": (3, 3), "1.bias": (3,)}


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("no_nets:net", "No module named 'no_nets'"),
        ("user_nets:number", "expected a function that returns a module, found int"),
        ("user_nets:nothing", "expected a module or a list of modules, the factory returned NoneType"),
    ],
)
def test_bad_factory_names_its_problem(user_folder: str, address: str, problem: str) -> None:
    with raises_error(UsageError, "BadModel", match=problem) as caught:
        get_model_spec(address, folder=user_folder).build()
    assert caught.value.key == "pipeline.model"


def test_exception_of_a_factory_without_settings_is_not_a_usage_error(user_folder: str) -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        get_model_spec("user_nets:broken", folder=user_folder).build()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("vgg11", "did you mean torchvision:vgg11?"),
        ("torchvision:resnet19", "torchvision:resnet18"),
        ("resnet19", "torchvision:resnet18"),
        ("yolov3tiny", "did you mean yolov3-tiny"),
        ("quite something else", "Expected one of yolov3, yolov3-tiny, vgg11-small, vgg13-small"),
    ],
)
def test_unknown_name_suggests_the_nearest(name: str, nearest: str) -> None:
    with raises_error(UsageError, "UnknownModel") as caught:
        get_model_spec(name)
    assert nearest in str(caught.value)
    assert "package.module:factory" in str(caught.value)


# Settings and labels ------------------------------------------------------------------------------------------------


def test_settings_are_arguments_of_the_factory() -> None:
    assert state_shapes(get_model_spec("vgg11-small", settings={"num_classes": 7}))["classifier.weight"] == (7, 512)
    spec = get_model_spec("torchvision:googlenet", settings={"num_classes": 7, "aux_logits": False})
    assert state_shapes(spec)["fc.weight"] == (7, 1024)


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("yolov3-tiny", {"num_classes": 3}, "settings of model 'yolov3-tiny': it has none, got num_classes"),
        ("vgg11-small", {"classes": 3}, "got an unexpected keyword argument 'classes'"),
        ("vgg11-small", {"name": "x"}, "unexpected keyword argument 'name'"),
        ("vgg11-small", {"num_classes": "3"}, "'num_classes' is '3', expected an integer above 0"),
        ("vgg11-small", {"num_classes": True}, "'num_classes' is True, expected an integer above 0"),
        ("torchvision:resnet18", {"num_classes": 0}, "'num_classes' is 0, expected an integer above 0"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "'weights' is not a setting, but a key of [pipeline]"),
        ("torchvision:resnet18", {"depth": 3}, "unexpected keyword argument 'depth'"),
        ("user_nets:layers", {}, "missing a required argument: 'width'"),
        ("user_nets:layers", {"width": 3, "height": 1}, "unexpected keyword argument 'height'"),
        ("user_nets:odd", {"width": 3}, "ValueError: 3 is not even (user_nets.py, line 12)"),
    ],
)
def test_bad_settings_are_one_line(user_folder: str, name: str, settings: dict[str, Any], text: str) -> None:
    with raises_error(UsageError, "BadModelSettings") as caught:
        get_model_spec(name, settings=settings, folder=user_folder).build()
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.key == "pipeline.model_settings"


def class_labels(spec: ModelSpec, classes: int) -> list[str]:
    """The labels of a result whose class scores increase with the class number."""
    assert spec.postprocess is not None
    result = spec.postprocess({"output": torch.arange(classes, dtype=torch.float32)[None]}, (1, 1))
    labels: list[str] = json.loads(result.metadata["labels"])
    return labels


def test_class_names_are_labels_else_those_of_the_weights_else_numbers() -> None:
    three = {"num_classes": 3}
    assert class_labels(get_model_spec("vgg11-small"), 10) == ["9", "8", "7", "6", "5"]
    assert class_labels(get_model_spec("vgg13-small", settings=three, labels=("a", "b", "c")), 3) == ["c", "b", "a"]
    assert class_labels(get_model_spec("torchvision:resnet18", settings=three), 3) == ["2", "1", "0"]
    assert class_labels(get_model_spec("torchvision:resnet18", settings=three, labels=["a", "b", "c"]), 3)[0] == "c"
    assert class_labels(get_model_spec("torchvision:resnet18"), 1000)[0] == "toilet tissue"


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("vgg11-small", {}, "2 labels for model 'vgg11-small', expected 10, one per class"),
        ("torchvision:resnet18", {"num_classes": 3}, "expected 3, one per class"),
        ("torchvision:resnet18", {}, "expected 1000, one per class"),
        ("yolov3", {}, "model 'yolov3' has no labels"),
        ("user_nets:layers", {"width": 3}, "model 'user_nets:layers' has no labels"),
    ],
)
def test_wrong_number_of_labels_is_one_line(name: str, settings: dict[str, Any], text: str) -> None:
    with raises_error(UsageError, "LabelsDoNotFit") as caught:  # before the factory is imported
        get_model_spec(name, settings=settings, labels=("a", "b"))
    assert text in str(caught.value)
    assert caught.value.key == "pipeline.labels"


def test_outputs_must_be_as_many_as_the_labels() -> None:
    with raises_error(UsageError, "LabelsDoNotFit", match="10 labels for model 'vgg11-small', expected 3"):
        class_labels(get_model_spec("vgg11-small"), 3)
