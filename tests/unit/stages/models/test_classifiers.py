"""Networks that are trained: the small VGGs, their settings, their labels, and what they see of a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import models

from brokers.config.pipeline_file import Pipeline, add_error_context, load_pipeline
from brokers.errors import UsageError
from sources.datasets.batches import Batches
from sources.datasets.digits import Digits
from stages.errors import BadModel
from stages.models.errors import BadModelSettings, LabelsDoNotFit
from stages.models.image_preprocess import resize_and_normalise
from stages.models.registry import SMALL_VGG_MODELS, ModelSpec, get_model_spec
from stages.models.vgg import CONFIG_KEYS
from stages.partition.partition import layer_names, partition


def meta(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in spec.build().state_dict().items()}


def test_the_names_that_are_offered_are_those_that_are_there() -> None:
    assert tuple(CONFIG_KEYS) == SMALL_VGG_MODELS


@pytest.mark.parametrize("name", SMALL_VGG_MODELS)
def test_a_small_vgg_has_the_features_of_torchvisions_and_one_layer_more(name: str) -> None:
    small, large = meta(get_model_spec(name)), meta(get_model_spec(f"torchvision:{name.removesuffix('-small')}"))
    features = {key: shape for key, shape in large.items() if key.startswith("features.")}
    assert small == {**features, "classifier.weight": (10, 512), "classifier.bias": (10,)}


def test_a_small_vgg_begins_with_the_weights_that_torchvisions_begins_with() -> None:
    torch.manual_seed(0)
    small = get_model_spec("vgg11-small").build().state_dict()
    for name, tensor in small.items():
        if name.endswith("bias"):
            assert not tensor.any()
        elif name.startswith("features."):
            expected = (2 / (tensor.shape[0] * 9)) ** 0.5  # He's, by fan-out
            assert float(tensor.std()) == pytest.approx(expected, rel=0.06)
        else:
            assert float(tensor.std()) == pytest.approx(0.01, rel=0.06)


def test_the_weights_follow_from_the_seed() -> None:
    spec, built = get_model_spec("vgg11-small"), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        built.append(spec.build().state_dict()["features.3.weight"])
    assert torch.equal(built[0], built[1])
    assert not torch.equal(built[0], built[2])


def test_vgg11_small_is_cut_after_any_of_its_23_layers() -> None:
    spec = get_model_spec("vgg11-small")
    assert spec.input_size == (32, 32)
    built = spec.build().eval()
    assert len(layer_names(built)) == 23
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        expected = built(x)
        head, body, tail = partition(built, [6, 11])
        assert torch.equal(tail(body(head({"input": x})))["output"], expected)
    assert expected.shape == (2, 10)


def test_a_picture_is_to_training_what_it_is_to_inference() -> None:
    spec, examples = get_model_spec("vgg11-small"), Digits().test()
    assert spec.normalise is not None
    assert spec.preprocess is not None
    inputs, _ = Batches(examples, 16, shuffle=False).batch(0)
    trained = spec.normalise(torch.from_numpy(inputs))
    assert (trained.dtype, float(trained.min()), float(trained.max())) == (torch.float32, -1.0, 1.0)
    for picture, row in zip(inputs.transpose(0, 2, 3, 1), trained, strict=True):
        assert torch.equal(spec.preprocess(np.asarray(picture, np.uint8))[0], row)


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:vit_b_16"])
def test_torchvisions_networks_are_trained_on_what_their_weights_were(name: str) -> None:
    spec = get_model_spec(name)
    preset = models.get_model_weights(name.partition(":")[2]).DEFAULT.transforms()
    x = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (preset.mean, preset.std))
    assert spec.normalise is not None
    assert np.array_equal(spec.normalise(x).numpy(), (x.numpy().astype(np.float32) / np.float32(255) - mean) / std)


def test_a_picture_of_another_size_is_stretched_to_32_by_32() -> None:
    spec = get_model_spec("vgg11-small")
    assert spec.preprocess is not None
    half = np.zeros((64, 128, 3), np.uint8)
    half[:, 64:] = 255
    seen = spec.preprocess(half)
    assert seen.shape == (1, 3, 32, 32)
    assert (seen[..., :15] == -1).all()
    assert (seen[..., 17:] == 1).all()
    assert resize_and_normalise(half, 8, 4, lambda pictures: pictures).shape == (1, 3, 4, 8)


def told_labels(spec: ModelSpec, outputs: int) -> list[str]:
    assert spec.postprocess is not None
    found = spec.postprocess({"output": torch.arange(outputs, dtype=torch.float32)[None]}, (1, 1))
    labels: list[str] = json.loads(found.metadata["labels"])
    return labels


def test_classes_have_the_names_that_are_given_or_numbers_or_those_of_the_weights() -> None:
    three = {"num_classes": 3}
    assert told_labels(get_model_spec("vgg11-small"), 10) == ["9", "8", "7", "6", "5"]
    assert told_labels(get_model_spec("vgg13-small", settings=three, labels=("a", "b", "c")), 3) == ["c", "b", "a"]
    assert told_labels(get_model_spec("torchvision:resnet18", settings=three), 3) == ["2", "1", "0"]
    assert told_labels(get_model_spec("torchvision:resnet18", settings=three, labels=["a", "b", "c"]), 3)[0] == "c"
    assert told_labels(get_model_spec("torchvision:resnet18"), 1000)[0] == "toilet tissue"


def test_settings_reach_what_builds_the_network() -> None:
    assert meta(get_model_spec("vgg11-small", settings={"num_classes": 7}))["classifier.weight"] == (7, 512)
    assert meta(get_model_spec("torchvision:resnet18", settings={"num_classes": 7}))["fc.weight"] == (7, 512)
    spec = get_model_spec("torchvision:googlenet", settings={"num_classes": 7, "aux_logits": False})
    assert meta(spec)["fc.weight"] == (7, 1024)


@pytest.fixture
def own_heads(tmp_path: Path) -> Iterator[Path]:
    """A folder with a module of a user's own, which no other test sees."""
    (tmp_path / "own_heads.py").write_text(
        "from torch import nn\n"
        "def head(width, depth=1):\n"
        "    return [nn.Linear(width, width) for _ in range(depth)]\n"
        "def odd(width):\n"
        "    raise ValueError(f'{width} is not even')\n"
    )
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    sys.modules.pop("own_heads", None)


