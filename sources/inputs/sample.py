"""One thing to be worked on, as a source gives it."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy
from numpy.typing import NDArray
from PIL import Image, ImageOps

from brokers.protocol.messages import JPEG, SAFETENSORS
from brokers.protocol.traceparent import TraceContext

RgbImage = NDArray[numpy.uint8]  # (H, W, 3), red, green, blue
Encoding = Literal["jpeg", "raw"]
Pace = Literal["max", "native"]

RAW_IMAGE_TENSOR = "picture"  # the name under which a raw picture travels


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """A payload to send, and what people need to know of it afterwards.

    `payload` is bytes of the content type, or named arrays, which travel as safetensors. `picture`, where there is one,
    gives the sample as (H, W, 3) uint8 RGB: what was decoded already is handed out, the rest is decoded when asked for.
    `settle`, where there is one, is for whoever has answered it: until then somebody else keeps it too. `again`: it may
    have been answered before. `trace`: the span that it came from, of who traces its own.
    """

    source: str
    index: int
    payload: bytes | Mapping[str, NDArray[Any]]
    content_type: str
    load_image: Callable[[], RgbImage] | None = None
    timestamp_s: float = field(
        default_factory=time.monotonic
    )  # when it was captured, by this machine's monotonic clock
    ack: Callable[[], None] | None = None
    redelivered: bool = False
    trace: TraceContext | None = None

    @property
    def nbytes(self) -> int:
        """What its payload takes in memory."""
        if isinstance(self.payload, bytes):
            return len(self.payload)
        return sum(array.nbytes for array in self.payload.values())


def image_sample(
    source: str, index: int, picture: RgbImage, encoding: Encoding, quality: int, timestamp_s: float | None = None
) -> Sample:
    """Return a sample of a decoded picture (H, W, 3), captured now or at `timestamp_s`: as a JPEG, or as its pixels."""
    captured_s = time.monotonic() if timestamp_s is None else timestamp_s
    if encoding == "raw":
        return Sample(source, index, {RAW_IMAGE_TENSOR: picture}, SAFETENSORS, lambda: picture, captured_s)
    body = io.BytesIO()
    Image.fromarray(picture).save(body, "JPEG", quality=quality)
    return Sample(source, index, body.getvalue(), JPEG, lambda: picture, captured_s)


def decode_image(data: bytes) -> RgbImage:
    """Return the pixels (H, W, 3) of a picture file, upright as its EXIF says, which is how stages see it too."""
    with Image.open(io.BytesIO(data)) as stored:
        image = ImageOps.exif_transpose(stored)
        if image.mode.startswith("I"):  # 16-bit grey, which `convert` would clip at 255
            image = Image.fromarray((numpy.asarray(image) >> 8).astype(numpy.uint8))
        return numpy.asarray(image.convert("RGB"))
