"""The memory that a container may have, as its control group says it (version 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class MemoryUsage:
    """In bytes. What could be had back at once, such as files that are cached, is not used."""

    used_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class _CgroupFileNames:
    """What the files of a version are called."""

    limit: str
    usage: str
    reclaimable: str


_V1 = _CgroupFileNames("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _CgroupFileNames("memory.max", "memory.current", "inactive_file")


class MemoryCgroups:
    """The control groups that this process is in, from its own to the outermost that can be seen.

    `root` stands in for `/`. Limits are read again each time: a container's may be changed while it runs.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._names, self._folders = _find(root)

    def memory_usage(self, below_bytes: int) -> MemoryUsage | None:
        """The tightest limit below so many bytes; None if there is none: "no limit" is a huge number in version 1."""
        limits = [
            (limit, folder) for folder in self._folders if (limit := _number(folder / self._names.limit)) is not None
        ]
        limit, folder = min(limits, default=(below_bytes, None))
        if folder is None or limit >= below_bytes:
            return None
        usage = _number(folder / self._names.usage)
        if usage is None:
            return None
        return MemoryUsage(max(0, usage - self._reclaimable(folder)), limit)

    def _reclaimable(self, folder: Path) -> int:
        for line in _text(folder / "memory.stat").splitlines():
            name, _, value = line.partition(" ")
            if name == self._names.reclaimable:
                return int(value)
        return 0


def _find(root: Path) -> tuple[_CgroupFileNames, list[Path]]:
    mounts = root / "sys" / "fs" / "cgroup"
    own = ""
    for line in _text(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _V1, _folders(mounts / "memory", path)
        if not controllers:
            own = path
    return _V2, _folders(mounts, own)


def _folders(mount: Path, path: str) -> list[Path]:
    parts = [part for part in path.split("/") if part]
    # A container may be told its path on the host, or one from a namespace beside it, and see its own group only.
    if ".." in parts or not mount.joinpath(*parts).is_dir():
        parts = []
    return [mount.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None  # "max": no limit


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
