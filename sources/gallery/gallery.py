"""The pictures of a run for people to look at: its best frames, a contact sheet, and a short clip."""

import fractions
import io
import logging
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import av
import av.error
import av.logging
import numpy
from PIL import Image

from brokers.process.files import atomic_path, write_atomic
from brokers.process.image_decode import RgbImage
from sources.gallery.drawing import (
    CELL_PX,
    MAX_ASPECT_RATIO,
    SheetCell,
    annotate,
    draw_contact_sheet,
    fit_image,
    format_counts,
)

log = logging.getLogger(__name__)

# Pictures are scaled to widths within these limits: labels in smaller ones are illegible, larger ones take too long.
FRAME_WIDTH_PX = (960, 1920)
CLIP_WIDTH_PX = (640, 960)
MAX_CLIP_FRAMES = 600  # up to 30 MB of JPEG; beyond, every second frame is dropped, and every second one that follows
MAX_NAME_CHARACTERS = 64  # of a source's name in a file name, for which file systems allow 255 bytes
QUEUE_SIZE = 32  # pictures that wait to be drawn; when it is full, further ones are skipped
T = TypeVar("T")
# In order of preference. PyAV's wheels have libx264; every FFmpeg has MPEG-4 part 2, but not every browser plays it.
ENCODERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("libx264", {"preset": "superfast", "crf": "21"}),
    ("libopenh264", {}),
    ("mpeg4", {"qscale": "4"}),
)


@dataclass(frozen=True, slots=True)
class AnnotatedFrame:
    """An annotated picture as JPEG, a candidate for the gallery."""

    source: str
    index: int
    full_jpeg: bytes
    thumbnail_jpeg: bytes  # drawn at the size of the contact sheet: labels would be illegible if scaled down
    labels: tuple[str, ...]


class Gallery:
    """Collects pictures with their results in its own thread and in bounded memory, and writes files in `finish` only.

    A frame of 640x272 takes 1 ms of the thread, and 8 ms more if it is among the best so far; `finish` takes 3 ms per
    frame of the clip.
    """

    def __init__(self, folder: Path, *, fps: float, max_frames: int = 12, title: str = "") -> None:
        self.folder = folder
        self.skipped = 0  # pictures that came too fast or could not be drawn
        self._fps = fps
        self._title = title or folder.name
        self._best: BestFrames[AnnotatedFrame] = BestFrames(max_frames)
        self._clip: list[bytes] = []  # annotated pictures, JPEG
        self._clip_stride = 1
        self._count = 0
        self._count_with_labels = 0
        self._label_counts: Counter[str] = Counter()
        self._queue: queue.Queue[tuple[Callable[[], RgbImage], Mapping[str, Any]] | None] = queue.Queue(QUEUE_SIZE)
        self._thread = threading.Thread(target=self._run, name="gallery", daemon=True)
        self._thread.start()

    def add(self, load_image: Callable[[], RgbImage], result: Mapping[str, Any]) -> bool:
        """Add a picture, (H, W, 3), and its result; never blocks. False: skipped, since the queue is full."""
        try:
            self._queue.put_nowait((load_image, result))
        except queue.Full:
            self.skipped += 1
            return False
        return True

    def finish(self) -> dict[str, Any]:
        """End the thread and write all files; return their names in the folder: `frames` (a list), `sheet`, `clip`."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        frames = self._best.best()
        if not frames:
            return {"frames": []}
        (self.folder / "frames").mkdir(parents=True, exist_ok=True)
        names: list[str] = []
        for frame in frames:
            names.append(f"frames/{_unused_name(frame, names)}.jpg")
            write_atomic(self.folder / names[-1], frame.full_jpeg)
        write_atomic(self.folder / "sheet.jpg", _to_jpeg(self._draw_sheet(frames), 90))
        files: dict[str, Any] = {"frames": names, "sheet": "sheet.jpg"}
        try:
            with atomic_path(self.folder / "clip.mp4") as path:
                write_clip(path, map(_from_jpeg, self._clip), self._fps)
            files["clip"] = "clip.mp4"
        except (OSError, ValueError) as error:  # the frames are written, so the run has not failed
            log.warning("no clip was written: %s", error)
        return files

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            load_image, result = item
            try:
                self._add(load_image(), result)
            except Exception as error:  # noqa: BLE001 - untrusted pictures and results make Pillow raise anything
                self.skipped += 1
                index = result.get("index")
                log.warning("picture %s is not in the gallery: %s: %s", index, type(error).__name__, error)

    def _add(self, picture: RgbImage, result: Mapping[str, Any]) -> None:
        items = result.get("objects") or (result.get("classes") or [])[:1]
        labels = tuple(str(item["label"]) for item in items)

        def annotated_frame() -> AnnotatedFrame:
            full = annotate(picture, result, _drawn_width(picture, FRAME_WIDTH_PX))
            thumbnail = annotate(picture, result, _drawn_width(picture, (CELL_PX, CELL_PX)), caption=False)
            source, index = str(result.get("source", "")), int(result.get("index", self._count))
            return AnnotatedFrame(source, index, _to_jpeg(full, 92), _to_jpeg(thumbnail, 92), labels)

        self._best.offer(sum(float(item["score"]) for item in items), annotated_frame)
        if self._count % self._clip_stride == 0:
            self._clip.append(_to_jpeg(annotate(picture, result, _drawn_width(picture, CLIP_WIDTH_PX)), 88))
        self._count += 1
        self._count_with_labels += bool(items)
        self._label_counts.update(labels)
        if len(self._clip) > MAX_CLIP_FRAMES:
            del self._clip[1::2]
            self._clip_stride *= 2

    def _draw_sheet(self, frames: list[AnnotatedFrame]) -> Image.Image:
        several_sources = len({frame.source for frame in frames}) > 1
        cells = []
        for frame in frames:
            title = f"{frame.source} #{frame.index}" if several_sources else f"#{frame.index}"
            cells.append(SheetCell(_from_jpeg(frame.thumbnail_jpeg), title, format_counts(frame.labels)))
        subtitle = f"{self._count} pictures, {self._count_with_labels} with detections"
        return draw_contact_sheet(cells, self._title, subtitle, self._label_counts)


def _unused_name(frame: AnnotatedFrame, used: Sequence[str]) -> str:
    """A file name for a frame: a source's name may be any text, and two may become the same file name."""
    source = re.sub(r"[^A-Za-z0-9_.-]", "_", frame.source)[:MAX_NAME_CHARACTERS].lstrip(".")
    name = unused = f"{source}-{frame.index:06d}" if source else f"{frame.index:06d}"
    number = 1
    while f"frames/{unused}.jpg" in used:
        number += 1
        unused = f"{name}-{number}"
    return unused


