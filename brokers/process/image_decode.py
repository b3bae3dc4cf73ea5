"""The one picture decoder: from the bytes of a JPEG or PNG file to an RGB array.

The gateway, the stages and the gallery all use it, so that a picture is accepted by all of them or by none. EXIF
orientation is honoured, as viewers do; of an animation it is the first frame; transparency is dropped; 16-bit grey
keeps its upper 8 bits; CMYK is converted as Pillow does, without a colour profile.
"""

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps, JpegImagePlugin, PngImagePlugin

from brokers.errors import BadPayload, TooLarge
from brokers.protocol.messages import JPEG, JPEG_SIGNATURE, PNG, PNG_SIGNATURE

# Pillow warns about damaged metadata; senders of pictures must not be able to fill standard error with it.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

RgbImage = npt.NDArray[np.uint8]  # (H, W, 3), red, green, blue

# 8192 x 6144, which is 151 MB as RGB: above the 20 to 48 megapixels of cameras and telephones, below the memory of the
# smallest device that runs a detector. The size is read from the header, before any pixel is.
MAX_PICTURE_BYTES = 8192 * 6144 * 3


def decode_picture(data: bytes | bytearray | memoryview, content_type: str = "") -> RgbImage:
    """Decode a JPEG or PNG file to (H, W, 3) uint8 RGB; its first bytes decide the format.

    `content_type` is only named in errors. Raises `BadPayload` for bytes that are neither format or that end before the
    last pixel, `TooLarge` for a picture over `MAX_PICTURE_BYTES`, before memory is allocated for it.
    """
    start = bytes(data[: len(PNG_SIGNATURE)])
    plugin: type[ImageFile.ImageFile]
    if start.startswith(JPEG_SIGNATURE):
        plugin = JpegImagePlugin.JpegImageFile
        detected_type = JPEG
    elif start == PNG_SIGNATURE:
        plugin = PngImagePlugin.PngImageFile
        detected_type = PNG
    else:
        problem = f"neither JPEG nor PNG: {len(data)} bytes that begin with {start.hex() or 'nothing'}"
        raise BadPayload(content_type or "unknown", problem)
    try:
        # Not Image.open: it warns about decompression bombs, for which we have our own limit, and loads all plugins.
        image = plugin(io.BytesIO(data))
        size_bytes = image.width * image.height * 3
        if size_bytes > MAX_PICTURE_BYTES:
            raise TooLarge(f"a picture of {image.width}x{image.height} pixels", MAX_PICTURE_BYTES, size_bytes)
        image.load()
        return _to_rgb(_upright(image))
    except TooLarge:
        raise
    except Exception as error:  # damaged bytes make Pillow's decoders raise nearly every built-in exception
        problem = f"damaged or truncated after {len(data)} bytes: {error}"
        raise BadPayload(content_type or detected_type, problem) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - damaged EXIF: viewers show the picture as it is stored, and so do we
        return image


def _to_rgb(image: Image.Image) -> RgbImage:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, np.newaxis], 3, axis=2)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
