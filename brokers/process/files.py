"""Atomic file writes, file locks and the folders of runs, for all that Sparse keeps on disk."""

import contextlib
import fcntl
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

_PROBE_BYTES = 4096  # a block of most file systems: an empty file fits on a full disk


@contextlib.contextmanager
def atomic_path(
    path: Path, *, durable: bool = False, before_rename: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on an exception it is removed.

    Readers see the old file or the complete new one. `durable`: the data is flushed to the disk before the rename, and
    the directory after it, so that the file also survives a loss of power. `before_rename` is called after that flush,
    which may take seconds, and directly before the rename; it may raise to keep the old file.
    """
    # Two processes may write the same file; in containers that share a folder they may have the same process id.
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield partial
        if durable:
            _flush(partial)
        before_rename()
        partial.replace(path)
        if durable:
            _flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write `data` to `path` atomically (see `atomic_path`). Raises `OSError`."""
    with atomic_path(path, durable=durable) as partial:
        partial.write_bytes(data)


def check_writable(folder: Path) -> None:
    """Create `folder` if it is missing, write a file in it, and delete that. Raises `OSError`, such as a full disk."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp-", suffix=".part") as file:
        file.write(bytes(_PROBE_BYTES))
        file.flush()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[BinaryIO]:
    """Hold an exclusive advisory lock on `path` (created if missing); yield the open lock file.

    The kernel releases the lock when the process ends, however it ends. Raises `BlockingIOError` where `wait` is false
    and another process holds it, and `OSError` for a symbolic link: in a shared folder it may be of another user.
    """
    with open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666)) as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield file


def new_run_folder(base: Path, name: str) -> Path:
    """Return an unused folder path for a run that starts now: `name` and the local time; the folder is not created."""
    folder = base / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return folder if not folder.exists() else folder.with_name(f"{folder.name}-{os.getpid()}")
