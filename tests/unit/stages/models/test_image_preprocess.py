"""Pictures become what the networks were trained on: Darknet's letterbox, torchvision's centre crop."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import InterpolationMode

from brokers.errors import BadPayload, TooLarge, WireError
from stages.errors import BadCrop
from stages.models.image_preprocess import (
    MAX_IMAGE_BYTES,
    decode_image,
    letterbox,
    letterbox_size,
    prepare_classifier_input,
)
from tests.support.environment.darknet_reference import DarknetLibrary

Picture = npt.NDArray[np.uint8]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(width: int, height: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def corners(width: int = 32, height: int = 16) -> Picture:
    """Four fields of one colour each: red, green / blue, white."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = 255, 0, 0
    picture[: height // 2, width // 2 :] = 0, 255, 0
    picture[height // 2 :, : width // 2] = 0, 0, 255
    picture[height // 2 :, width // 2 :] = 255, 255, 255
    return picture


def encoded(image: Image.Image | Picture, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """A PNG that claims to be so large; its pixels begin, and go no further."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", size), (b"IDAT", zlib.compress(bytes(1000)))):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return data


# Decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_a_png_is_decoded_exactly_from_any_buffer(wrap: Any) -> None:
    picture = noise(33, 17)
    decoded = decode_image(wrap(encoded(picture)), "image/png")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, picture)


def test_a_jpeg_is_decoded_to_its_colours() -> None:
    decoded = decode_image(encoded(corners(), "JPEG", quality=95, subsampling=0), "image/jpeg")
    assert np.abs(decoded.astype(int) - corners()).max() <= 8


@pytest.mark.parametrize("content_type", ["", "image/png", "application/octet-stream"])
def test_the_first_bytes_say_what_it_is_whatever_the_content_type_says(content_type: str) -> None:
    assert decode_image(encoded(corners(), "JPEG"), content_type).shape == (16, 32, 3)


def test_a_picture_of_one_pixel_works_all_the_way() -> None:
    for kind in ("PNG", "JPEG"):
        picture = decode_image(encoded(np.full((1, 1, 3), 200, np.uint8), kind))
        assert picture.shape == (1, 1, 3)
        boxed = letterbox(picture, 64, 32)
        assert torch.equal(boxed[:, :, :, 16:48], torch.full((1, 3, 32, 32), 200 / 255))
        assert torch.isfinite(prepare_classifier_input(picture, 256, 224, MEAN, STD)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(orientation: int) -> None:
    # what a camera writes that was held so: the upright picture, turned the other way
    turned = {
        1: corners(), 2: corners()[:, ::-1], 3: corners()[::-1, ::-1], 4: corners()[::-1], 5: corners().swapaxes(0, 1),
        6: np.rot90(corners(), 1), 7: np.rot90(corners(), 2).swapaxes(0, 1), 8: np.rot90(corners(), -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode_image(encoded(np.ascontiguousarray(turned), "PNG", exif=exif))
    np.testing.assert_array_equal(decoded, corners())


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")  # Pillow says so too
def test_damaged_exif_under_good_pixels_is_ignored(exif: bytes) -> None:
    assert decode_image(encoded(corners(), "JPEG", exif=exif)).shape == (16, 32, 3)


def test_grey_palette_transparency_and_bits_become_rgb() -> None:
    image = Image.fromarray(corners())
    grey = np.asarray(image.convert("L"))
    for mode in ("L", "LA"):
        decoded = decode_image(encoded(image.convert(mode)))
        np.testing.assert_array_equal(decoded, np.repeat(grey[:, :, np.newaxis], 3, axis=2))
    for mode in ("P", "RGBA"):
        np.testing.assert_array_equal(decode_image(encoded(image.convert(mode))), corners())
    black_white = decode_image(encoded(Image.fromarray(corners()[..., 0]).convert("1")))
    np.testing.assert_array_equal(black_white, np.repeat(corners()[..., :1], 3, axis=2))


def test_sixteen_bits_of_grey_keep_their_upper_eight() -> None:
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    decoded = decode_image(encoded(Image.fromarray(deep)))
    np.testing.assert_array_equal(decoded[..., 1], (deep >> 8).astype(np.uint8))


def test_cmyk_becomes_rgb() -> None:
    decoded = decode_image(encoded(Image.fromarray(corners()).convert("CMYK"), "JPEG", quality=95, subsampling=0))
    assert decoded[2, 2].tolist() == pytest.approx([255, 0, 0], abs=8)
    assert decoded[-2, -2].tolist() == pytest.approx([255, 255, 255], abs=8)


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.fromarray(corners()), Image.fromarray(noise(32, 16))]
    data = encoded(frames[0], save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(data), corners())


@pytest.mark.parametrize("data", [b"", b"\xff", b"not a picture", encoded(corners(), "GIF"), encoded(corners(), "BMP")])
def test_bytes_that_are_no_jpeg_and_no_png_are_refused(data: bytes) -> None:
    with pytest.raises(BadPayload, match=f"payload of type image/jpeg: neither JPEG nor PNG: {len(data)} bytes"):
        decode_image(data, "image/jpeg")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_cut_off_before_its_last_pixel_is_refused(kind: str) -> None:
    data = encoded(noise(40, 40), kind)
    whole = decode_image(data)
    for length in range(0, len(data), 13):
        try:
            decoded = decode_image(data[:length])
        except BadPayload:
            continue
        assert length > len(data) - 32, "pixels are missing, and nobody said so"
        np.testing.assert_array_equal(decoded, whole)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG"]), at=st.integers(0, 10_000), replacement=st.binary(min_size=1, max_size=8))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_bytes_give_a_picture_or_a_typed_error_and_nothing_else(kind: str, at: int, replacement: bytes) -> None:
    data = bytearray(encoded(corners(), kind))
    at %= len(data)
    data[at : at + len(replacement)] = replacement
    try:
        picture = decode_image(data)
    except WireError:
        return
    assert picture.dtype == np.uint8
    assert picture.shape[2:] == (3,)


def test_twenty_megapixels_are_welcome() -> None:
    data = encoded(Image.new("RGB", (5472, 3648), (10, 200, 30)), "JPEG")
    picture = decode_image(data)
    assert picture.shape == (3648, 5472, 3)
    assert letterbox(picture, 416, 416).shape == (1, 3, 416, 416)


def test_a_bomb_is_refused_before_memory_is_set_aside_for_it() -> None:
    tracemalloc.start()
    with pytest.raises(TooLarge) as caught:
        decode_image(huge_png(60_000, 60_000), "image/png")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (caught.value.fields["limit_bytes"], caught.value.fields["actual_bytes"]) == (
        MAX_IMAGE_BYTES,
        60_000 * 60_000 * 3,
    )
    assert "60000x60000" in str(caught.value)
    assert peak_bytes < 1_000_000


# Letterbox --------------------------------------------------------------------------------------------------------

SIZES = [(768, 576), (640, 272), (416, 416), (37, 416), (1000, 333), (1, 1), (1, 7), (7, 1), (5, 3), (1920, 1080)]


@pytest.mark.parametrize("size", SIZES)
def test_a_letterbox_is_bit_by_bit_that_of_the_original(size: tuple[int, int]) -> None:
    original = DarknetLibrary()
    picture = noise(*size)
    for width, height in ((416, 416), (96, 64), (64, 96)):
        boxed = letterbox(picture, width, height)
        assert boxed.shape == (1, 3, height, width)
        assert boxed.dtype == torch.float32
        np.testing.assert_array_equal(boxed[0].numpy(), original.letterbox(picture, width, height))


def test_a_last_row_that_rounding_puts_above_the_last_is_nearly_black_as_in_the_original() -> None:
    picture = np.full((102, 136, 3), 255, np.uint8)
    boxed = letterbox(picture, 416, 416)
    assert boxed[0, :, 363].max() < 1e-4
    assert boxed[0, :, 362].min() == 1
    np.testing.assert_array_equal(boxed[0].numpy(), DarknetLibrary().letterbox(picture, 416, 416))


def test_a_picture_of_the_networks_size_passes_unchanged() -> None:
    picture = corners(64, 64)
    expected = torch.from_numpy(picture.transpose(2, 0, 1)[np.newaxis] / np.float32(255))
    assert torch.equal(letterbox(picture, 64, 64), expected)


def test_what_the_picture_does_not_cover_is_grey() -> None:
    boxed = letterbox(np.zeros((10, 20, 3), np.uint8), 64, 64)
    assert (boxed[:, :, :16] == 0.5).all()
    assert (boxed[:, :, 48:] == 0.5).all()
    assert (boxed[:, :, 16:48] == 0).all()


def test_a_side_that_would_vanish_keeps_one_pixel() -> None:
    assert letterbox_size(10_000, 1, 416, 416) == (416, 1)
    assert letterbox_size(1, 10_000, 416, 416) == (1, 416)
    boxed = letterbox(np.zeros((1, 10_000, 3), np.uint8), 416, 416)
    assert int((boxed == 0).sum()) == 3 * 416


# Classifiers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (224, 224), (300, 1000), (17, 13), (1, 1)])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (232, 224), (64, 64), (33, 32)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_classifiers_input_is_that_of_torchvision(
    size: tuple[int, int], resize: int, crop: int, interpolation: Literal["bilinear", "bicubic"]
) -> None:
    reference = ImageClassification(
        crop_size=crop, resize_size=resize, mean=MEAN, std=STD, interpolation=InterpolationMode(interpolation)
    )
    picture = noise(*size)
    ours = prepare_classifier_input(picture, resize, crop, MEAN, STD, interpolation)
    assert ours.shape == (1, 3, crop, crop)
    torch.testing.assert_close(ours[0], reference(Image.fromarray(picture)), rtol=1e-5, atol=1e-5)


def test_a_very_long_picture_is_cut_before_it_is_resized() -> None:
    line = np.zeros((1, 1_000_000, 3), np.uint8)
    line[:, 500_000 - 100 : 500_000 + 100] = 255
    assert (prepare_classifier_input(line, 256, 224, (0.0,) * 3, (1.0,) * 3) == 1).all()


def test_a_crop_larger_than_the_picture_is_refused() -> None:
    with pytest.raises(BadCrop, match="a crop of 224 pixels does not fit into a picture resized to 200"):
        prepare_classifier_input(corners(), 200, 224, MEAN, STD)