def _drawn_width(picture: RgbImage, limits: tuple[int, int]) -> int:
    """The width to draw a picture at, narrower for tall ones: 10x4000 pixels would become 400 megapixels."""
    height, width = int(picture.shape[0]), int(picture.shape[1])
    drawn_width = min(max(width, limits[0]), limits[1])
    drawn_height = height * drawn_width / width
    return max(1, round(drawn_width * min(1.0, MAX_ASPECT_RATIO * limits[1] / drawn_height)))


def _to_jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _from_jpeg(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg))


class BestFrames(Generic[T]):
    """Keeps the best item of each interval of the stream.

    There are at most `4 * keep` intervals. When the stream outgrows them, pairs of neighbours are merged: intervals
    double in length, and the better item of each pair stays.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._interval = 1  # in items
        self._count = 0
        self._best_score = 0.0
        self._best: dict[int, tuple[float, int, T]] = {}  # number of the interval -> score, position, item

    def offer(self, score: float, make: Callable[[], T]) -> None:
        """Consider the next item of the stream; `make` creates it if it is the best of its interval so far."""
        position = self._count
        self._count += 1
        if score <= 0 and self._best_score > 0:
            return  # `best` would not return it
        self._best_score = max(self._best_score, score)
        if position >= 4 * self._keep * self._interval:
            self._interval *= 2
            ascending = sorted(self._best.values(), key=lambda entry: (entry[0], -entry[1]))
            self._best = {entry[1] // self._interval: entry for entry in ascending}  # the better one of a pair is last
        number = position // self._interval
        if number not in self._best or score > self._best[number][0]:
            self._best[number] = (score, position, make())

    def best(self) -> list[T]:
        """The `keep` best items in stream order; items of score 0 only where there are no others.

        Of two items less than half an interval apart, which look alike, only the better one is chosen.
        """
        ranked = sorted(self._best.values(), key=lambda entry: (-entry[0], entry[1]))
        chosen: dict[int, T] = {}  # by position
        for _, position, item in [entry for entry in ranked if entry[0] > 0] or ranked:
            if len(chosen) < self._keep and all(2 * abs(position - other) >= self._interval for other in chosen):
                chosen[position] = item
        return [item for _, item in sorted(chosen.items())]


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
