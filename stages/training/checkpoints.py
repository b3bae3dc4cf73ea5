"""Versions of a part on disk: one safetensors file each, whole or not there, and the last two of them.

A file holds the parameters and buffers under `model/NAME`, and what the optimizer keeps of each parameter under
`optimizer/NAME/KEY`. There is no random state to keep: what a random layer draws follows from the source's seed, the
step and the micro-batch (`brokers.protocol.training.micro_batch_seed`).
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from brokers.protocol.training import SourceProgress
from stages.training.errors import CannotCheckpoint, ForeignCheckpoint, StaleWriter

# Two: should a worker die while some have written the newest and others have not, all have the one before.
CHECKPOINTS_TO_KEEP = 2
_PROGRESS = TypeAdapter(dict[str, SourceProgress])
# Another worker of the stage may be writing: it is done, or dead, after so long. (safetensors begins with a `.tmp`.)
_ABANDONED_S = 600.0
_NAME = re.compile(r"version-(\d{12})\.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A version of a part: its number, its tensors, how many steps of which source are in it, and of which term."""

    version: int
    tensors: Mapping[str, torch.Tensor]
    progress: Mapping[str, SourceProgress] = field(default_factory=dict)
    term: int = 0  # in which it is written


class CheckpointStore:
    """The checkpoints of one stage in one folder. `fingerprint` tells the part and its recipe from others.

    Workers of one stage may share the folder. One that was frozen, and whose place another has taken, may wake in the
    middle of writing or removing: it gives up where it finds a checkpoint of a later term than its own.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint

    @property
    def versions(self) -> tuple[int, ...]:
        """What there is, the newest last. Raises `ForeignCheckpoint`."""
        try:
            found = [_NAME.fullmatch(path.name) for path in self._folder.iterdir()] if self._folder.is_dir() else []
        except FileNotFoundError:  # gone since it was there
            return ()
        except OSError as problem:
            raise ForeignCheckpoint(str(self._folder), f"it cannot be read ({problem})") from problem
        return tuple(sorted(int(match[1]) for match in found if match))

    @property
    def term(self) -> int:
        """The newest term in which one was written; 0: none was."""
        return max((self._term_of(number) for number in self.versions), default=0)

    def check(self) -> None:
        """Raise `ForeignCheckpoint` if what is there is another part's. What a killed worker left half written goes."""
        for partial in (*self._folder.glob("version-*.part"), *self._folder.glob(".tmp*")):
            with suppress(OSError):
                if time.time() - partial.stat().st_mtime > _ABANDONED_S:
                    partial.unlink()
        for number in self.versions:
            path = self._path(number)
            try:
                self._metadata(path)
            except ForeignCheckpoint:
                if path.exists():  # else the worker that trains has let go of it meanwhile
                    raise

    def save(self, version: Checkpoint) -> None:
        """Write one, and let go of those that are too old.

        Raises `CannotCheckpoint` or `StaleWriter`; what is there stays as it is then.
        """
        path = self._path(version.version)
        partial = path.with_suffix(f".{version.term}.part")  # one of another term may be writing the same version
        metadata = {
            "fingerprint": self._fingerprint,
            "version": str(version.version),
            "term": str(version.term),
            "progress": json.dumps({name: item.model_dump() for name, item in version.progress.items()}),
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in version.tensors.items()}, partial, metadata)
            _fsync(partial)
            self._check_place(version.term)
            partial.replace(path)
            _fsync(self._folder)
        except (OSError, SafetensorError) as problem:
            raise CannotCheckpoint(str(path), str(problem)) from problem
        finally:
            with suppress(OSError):  # it is there only if something went wrong
                partial.unlink()
        with suppress(OSError):  # one that cannot be taken away does no harm; the new one is there
            for old in self.versions[:-CHECKPOINTS_TO_KEEP]:
                self._path(old).unlink(missing_ok=True)

    def load(self, number: int) -> Checkpoint:
        """Read one. Raises `ForeignCheckpoint`."""
        path = self._path(number)
        metadata = self._metadata(path)
        try:
            progress = _PROGRESS.validate_json(metadata.get("progress", "{}"))
            with safe_open(path, framework="pt") as file:
                # Memory of their own: a view of the file begins at any byte, where kernels add up in another order.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
        except ValidationError as problem:
            raise ForeignCheckpoint(str(path), "its progress is none") from problem
        except (SafetensorError, OSError) as problem:
            raise ForeignCheckpoint(str(path), f"it cannot be read ({problem})") from problem
        return Checkpoint(number, tensors, progress)

    def delete_after(self, number: int, term: int) -> None:
        """Let go of what is newer than this version: it was given up in this term, and its number will be used again.

        Raises `StaleWriter`.
        """
        for newer in self.versions:
            if newer > number:
                self._check_place(term)
                self._path(newer).unlink(missing_ok=True)

    def _check_place(self, term: int) -> None:
        """Raise `StaleWriter` if another worker has written here in a later term."""
        if (later := self.term) > term:
            raise StaleWriter(str(self._folder), term, later)

    def _term_of(self, number: int) -> int:
        """The term in which one was written; 0 where that cannot be told."""
        try:
            return int(self._metadata(self._path(number)).get("term", "0"))
        except (ForeignCheckpoint, ValueError):
            return 0

    def _path(self, number: int) -> Path:
        return self._folder / f"version-{number:012d}.safetensors"

    def _metadata(self, path: Path) -> dict[str, str]:
        try:
            with safe_open(path, framework="pt") as file:
                found: dict[str, str] = file.metadata() or {}
        except (SafetensorError, OSError) as problem:
            raise ForeignCheckpoint(str(path), f"it cannot be read ({problem})") from problem
        if (made := found.get("fingerprint")) != self._fingerprint:
            raise ForeignCheckpoint(
                str(path), f"expected the part {self._fingerprint!r}, it is of {made!r}: another model, cut or recipe"
            )
        return found


def _fsync(path: Path) -> None:
    """Have what was written survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
