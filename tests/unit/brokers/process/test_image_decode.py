"""The picture decoder: JPEG and PNG of every mode to RGB, within a memory limit."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from brokers.errors import BadPayload, TooLarge, WireError
from brokers.process.image_decode import MAX_PICTURE_BYTES, decode_picture

RGB = np.random.default_rng(1).integers(0, 256, (4, 6, 3), np.uint8)  # (H, W, 3)


def encoded(pixels: npt.NDArray[np.generic] | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A small PNG whose header claims this size."""
    data = encoded(RGB)
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize("as_type", [bytes, bytearray, memoryview])
def test_png_is_decoded_to_the_same_pixels(as_type: type[bytes]) -> None:
    pixels = decode_picture(as_type(encoded(RGB)))
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == RGB.tolist()


def test_jpeg_is_decoded_as_pillow_does() -> None:
    data = encoded(RGB, "JPEG")
    assert decode_picture(data).tolist() == np.asarray(Image.open(io.BytesIO(data))).tolist()


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees clockwise for display
    data = encoded(np.zeros((4, 6, 3), np.uint8), "JPEG", exif=exif)
    assert decode_picture(data).shape == (6, 4, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # pytest replaces the filter of the decoder
def test_damaged_exif_is_ignored() -> None:
    data = encoded(RGB, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert decode_picture(data).shape == (4, 6, 3)


def test_all_modes_become_rgb() -> None:
    grey = RGB[:, :, 0]
    assert decode_picture(encoded(grey))[..., 1].tolist() == grey.tolist()
    transparent = np.dstack([RGB, np.zeros((4, 6), np.uint8)])
    assert decode_picture(encoded(transparent)).tolist() == RGB.tolist()
    deep_grey = np.array([[0, 256, 65535]], np.uint16)
    assert decode_picture(encoded(deep_grey)).tolist() == [[[0] * 3, [1] * 3, [255] * 3]]
    assert decode_picture(encoded(Image.new("CMYK", (6, 4)), "JPEG")).shape == (4, 6, 3)
    assert decode_picture(encoded(Image.fromarray(RGB).quantize())).shape == (4, 6, 3)


@pytest.mark.parametrize("data", [b"", b"GIF89a....", b"hello world", encoded(RGB, "BMP")])
def test_other_formats_raise_bad_payload(data: bytes) -> None:
    with pytest.raises(BadPayload, match="neither JPEG nor PNG"):
        decode_picture(data, "image/jpeg")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_picture_raises_bad_payload(kind: str) -> None:
    data = encoded(np.random.default_rng(2).integers(0, 256, (64, 64, 3), np.uint8), kind)
    for length in (9, len(data) // 2, len(data) - 200):
        with pytest.raises(BadPayload, match=f"truncated after {length} bytes"):
            decode_picture(data[:length])


def test_picture_over_the_limit_is_refused_by_its_header() -> None:
    with pytest.raises(TooLarge, match="60000x60000 pixels") as caught:
        decode_picture(png_of_size(60_000, 60_000))
    assert caught.value.fields == {"limit_bytes": MAX_PICTURE_BYTES, "actual_bytes": 60_000 * 60_000 * 3}


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.sampled_from(["PNG", "JPEG"]), st.integers(0, 400), st.integers(0, 255))
def test_changed_byte_decodes_or_raises_wire_error(kind: str, position: int, value: int) -> None:
    data = bytearray(encoded(RGB, kind))
    data[position % len(data)] = value
    with contextlib.suppress(WireError):
        assert decode_picture(data).ndim == 3
