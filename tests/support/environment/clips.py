"""Generated videos, pictures and audio: no test needs a download."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy
from PIL import Image

from brokers.process.image_decode import RgbImage

FRAME_SIZE = (64, 48)  # width, height


def numbered_frame(index: int) -> RgbImage:
    """A grey picture (H, W, 3) whose brightness encodes its number, in steps that survive compression."""
    return numpy.full((FRAME_SIZE[1], FRAME_SIZE[0], 3), 8 * index % 256, numpy.uint8)


def frame_number(image: RgbImage) -> int:
    return round(float(image.mean()) / 8)


def video_bytes(frames: int, *, container: str = "mp4", codec: str = "mpeg4", fps: int = 25) -> bytes:
    """A video whose frames are `numbered_frame`."""
    body = io.BytesIO()
    with av.open(body, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps, options={"qscale": "2", "g": "1"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(index), format="rgb24")))
        output.mux(stream.encode(None))
    return body.getvalue()


def write_video(path: Path, frames: int) -> Path:
    path.write_bytes(video_bytes(frames))
    return path


def wav_bytes() -> bytes:
    """A tenth of a second of silence as a WAV file: media, but no video."""
    body = io.BytesIO()
    with av.open(body, "w", format="wav") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(numpy.zeros((1, 800), numpy.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return body.getvalue()


def image_bytes(image_format: str = "JPEG", index: int = 3) -> bytes:
    body = io.BytesIO()
    Image.fromarray(numbered_frame(index)).save(body, image_format)
    return body.getvalue()
