"""Folders with the files of Linux control groups, versions 1 and 2."""

from __future__ import annotations

from pathlib import Path

GIB = 1 << 30


def write_proc_self_cgroup(root: Path, *lines: str) -> None:
    """Write /proc/self/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


def write_cgroup_v2(root: Path, path: str, limit: str, usage: int, inactive_file: int) -> None:
    """Write the files of a group; `limit` may be "max"."""
    folder = root / "sys/fs/cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 4096\nfile 8192\ninactive_file {inactive_file}\nactive_file 0\n")


def write_cgroup_v1(root: Path, path: str, limit: int, usage: int, inactive_file: int) -> None:
    """Write the files of a group; a `limit` of 9223372036854771712 means unlimited."""
    folder = root / "sys/fs/cgroup/memory" / path
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"cache 8192\ninactive_file 1\ntotal_inactive_file {inactive_file}\n")
