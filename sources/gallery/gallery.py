"""What a person looks at after a run: the best pictures with what was found in them, a contact sheet, a short clip."""

from __future__ import annotations

import contextlib
import io
import logging
import queue
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sources.gallery.annotate import annotate
from sources.gallery.best_frames import BestFrames
from sources.gallery.clip import NoEncoder, write_clip
from sources.gallery.contact_sheet import CELL_PX, MAX_ASPECT_RATIO, SheetCell, draw_contact_sheet, format_counts
from sources.inputs.sample import RgbImage

log = logging.getLogger(__name__)

# Widths are brought between these: labels in smaller pictures are too coarse to read, larger ones cost too much.
FRAME_WIDTH_PX = (960, 1920)
CLIP_WIDTH_PX = (640, 960)
MAX_CLIP_FRAMES = 600  # up to 30 MB of JPEG; past it, every second frame goes, and every second one that comes
MAX_NAME_CHARS = 64  # of a source's name in a file's; file systems allow 255 bytes for the whole
QUEUE_SIZE = 32  # pictures that wait to be drawn; a faster stream leaves some out rather than grow


@dataclass(frozen=True, slots=True)
class AnnotatedFrame:
    """One annotated picture that may come into the album, as JPEG."""

    source: str
    index: int
    full_jpeg: bytes
    thumbnail_jpeg: bytes  # for the contact sheet: drawn at its size, since labels that are scaled down cannot be read
    labels: tuple[str, ...]


class Gallery:
    """Collects pictures with their results, on a thread of its own and in bounded memory; writes files only at the end.

    Nothing is on disk before `finish`, and each file appears under its name only when it is whole. One frame of 640x272
    costs the thread 1 ms, and 8 more where it is among the best so far; `finish` takes 3 ms for each frame of the clip.
    """

    def __init__(self, folder: Path, *, fps: float, max_frames: int = 12, title: str = "") -> None:
        self.folder = folder
        self.skipped = 0  # pictures that came too fast, or could not be drawn
        self._fps, self._keep, self._title = fps, max_frames, title or folder.name
        self._stills: BestFrames[AnnotatedFrame] = BestFrames(max_frames)
        self._clip: list[bytes] = []  # annotated JPEG
        self._stride = 1  # of the frames of the stream, each stride-th is in the clip
        self._count = self._with_finds = 0
        self._kinds: Counter[str] = Counter()
        self._pending: queue.Queue[tuple[RgbImage | Callable[[], RgbImage], Mapping[str, Any]] | None] = queue.Queue(
            QUEUE_SIZE
        )
        self._thread = threading.Thread(target=self._run, name="album", daemon=True)
        self._thread.start()

    def add(self, picture: RgbImage | Callable[[], RgbImage], result: Mapping[str, Any]) -> bool:
        """Take one picture (H, W, 3), or what gives it, and its result; never block. False: left out, too fast."""
        try:
            self._pending.put_nowait((picture, result))
        except queue.Full:
            self.skipped += 1
            return False
        return True

    def finish(self) -> dict[str, Any]:
        """Write all files, end the thread; return their names below the folder: `frames` (a list), `sheet`, `clip`."""
        if self._thread.is_alive():
            self._pending.put(None)
            self._thread.join()
        stills = [kept.item for kept in self._stills.best()]
        if not stills:
            return {"frames": []}
        (self.folder / "frames").mkdir(parents=True, exist_ok=True)
        names: list[str] = []
        for still in stills:
            names.append(f"frames/{_free_name(still, names)}.jpg")
            with _whole(self.folder / names[-1]) as part:
                part.write_bytes(still.full_jpeg)
        with _whole(self.folder / "sheet.jpg") as part:
            self._sheet(stills).save(part, "JPEG", quality=90)
        files: dict[str, Any] = {"frames": names, "sheet": "sheet.jpg"}
        try:
            with _whole(self.folder / "clip.mp4") as part:
                write_clip(part, map(_opened, self._clip), self._fps)
            files["clip"] = "clip.mp4"
        except (NoEncoder, OSError, ValueError) as error:  # the stills are there: no run fails for want of a clip
            log.warning("no clip was written: %s", error)
        return files

    def _run(self) -> None:
        while (work := self._pending.get()) is not None:
            picture, result = work
            try:
                self._take(picture() if callable(picture) else picture, result)
            except Exception as error:  # noqa: BLE001 - a picture or a result of anybody's making: Pillow raises anything
                self.skipped += 1
                log.warning("picture %s is not in the album: %s: %s", result.get("index"), type(error).__name__, error)

    def _take(self, picture: RgbImage, result: Mapping[str, Any]) -> None:
        finds = result.get("objects") or (result.get("classes") or [])[:1]
        labels = tuple(str(find["label"]) for find in finds)

        def still() -> AnnotatedFrame:
            full = annotate(picture, result, _width(picture, FRAME_WIDTH_PX))
            small = annotate(picture, result, _width(picture, (CELL_PX, CELL_PX)), caption=False)
            source, index = str(result.get("source", "")), int(result.get("index", self._count))
            return AnnotatedFrame(source, index, _jpeg(full, 92), _jpeg(small, 92), labels)

        self._stills.offer(sum(float(find["score"]) for find in finds), still)
        if self._count % self._stride == 0:
            self._clip.append(_jpeg(annotate(picture, result, _width(picture, CLIP_WIDTH_PX)), 88))
        self._count += 1
        self._with_finds += bool(finds)
        self._kinds.update(labels)
        if len(self._clip) > MAX_CLIP_FRAMES:
            del self._clip[1::2]
            self._stride *= 2

    def _sheet(self, stills: list[AnnotatedFrame]) -> Image.Image:
        several = len({still.source for still in stills}) > 1
        names = [f"{still.source} #{still.index}" if several else f"#{still.index}" for still in stills]
        cells = [
            SheetCell(_opened(still.thumbnail_jpeg), name, format_counts(still.labels))
            for still, name in zip(stills, names, strict=True)
        ]
        subtitle = f"{self._count} pictures, something found in {self._with_finds}"
        return draw_contact_sheet(cells, self._title, subtitle, self._kinds)


def _free_name(still: AnnotatedFrame, taken: Sequence[str]) -> str:
    """A name for its file: a source may have any name at all, in any length, and others may become the same."""
    source = re.sub(r"[^A-Za-z0-9_.-]", "_", still.source)[:MAX_NAME_CHARS].lstrip(".")
    name = free = f"{source}-{still.index:06d}" if source else f"{still.index:06d}"
    number = 1
    while f"frames/{free}.jpg" in taken:
        number += 1
        free = f"{name}-{number}"
    return free


def _width(picture: RgbImage, limits: tuple[int, int]) -> int:
    """The width to draw a picture at; a tall one is made narrower: 10x4000 would become 400 megapixels."""
    picture_height, picture_width = int(picture.shape[0]), int(picture.shape[1])
    width = min(max(picture_width, limits[0]), limits[1])
    height = picture_height * width / picture_width
    return max(1, round(width * min(1.0, MAX_ASPECT_RATIO * limits[1] / height)))


def _jpeg(image: Image.Image, quality: int) -> bytes:
    body = io.BytesIO()
    image.save(body, "JPEG", quality=quality)
    return body.getvalue()


def _opened(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg))


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `path` when all went well, and is removed otherwise."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
