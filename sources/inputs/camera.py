"""A camera as a source: a local device or a network stream, of which only the newest frame is sent."""

import itertools
import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import av
import av.error
from av.container import InputContainer

from brokers.config.schema import SourceTable
from brokers.errors import UsageError
from brokers.process.backoff import Backoff
from sources.inputs.source import Sample
from sources.inputs.video import VideoSource

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 5.0  # a stream that stalls this long has ended; also how long `close` may take
REOPEN_FIRST_DELAY_S = 0.5
REOPEN_LONGEST_DELAY_S = 10.0


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
                    self._offer(frame)
            except (OSError, av.error.FFmpegError) as error:
                reason = error.strerror or type(error).__name__
            finally:
                container.close()
            if frames:
                backoff.reset()
            if not self._closed.is_set():
                log.warning("camera %s: %s after %d frames; reopening it", self.device, reason, frames)
            container = self._reopen(backoff)

    def _offer(self, frame: av.VideoFrame) -> None:
        with self._changed:
            self.dropped += self._newest is not None
            self._newest = (frame, time.monotonic())
            self._changed.notify_all()

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
    """FFmpeg's file, format and options for a device."""
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