def test_settings_are_the_arguments_of_a_factory_of_ones_own(own_heads: Path) -> None:
    spec = get_model_spec("own_heads:head", settings={"width": 3, "depth": 2}, folder=str(own_heads))
    assert meta(spec) == {"0.weight": (3, 3), "0.bias": (3,), "1.weight": (3, 3), "1.bias": (3,)}


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("yolov3-tiny", {"num_classes": 3}, "settings of model 'yolov3-tiny': it takes none, got num_classes"),
        ("vgg11-small", {"classes": 3}, "got an unexpected keyword argument 'classes'"),
        ("vgg11-small", {"name": "x"}, "unexpected keyword argument 'name'"),
        ("vgg11-small", {"num_classes": "3"}, "'num_classes' is '3', expected a whole number above 0"),
        ("vgg11-small", {"num_classes": True}, "'num_classes' is True, expected a whole number above 0"),
        ("torchvision:resnet18", {"num_classes": 0}, "'num_classes' is 0, expected a whole number above 0"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "'weights' is a key of [pipeline] itself"),
        ("torchvision:resnet18", {"depth": 3}, "unexpected keyword argument 'depth'"),
        ("own_heads:head", {}, "missing a required argument: 'width'"),
        ("own_heads:head", {"width": 3, "height": 1}, "unexpected keyword argument 'height'"),
        ("own_heads:odd", {"width": 3}, "ValueError: 3 is not even (own_heads.py, line 5)"),
    ],
)
def test_settings_that_do_not_fit_are_one_clear_line(
    own_heads: Path, name: str, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(BadModelSettings) as caught:
        get_model_spec(name, settings=settings, folder=str(own_heads)).build()
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bug_in_a_factory_without_settings_is_not_blamed_on_them(own_heads: Path) -> None:
    (own_heads / "own_heads.py").write_text("def head():\n    return 1 + ''\n")
    with pytest.raises(TypeError, match="unsupported operand"):
        get_model_spec("own_heads:head", folder=str(own_heads)).build()
    with pytest.raises(BadModel, match="has no heads"):
        get_model_spec("own_heads:heads", settings={"width": 1}, folder=str(own_heads))


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("vgg11-small", {}, "2 labels for model 'vgg11-small', expected 10, one for each of its outputs"),
        ("torchvision:resnet18", {"num_classes": 3}, "expected 3, one for each"),
        ("torchvision:resnet18", {}, "expected 1000, one for each"),
        ("yolov3", {}, "model 'yolov3' takes no labels"),
        ("own_heads:head", {"width": 3}, "model 'own_heads:head' takes no labels"),
    ],
)
def test_labels_that_do_not_fit_are_one_clear_line(name: str, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(LabelsDoNotFit) as caught:  # before the factory is looked for
        get_model_spec(name, settings=settings, labels=("a", "b"))
    assert text in str(caught.value)


def test_outputs_that_are_not_as_many_as_the_labels_are_no_class_at_all() -> None:
    with pytest.raises(LabelsDoNotFit, match="10 labels for model 'vgg11-small', expected 3"):
        told_labels(get_model_spec("vgg11-small"), 3)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            "model_settings = { depth = 3 }",
            "pipeline.model_settings: settings of model 'vgg11-small': got an unexpected",
        ),
        ("labels = ['a']", "pipeline.labels: 1 labels for model 'vgg11-small', expected 10"),
    ],
)
def test_a_worker_names_the_file_and_the_key(tmp_path: Path, line: str, text: str) -> None:
    from stages.worker.model_executor import ModelExecutor

    pipeline = written(tmp_path, line)
    with pytest.raises(UsageError) as caught, add_error_context(pipeline):
        ModelExecutor(pipeline, pipeline.stage[0], device="cpu", threads=1)
    assert str(caught.value).startswith(f"{pipeline.path}: {text}")


def test_a_worker_gives_the_labels_of_the_file(tmp_path: Path) -> None:
    from stages.worker.model_executor import ModelExecutor

    pipeline = written(tmp_path, "labels = ['a', 'b']\nmodel_settings = { num_classes = 2 }")
    executor = ModelExecutor(pipeline, pipeline.stage[0], device="cpu", threads=1)
    assert told_labels(executor._spec, 2) == ["b", "a"]


def written(folder: Path, line: str) -> Pipeline:
    path = folder / "small.toml"
    path.write_text(f'[pipeline]\nname = "small"\nmodel = "vgg11-small"\n{line}\n[[stage]]\nname = "all"\n')
    return load_pipeline(path)
