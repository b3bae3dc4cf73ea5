"""A short video of annotated pictures, that every browser and telephone plays."""

from __future__ import annotations

import fractions
from collections.abc import Iterable
from pathlib import Path

import av
import av.error
import av.logging
import numpy
from PIL import Image

# In the order of preference. libx264 is in PyAV's wheels; MPEG-4 part 2 is in every FFmpeg, but not in every browser.
ENCODERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("libx264", {"preset": "superfast", "crf": "21"}),
    ("libopenh264", {}),
    ("mpeg4", {"qscale": "4"}),
)


class NoEncoder(Exception):
    """This build of FFmpeg has none of the encoders that a clip can be written with."""

    def __str__(self) -> str:
        return f"PyAV has none of the encoders {', '.join(name for name, _ in ENCODERS)}"


def write_clip(path: Path, images: Iterable[Image.Image], fps: float) -> None:
    """Write the images as an MP4 file (H.264, yuv420p) of the size of the first; others get bars.

    Raises `NoEncoder`, and `OSError` when the file cannot be written.
    """
    name, options = _encoder()
    av.logging.set_level(av.logging.PANIC)  # else FFmpeg writes to the terminal; its errors are raised anyway
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(name, rate=fractions.Fraction(fps).limit_denominator(1000), options=options)
        assert isinstance(stream, av.VideoStream)
        stream.pix_fmt = "yuv420p"
        size: tuple[int, int] | None = None
        for image in images:
            if size is None:
                size = (image.width // 2 * 2, image.height // 2 * 2)  # yuv420p has one colour for 2x2 pixels
                stream.width, stream.height = size
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(numpy.asarray(_framed(image, size)), format="rgb24"))
            )
        container.mux(stream.encode(None))


def _encoder() -> tuple[str, dict[str, str]]:
    for name, options in ENCODERS:
        if name in av.codecs_available:
            return name, dict(options)
    raise NoEncoder


def _framed(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.size == size:
        return image
    if abs(image.width - size[0]) <= 1 and abs(image.height - size[1]) <= 1:
        return image.crop((0, 0, *size))
    scale = min(size[0] / image.width, size[1] / image.height)
    fitted = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    frame = Image.new("RGB", size)
    frame.paste(fitted, ((size[0] - fitted.width) // 2, (size[1] - fitted.height) // 2))
    return frame
