"""The small VGGs: torchvision's features and initial weights, and inputs equal in training and inference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stages.models.registry import SMALL_VGG_MODELS, get_model_spec
from stages.models.vgg import CONFIG_KEYS, SmallVgg
from stages.partition.partition import layer_names
from tests.support.training.networks import state_shapes


def test_registered_names_have_a_configuration() -> None:
    assert tuple(CONFIG_KEYS) == SMALL_VGG_MODELS


@pytest.mark.parametrize("name", SMALL_VGG_MODELS)
def test_features_equal_torchvisions_and_classifier_is_one_layer(name: str) -> None:
    large = state_shapes(get_model_spec(f"torchvision:{name.removesuffix('-small')}"))
    features = {key: shape for key, shape in large.items() if key.startswith("features.")}
    expected = {**features, "classifier.weight": (10, 512), "classifier.bias": (10,)}
    assert state_shapes(get_model_spec(name)) == expected


def test_initial_weights_have_torchvisions_distributions() -> None:
    torch.manual_seed(0)
    for name, tensor in SmallVgg("vgg11-small").state_dict().items():
        if name.endswith("bias"):
            assert not tensor.any()
        elif name.startswith("features."):
            expected = (2 / (tensor.shape[0] * 9)) ** 0.5  # He's, by fan-out
            assert float(tensor.std()) == pytest.approx(expected, rel=0.06)
        else:
            assert float(tensor.std()) == pytest.approx(0.01, rel=0.06)


def test_vgg11_small_has_23_layers_and_ten_classes() -> None:
    assert get_model_spec("vgg11-small").input_shape == (1, 3, 32, 32)
    model = SmallVgg("vgg11-small").eval()
    assert len(layer_names(model)) == 23
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_training_and_inference_see_the_same_numbers() -> None:
    spec = get_model_spec("vgg11-small")
    assert spec.normalise is not None
    assert spec.preprocess is not None
    pictures = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    pictures[0, 0, 0] = 0, 255, 0
    normalised = spec.normalise(torch.from_numpy(pictures.transpose(0, 3, 1, 2)))
    assert (normalised.dtype, float(normalised.min()), float(normalised.max())) == (torch.float32, -1.0, 1.0)
    for picture, row in zip(pictures, normalised, strict=True):
        assert torch.equal(spec.preprocess(picture)[0], row)


def test_picture_of_another_size_is_stretched_to_32_by_32() -> None:
    spec = get_model_spec("vgg11-small")
    assert spec.preprocess is not None
    half = np.zeros((64, 128, 3), np.uint8)
    half[:, 64:] = 255
    prepared = spec.preprocess(half)
    assert prepared.shape == (1, 3, 32, 32)
    assert (prepared[..., :15] == -1).all()
    assert (prepared[..., 17:] == 1).all()
