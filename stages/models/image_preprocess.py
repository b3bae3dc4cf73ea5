"""Pictures: from the bytes of a file to what a network reads.

A picture is uint8 (H, W, 3), RGB, as a viewer would show it: EXIF orientation is honoured. Of an animation it is the
first frame; transparency is dropped; 16 bits are cut to the upper 8; CMYK is converted as Pillow does, with no profile.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin
from torch import Tensor

from brokers.errors import BadPayload, TooLarge
from stages.errors import BadCrop

RgbImage = npt.NDArray[np.uint8]  # (H, W, 3)
Float32Array = npt.NDArray[np.float32]

# 8192 x 6144, which is 151 MB as RGB: above the 20 to 48 megapixels of cameras and telephones, below the memory of the
# smallest device that runs a detector. The size is read from the header, before any pixel is.
MAX_IMAGE_BYTES = 8192 * 6144 * 3
JPEG_SIGNATURE = b"\xff\xd8\xff"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
EXIF_ORIENTATION = 0x0112
# EXIF 2.32, 4.6.4.A: what the orientations 2 to 8 ask for.
EXIF_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LETTERBOX_GREY = 0.5
MAX_PIXEL_VALUE = np.float32(
    255
)  # dividing a byte by it in single precision gives what Darknet's division in double does
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# A longer picture is cut around its middle before it is resized: what goes is far outside any centre crop, and a
# picture of 1 x 50,000,000 pixels would otherwise be resized to 256 x 12,800,000,000.
MAX_ASPECT_RATIO = 16


def decode_image(data: bytes | bytearray | memoryview, content_type: str = "") -> RgbImage:
    """The picture in a JPEG or PNG file; its first bytes say which, `content_type` only names it in an error.

    Raises `BadPayload` for bytes that are neither, or that end before the last pixel; `TooLarge` for a picture over
    `MAX_IMAGE_BYTES`, before memory is set aside for it.
    """
    start = bytes(data[:8])
    plugin: type[ImageFile.ImageFile]
    if start.startswith(JPEG_SIGNATURE):
        plugin, found = JpegImagePlugin.JpegImageFile, "image/jpeg"
    elif start == PNG_SIGNATURE:
        plugin, found = PngImagePlugin.PngImageFile, "image/png"
    else:
        problem_text = f"neither JPEG nor PNG: {len(data)} bytes that begin with {start.hex() or 'nothing'}"
        raise BadPayload(content_type or "unknown", problem_text)
    try:
        # Not Image.open: it warns about bombs, for which we have our own limit, and loads a dozen other plugins.
        image = plugin(io.BytesIO(data))
        size_bytes = image.width * image.height * 3
        if size_bytes > MAX_IMAGE_BYTES:
            raise TooLarge(f"a picture of {image.width}x{image.height} pixels", MAX_IMAGE_BYTES, size_bytes)
        image.load()
        return _upright_rgb(image)
    except TooLarge:
        raise
    except Exception as problem:  # damaged bytes make Pillow's readers raise nearly every built-in exception
        raise BadPayload(content_type or found, f"damaged or cut off after {len(data)} bytes: {problem}") from problem


def letterbox(picture: RgbImage, width: int, height: int) -> Tensor:
    """The picture in the middle of a grey (1, 3, height, width), float32, 0 to 1, its proportions kept.

    Resized as Darknet's letterbox_image and resize_image do, its last row included. One thing Darknet cannot do: a side
    that would have no pixel left gets one.
    """
    inner_width, inner_height = letterbox_size(picture.shape[1], picture.shape[0], width, height)
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    boxed = np.full((1, 3, height, width), LETTERBOX_GREY, np.float32)
    resized = _resize(picture, inner_width, inner_height)  # (inner_height, inner_width, 3)
    boxed[0, :, top : top + inner_height, left : left + inner_width] = resized.transpose(2, 0, 1)
    return torch.from_numpy(boxed)


def letterbox_size(picture_width: int, picture_height: int, width: int, height: int) -> tuple[int, int]:
    """The (width, height) that a picture has inside its letterbox, both at least 1."""
    if np.float32(width) / np.float32(picture_width) < np.float32(height) / np.float32(picture_height):
        return width, max(1, picture_height * width // picture_width)
    return max(1, picture_width * height // picture_height), height


def prepare_classifier_input(
    picture: RgbImage,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> Tensor:
    """The middle of a picture, (1, 3, crop, crop), float32, as torchvision's `ImageClassification` prepares it.

    The shorter side becomes `resize` pixels (antialiased), then the middle `crop` x `crop` is cut out, scaled
    to 0..1, and each channel becomes (x - mean) / std. Raises `BadCrop` where the crop does not fit.
    """
    if crop > resize:
        raise BadCrop(resize, crop)
    image = Image.fromarray(_middle(picture))
    short = min(image.size)
    size = tuple(int(resize * side / short) for side in image.size)  # torchvision rounds down as well
    left, top = (round((side - crop) / 2) for side in size)
    image = image.resize((size[0], size[1]), RESAMPLING[interpolation]).crop((left, top, left + crop, top + crop))
    return normalise(_as_batch(image), mean, std)


def resize_and_normalise(picture: RgbImage, width: int, height: int, normalise: Callable[[Tensor], Tensor]) -> Tensor:
    """The whole picture, (1, 3, height, width), float32, resized without its proportions, then normalised.

    Bilinear and antialiased, as Pillow does it; a picture that has the size already keeps its pixels.
    """
    return normalise(_as_batch(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)))


def normalise(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, 3, H, W) to float32 (B, 3, H, W): each channel scaled to 0..1, then (x - mean) / std.

    A function of each pixel by itself: alone or in a batch, it becomes the same number.
    """
    by_channel = (-1, 1, 1)
    means, stds = (torch.tensor(values, dtype=torch.float32, device=pictures.device) for values in (mean, std))
    return pictures.float().div_(255).sub_(means.view(by_channel)).div_(stds.view(by_channel))


