"""Writes annotated pictures as a short video that every browser plays."""

import fractions
from collections.abc import Iterable
from pathlib import Path

import av
import av.error
import av.logging
import numpy
from PIL import Image

from sources.gallery.annotate import fit_image

# In order of preference. PyAV's wheels have libx264; every FFmpeg has MPEG-4 part 2, but not every browser plays it.
ENCODERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("libx264", {"preset": "superfast", "crf": "21"}),
    ("libopenh264", {}),
    ("mpeg4", {"qscale": "4"}),
)


def write_clip(path: Path, images: Iterable[Image.Image], fps: float) -> None:
    """Write an MP4 file (H.264, yuv420p) of the size of the first image; images of other sizes are fitted.

    Raises `OSError` if the file cannot be written, or this build of FFmpeg has none of the `ENCODERS`.
    """
    available = [encoder for encoder in ENCODERS if encoder[0] in av.codecs_available]
    if not available:
        raise OSError(f"PyAV has none of the encoders {', '.join(name for name, _ in ENCODERS)}")
    name, options = available[0]
    av.logging.set_level(av.logging.PANIC)  # FFmpeg would write to the terminal; PyAV raises its errors anyway
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(name, rate=fractions.Fraction(fps).limit_denominator(1000), options=dict(options))
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt = "yuv420p"
        size: tuple[int, int] | None = None
        for image in images:
            if size is None:
                size = (image.width // 2 * 2, image.height // 2 * 2)  # yuv420p stores one colour for 2x2 pixels
                stream.width, stream.height = size
            pixels = numpy.asarray(_resized(image, size))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if 0 <= image.width - size[0] <= 1 and 0 <= image.height - size[1] <= 1:
        return image.crop((0, 0, *size))  # sharper than scaling by a pixel
    return fit_image(image, size, (0, 0, 0))
