"""A video file as a source: each of its frames is one sample."""

from __future__ import annotations

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

from sources.errors import NoSuchFile, NotAVideo, NoVideoStream
from sources.inputs.sample import Encoding, Pace, RgbImage, Sample, image_sample
from sources.inputs.source import Source

log = logging.getLogger(__name__)

DEFAULT_FRAMES_PER_S = 25.0  # for containers that do not say, such as raw H.264


class VideoFile(Source):
    """The frames of a video file, complete and in order.

    `pace="max"` gives frames as fast as they are asked for, `"native"` no faster than they were filmed. Frames that
    cannot be decoded are left out and counted. One of 640x272 costs 1.7 ms: decode 0.5, to RGB 0.7, JPEG 0.5.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        name: str = "video",
        loop: bool = False,
        pace: Pace = "max",
        limit: int | None = None,
        encoding: Encoding = "jpeg",
        quality: int = 90,
    ) -> None:
        self.name = name
        self.path = Path(path)
        self._loop, self._pace, self._limit = loop, pace, limit
        self._encoding, self._quality = encoding, quality
        self._closed = threading.Event()
        with _open(self.path) as container:  # a bad file is told of before anything is started for it
            stream = container.streams.video[0]
            self.frames_per_s = float(stream.average_rate or DEFAULT_FRAMES_PER_S)
            self.frame_count = stream.frames or None  # as the header says; None when it does not

    @property
    def count(self) -> int | None:
        """How many samples will come, as far as the file's header tells; None: unknown or without end."""
        if self._loop or self.frame_count is None:
            return self._limit
        return self.frame_count if self._limit is None else min(self.frame_count, self._limit)

    def samples(self) -> Iterator[Sample]:
        started_s = time.monotonic()
        for index, picture in enumerate(self._pictures()):
            if self._limit is not None and index >= self._limit:
                return
            if self._pace == "native":
                self._closed.wait(max(0.0, started_s + index / self.frames_per_s - time.monotonic()))
            if self._closed.is_set():
                return
            yield image_sample(self.name, index, picture, self._encoding, self._quality)

    def close(self) -> None:
        self._closed.set()

    def _pictures(self) -> Iterator[RgbImage]:
        while True:
            decoded = 0
            with _open(self.path) as container:
                for picture in self._decode(container):
                    decoded += 1
                    yield picture
            if not decoded:
                raise NotAVideo(str(self.path), "not one frame of it could be decoded")
            if not self._loop:
                return

    def _decode(self, container: InputContainer) -> Iterator[RgbImage]:
        for packet in container.demux(container.streams.video[0]):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError as error:
                self.unreadable += 1
                log.warning("%s: one frame cannot be decoded: %s", self.path, error.strerror)
                continue
            for frame in frames:
                yield to_upright_image(frame)


def to_upright_image(frame: av.VideoFrame) -> RgbImage:
    """Return the pixels (H, W, 3) of a frame, turned as its file says it is to be shown (telephones film sideways)."""
    picture: RgbImage = frame.to_ndarray(format="rgb24").astype(numpy.uint8, copy=False)
    quarter_turns = round(frame.rotation / 90) % 4  # counterclockwise, as numpy counts them
    return numpy.ascontiguousarray(numpy.rot90(picture, quarter_turns)) if quarter_turns else picture


def _open(path: Path) -> InputContainer:
    if not path.is_file():
        raise NoSuchFile(str(path), "a video file")
    av.logging.set_level(av.logging.PANIC)  # else FFmpeg writes to the terminal; its errors are raised anyway
    try:
        container = av.open(str(path), mode="r")
    except (OSError, av.error.FFmpegError) as error:
        raise NotAVideo(str(path), error.strerror or type(error).__name__) from error
    if not container.streams.video:
        streams = tuple(f"{stream.type} ({stream.codec_context.name})" for stream in container.streams)
        container.close()
        raise NoVideoStream(str(path), streams)
    return container