def _as_batch(image: Image.Image) -> Tensor:
    """The pixels of an RGB image as uint8 (1, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)[np.newaxis]))


def _upright_rgb(image: Image.Image) -> RgbImage:
    turned = _orientation(image)
    if turned is not None:
        image = image.transpose(turned)
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, np.newaxis], 3, axis=2)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _orientation(image: Image.Image) -> Image.Transpose | None:
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # noqa: BLE001 - damaged EXIF, read as loosely as pixels are; viewers show the picture, so do we
        return None
    return EXIF_TRANSPOSES.get(orientation) if isinstance(orientation, int) else None


def _middle(picture: RgbImage) -> RgbImage:
    """The picture, its longer side cut to `MAX_ASPECT_RATIO` times the shorter one."""
    height, width = picture.shape[:2]
    limit = MAX_ASPECT_RATIO * min(height, width)
    top, left = max(0, height - limit) // 2, max(0, width - limit) // 2
    return np.ascontiguousarray(picture[top : height - top, left : width - left])


def _resize(picture: RgbImage, width: int, height: int) -> Float32Array:
    """Darknet's resize_image: bilinear, corner on corner, first along the rows, then along the columns.

    Only the two rows that each new row is mixed from are touched: a large picture costs no more than a small one.
    """
    old_height, old_width = picture.shape[:2]
    row, below = _steps(old_height, height)
    column, right = _steps(old_width, width)
    right[-1], column[-1] = 0.0, old_width - 1  # the last column is copied
    after = np.minimum(column + 1, old_width - 1)

    def along(rows: npt.NDArray[np.intp]) -> Float32Array:
        source = picture[rows]  # (height, old_width, 3)
        mix = right[:, np.newaxis]  # (width, 1)
        first = source.take(column, axis=1).astype(np.float32) / MAX_PIXEL_VALUE
        second = source.take(after, axis=1).astype(np.float32) / MAX_PIXEL_VALUE
        mixed: Float32Array = (1 - mix) * first + mix * second
        return mixed

    # Darknet leaves out the second term in the last row even where rounding put the row a hair above the last one,
    # which makes that row nearly black. Networks were trained on such pictures, so ours are the same.
    lower = below.copy()
    lower[-1] = 0.0
    resized: Float32Array = (1 - below)[:, np.newaxis, np.newaxis] * along(row)
    resized += lower[:, np.newaxis, np.newaxis] * along(np.minimum(row + 1, old_height - 1))
    return resized


def _steps(old: int, new: int) -> tuple[npt.NDArray[np.intp], Float32Array]:
    """For each new pixel: the old pixel at or before it, and how far behind that it lies, 0 to 1; both (new,)."""
    scale = np.float32(old - 1) / np.float32(max(new - 1, 1))
    position = np.arange(new, dtype=np.float32) * scale
    whole = position.astype(np.intp)
    return whole, position - whole.astype(np.float32)
