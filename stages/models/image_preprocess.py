"""Network inputs from decoded pictures: Darknet's letterbox, and torchvision's preprocessing for classifiers.

A picture is uint8 (H, W, 3), red, green and blue, as `brokers.process.image_decode` decodes it.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from brokers.process.image_decode import RgbImage

Float32Array = npt.NDArray[np.float32]

LETTERBOX_GREY = 0.5
# A uint8 divided by it in single precision equals Darknet's division in double precision.
MAX_PIXEL_VALUE = np.float32(255)
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Longer pictures are cropped before they are resized: a picture of 1 x 50,000,000 pixels would otherwise be resized to
# 256 x 12,800,000,000. The centre crop contains none of the pixels that are lost.
MAX_ASPECT_RATIO = 16


def letterbox(picture: RgbImage, width: int, height: int) -> Tensor:
    """Fit a picture into the middle of a grey (1, 3, height, width) float32 tensor in 0..1, keeping its aspect ratio.

    Resized as Darknet's letterbox_image and resize_image do, except that each side keeps at least one pixel.
    """
    inner_width, inner_height = letterbox_size(picture.shape[1], picture.shape[0], width, height)
    left = (width - inner_width) // 2
    top = (height - inner_height) // 2
    boxed = np.full((1, 3, height, width), LETTERBOX_GREY, np.float32)
    resized = _resize(picture, inner_width, inner_height)  # (inner_height, inner_width, 3)
    boxed[0, :, top : top + inner_height, left : left + inner_width] = resized.transpose(2, 0, 1)
    return torch.from_numpy(boxed)


def letterbox_size(picture_width: int, picture_height: int, width: int, height: int) -> tuple[int, int]:
    """Return the (width, height) of a picture inside its letterbox, each at least 1."""
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
    """Return the normalised centre crop, (1, 3, crop, crop) float32, equal to torchvision's `ImageClassification`.

    The shorter side is resized to `resize` pixels (antialiased), the middle `crop` x `crop` is cut out and normalised.
    Raises `ValueError` if `crop` is larger than `resize`.
    """
    if crop > resize:
        raise ValueError(f"crop of {crop} pixels from a picture resized to {resize}: expected at most {resize}")
    image = Image.fromarray(_limit_aspect_ratio(picture))
    short = min(image.size)
    size = tuple(int(resize * side / short) for side in image.size)  # rounded down, as torchvision does
    left, top = (round((side - crop) / 2) for side in size)
    image = image.resize((size[0], size[1]), RESAMPLING[interpolation]).crop((left, top, left + crop, top + crop))
    return normalise(_to_batch(image), mean, std)


def resize_and_normalise(picture: RgbImage, width: int, height: int, normalise: Callable[[Tensor], Tensor]) -> Tensor:
    """Resize a picture without keeping its aspect ratio, and normalise it to (1, 3, height, width) float32.

    Bilinear and antialiased (Pillow's); a picture that has the size already keeps its pixels.
    """
    return normalise(_to_batch(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR)))


def normalise(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Convert uint8 (B, 3, H, W) to float32 of the same shape: scaled to 0..1, then (x - mean) / std per channel.

    Elementwise, so that a picture gets the same numbers alone and in a batch.
    """
    per_channel = (-1, 1, 1)
    means, stds = (torch.tensor(values, dtype=torch.float32, device=pictures.device) for values in (mean, std))
    return pictures.float().div_(255).sub_(means.view(per_channel)).div_(stds.view(per_channel))


def _to_batch(image: Image.Image) -> Tensor:
    """Return the pixels of an RGB image as uint8 (1, 3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)[np.newaxis]))


def _limit_aspect_ratio(picture: RgbImage) -> RgbImage:
    """Crop the longer side, around the middle, to `MAX_ASPECT_RATIO` times the shorter side."""
    height, width = picture.shape[:2]
    limit = MAX_ASPECT_RATIO * min(height, width)
    top = max(0, height - limit) // 2
    left = max(0, width - limit) // 2
    return np.ascontiguousarray(picture[top : height - top, left : width - left])


def _resize(picture: RgbImage, width: int, height: int) -> Float32Array:
    """Resize to (height, width, 3) float32 in 0..1 as Darknet's resize_image: bilinear, corners aligned.

    Only the source rows that an output row interpolates are converted, so the cost does not grow with the picture.
    """
    source_height, source_width = picture.shape[:2]
    row, row_weight = _sample_positions(source_height, height)
    column, column_weight = _sample_positions(source_width, width)
    column[-1] = source_width - 1
    column_weight[-1] = 0.0  # the last column is copied
    next_column = np.minimum(column + 1, source_width - 1)

    def interpolate_columns(rows: npt.NDArray[np.intp]) -> Float32Array:
        source = picture[rows]  # (height, source_width, 3)
        weight = column_weight[:, np.newaxis]  # (width, 1)
        left = source.take(column, axis=1).astype(np.float32) / MAX_PIXEL_VALUE
        right = source.take(next_column, axis=1).astype(np.float32) / MAX_PIXEL_VALUE
        interpolated: Float32Array = (1 - weight) * left + weight * right
        return interpolated

    # In the last row Darknet leaves out the second term even where rounding gave the first a weight near 0, which makes
    # that row nearly black. Networks were trained on such pictures, so it is reproduced here.
    lower_weight = row_weight.copy()
    lower_weight[-1] = 0.0
    resized: Float32Array = (1 - row_weight)[:, np.newaxis, np.newaxis] * interpolate_columns(row)
    resized += lower_weight[:, np.newaxis, np.newaxis] * interpolate_columns(np.minimum(row + 1, source_height - 1))
    return resized


def _sample_positions(source: int, target: int) -> tuple[npt.NDArray[np.intp], Float32Array]:
    """Return for each of `target` pixels the source pixel before it and the weight of the next one, both (target,)."""
    scale = np.float32(source - 1) / np.float32(max(target - 1, 1))
    position = np.arange(target, dtype=np.float32) * scale
    before = position.astype(np.intp)
    return before, position - before.astype(np.float32)
