"""Network inputs equal Darknet's letterbox and torchvision's classifier preprocessing."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import InterpolationMode

from brokers.process.image_decode import RgbImage
from stages.models.image_preprocess import letterbox, letterbox_size, prepare_classifier_input, resize_and_normalise
from tests.support.environment.darknet_reference import DarknetLibrary

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def noise(width: int, height: int) -> RgbImage:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


# Letterbox ----------------------------------------------------------------------------------------------------------

SIZES = [(768, 576), (640, 272), (416, 416), (37, 416), (1000, 333), (1, 1), (1, 7), (7, 1), (5, 3), (1920, 1080)]


@pytest.mark.parametrize("size", SIZES)
def test_letterbox_equals_darknets_bit_by_bit(size: tuple[int, int]) -> None:
    darknet = DarknetLibrary()
    picture = noise(*size)
    for width, height in ((416, 416), (96, 64), (64, 96)):
        boxed = letterbox(picture, width, height)
        assert boxed.shape == (1, 3, height, width)
        assert boxed.dtype == torch.float32
        np.testing.assert_array_equal(boxed[0].numpy(), darknet.letterbox(picture, width, height))


def test_rounded_last_row_is_nearly_black_as_in_darknet() -> None:
    picture = np.full((102, 136, 3), 255, np.uint8)
    boxed = letterbox(picture, 416, 416)
    assert boxed[0, :, 363].max() < 1e-4
    assert boxed[0, :, 362].min() == 1
    np.testing.assert_array_equal(boxed[0].numpy(), DarknetLibrary().letterbox(picture, 416, 416))


def test_picture_of_the_input_size_is_only_scaled_to_unit_range() -> None:
    picture = noise(64, 64)
    expected = torch.from_numpy(picture.transpose(2, 0, 1)[np.newaxis] / np.float32(255))
    assert torch.equal(letterbox(picture, 64, 64), expected)


def test_letterbox_border_is_grey() -> None:
    boxed = letterbox(np.zeros((10, 20, 3), np.uint8), 64, 64)
    assert (boxed[:, :, :16] == 0.5).all()
    assert (boxed[:, :, 48:] == 0.5).all()
    assert (boxed[:, :, 16:48] == 0).all()


def test_letterbox_keeps_one_pixel_of_each_side() -> None:
    assert letterbox_size(10_000, 1, 416, 416) == (416, 1)
    assert letterbox_size(1, 10_000, 416, 416) == (1, 416)
    boxed = letterbox(np.zeros((1, 10_000, 3), np.uint8), 416, 416)
    assert int((boxed == 0).sum()) == 3 * 416


def test_one_pixel_fills_the_letterbox() -> None:
    boxed = letterbox(np.full((1, 1, 3), 200, np.uint8), 64, 32)
    assert torch.equal(boxed[:, :, :, 16:48], torch.full((1, 3, 32, 32), 200 / 255))


# Classifiers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (224, 224), (300, 1000), (17, 13), (1, 1)])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (232, 224), (64, 64), (33, 32)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_classifier_input_equals_torchvisions(
    size: tuple[int, int], resize: int, crop: int, interpolation: Literal["bilinear", "bicubic"]
) -> None:
    reference = ImageClassification(
        crop_size=crop, resize_size=resize, mean=MEAN, std=STD, interpolation=InterpolationMode(interpolation)
    )
    picture = noise(*size)
    prepared = prepare_classifier_input(picture, resize, crop, MEAN, STD, interpolation)
    assert prepared.shape == (1, 3, crop, crop)
    torch.testing.assert_close(prepared[0], reference(Image.fromarray(picture)), rtol=1e-5, atol=1e-5)


def test_very_long_picture_is_cropped_before_it_is_resized() -> None:
    line = np.zeros((1, 1_000_000, 3), np.uint8)
    line[:, 500_000 - 100 : 500_000 + 100] = 255
    assert (prepare_classifier_input(line, 256, 224, (0.0,) * 3, (1.0,) * 3) == 1).all()


def test_crop_larger_than_the_resized_picture_raises_value_error() -> None:
    with pytest.raises(ValueError, match="crop of 224 pixels from a picture resized to 200"):
        prepare_classifier_input(noise(32, 16), 200, 224, MEAN, STD)


def test_resize_and_normalise_does_not_keep_the_aspect_ratio() -> None:
    half = np.zeros((64, 128, 3), np.uint8)
    half[:, 64:] = 255
    resized = resize_and_normalise(half, 8, 4, lambda pictures: pictures)
    assert resized.shape == (1, 3, 4, 8)
    assert (resized[..., :3] == 0).all()
    assert (resized[..., 5:] == 255).all()
