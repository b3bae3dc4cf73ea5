"""A camera as a source: a device of this machine, or an address on the network; the newest frame, never an old one."""

from __future__ import annotations

import logging
import re
import sys
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import av
import av.error
import av.logging
from av.container import InputContainer

from sources.errors import BadSetting, CameraUnavailable
from sources.inputs.sample import Encoding, Sample, image_sample
from sources.inputs.source import Source
from sources.inputs.video import to_upright_image

log = logging.getLogger(__name__)

OPEN_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 5.0  # a stream that stands still this long has ended; also the longest that a closed camera lingers
BACKOFF_INITIAL_S = 0.5
BACKOFF_MAX_S = 10.0


class Camera(Source):
    """The newest frame of a camera, each time one is asked for; frames that nobody asked for in time count as dropped.

    `device` is a number (`/dev/video0`; on macOS the first camera), a device's path, or an address: `rtsp://`,
    `http://` (MJPEG, MPEG-TS), `tcp://`. A stream that ends or stands still is opened again, after 0.5 s and then ever
    more slowly, up to every 10 s. One that cannot be opened at the start raises `CameraUnavailable` from `samples`.

    Tried: MPEG-TS over TCP, MJPEG over HTTP, H.264 over RTSP (TCP) from GStreamer's server, each cut off and come back.
    Not tried, for want of them: a Video4Linux or macOS device, an RTSP camera in hardware, RTSP over UDP.
    """

    live = True

    def __init__(
        self,
        device: str | int = 0,
        *,
        name: str = "camera",
        limit: int | None = None,
        encoding: Encoding = "jpeg",
        quality: int = 90,
    ) -> None:
        self.name = name
        self.device = _without_password(str(device))
        self._file, self._format, self._options = _how_to_open(str(device))
        self._limit, self._encoding, self._quality = limit, encoding, quality
        self._closed = threading.Event()
        self._changed = threading.Condition()
        self._newest: tuple[av.VideoFrame, float] | None = None  # with its time of arrival, by the monotonic clock

    def samples(self) -> Iterator[Sample]:
        container = self._open()
        reader = threading.Thread(target=self._read, args=(container,), name=f"camera-{self.name}", daemon=True)
        reader.start()
        try:
            index = 0
            while (self._limit is None or index < self._limit) and (newest := self._take()) is not None:
                frame, arrived_s = newest
                yield image_sample(self.name, index, to_upright_image(frame), self._encoding, self._quality, arrived_s)
                index += 1
        finally:
            self.close()
            reader.join(READ_TIMEOUT_S)

    def close(self) -> None:
        self._closed.set()
        with self._changed:
            self._changed.notify_all()

    def _take(self) -> tuple[av.VideoFrame, float] | None:
        """Wait for a frame newer than the last one taken; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._newest is not None or self._closed.is_set())
            newest, self._newest = self._newest, None
            return None if self._closed.is_set() else newest

    def _read(self, container: InputContainer | None) -> None:
        """The reader thread: decode all that comes, keep the newest, open again what ended, until closed."""
        wait_s = BACKOFF_INITIAL_S
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
            if not self._closed.is_set():
                log.warning("camera %s: %s after %d frames; opening it again", self.device, reason, frames)
            wait_s = BACKOFF_INITIAL_S if frames else min(2 * wait_s, BACKOFF_MAX_S)
            container = self._reopen(wait_s)

    def _decode(self, container: InputContainer) -> Iterator[av.VideoFrame]:
        for packet in container.demux(container.streams.video[0]):
            if self._closed.is_set():
                return
            try:
                yield from packet.decode()
            except av.error.InvalidDataError:  # the network lost a part of it: the next key frame puts it right
                self.unreadable += 1

    def _offer(self, frame: av.VideoFrame) -> None:
        with self._changed:
            self.dropped += self._newest is not None
            self._newest = (frame, time.monotonic())
            self._changed.notify_all()

    def _reopen(self, wait_s: float) -> InputContainer | None:
        while not self._closed.wait(wait_s):
            try:
                return self._open()
            except CameraUnavailable as error:
                wait_s = min(2 * wait_s, BACKOFF_MAX_S)
                log.info("%s; trying again in %.1f s", error, wait_s)
        return None

    def _open(self) -> InputContainer:
        av.logging.set_level(av.logging.PANIC)  # else FFmpeg writes to the terminal; its errors are raised anyway
        try:
            timeout = (OPEN_TIMEOUT_S, READ_TIMEOUT_S)
            container = av.open(self._file, format=self._format, options=self._options, timeout=timeout)
        except PermissionError as error:
            raise CameraUnavailable(self.device, "no permission; may this user read it (group 'video')?") from error
        except (
            OSError,
            ValueError,
            av.error.FFmpegError,
        ) as error:  # ValueError: no such format in this build of FFmpeg
            raise CameraUnavailable(self.device, getattr(error, "strerror", None) or str(error)) from error
        if not container.streams.video:
            container.close()
            raise CameraUnavailable(self.device, "it answers, but sends no video")
        return container


def _how_to_open(device: str) -> tuple[str, str | None, dict[str, str]]:
    """Return FFmpeg's file, format and options for a device."""
    if "://" in device:
        options = {"fflags": "nobuffer"}
        if device.startswith("rtsp"):
            options["rtsp_transport"] = (
                "tcp"  # over UDP, cameras behind NAT stay silent and lost packets smear the picture
            )
        return device, None, options
    if re.fullmatch(r"\d+", device):
        return (
            (device, "avfoundation", {"framerate": "30"})
            if sys.platform == "darwin"
            else (f"/dev/video{device}", "v4l2", {})
        )
    if device.startswith("/dev/"):
        return device, "v4l2", {}
    raise BadSetting("device", device, "a number, a path such as /dev/video0, or an address such as rtsp://host/stream")


def _without_password(device: str) -> str:
    """An address as people may see it."""
    if "://" not in device or "@" not in device:
        return device
    parts = urlsplit(device)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
