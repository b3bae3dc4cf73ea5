"""Checkpoints of one stage: one safetensors file for each version, written atomically; the newest two are kept.

A file holds parameters and buffers as `model/NAME`, and the optimizer's state as `optimizer/NAME/KEY`, its numbers as
`optimizer-numbers/NAME/KEY`. It holds no random state: the seed of a micro-batch follows from the source's seed, the
step and the index (`brokers.protocol.training.micro_batch_seed`).
"""

import json
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

from brokers.errors import SparseError, UsageError
from brokers.process.files import atomic_path, check_writable
from brokers.protocol.training import SourceProgress

# When a worker dies after some stages have written the newest version and others have not, all have the one before it.
CHECKPOINTS_TO_KEEP = 2
# Another worker of the stage may be writing a temporary file; one that is older was left by a process that was killed.
_ABANDONED_S = 600.0
_TEMPORARY_FILES = (".version-*.part", ".tmp*")  # ours, and those of safetensors
_FILE_NAME = re.compile(r"version-(\d{12})\.safetensors")
_PROGRESS = TypeAdapter(dict[str, SourceProgress])


class ForeignCheckpoint(UsageError):
    """A checkpoint of another model, cut or training recipe, or a file that cannot be read."""

    def __init__(self, path: Path, problem: str) -> None:
        message = f"{path} is not a checkpoint of this stage: {problem}; name another folder, or move it away"
        super().__init__(type(self).__name__, message, key="training.checkpoints", path=str(path))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A version of a part: its tensors, the progress of each source in it, and the term in which it was written."""

    version: int
    tensors: Mapping[str, torch.Tensor]
    progress: Mapping[str, SourceProgress] = field(default_factory=dict)
    term: int = 0


class CheckpointStore:
    """The checkpoints of one stage in one folder; `fingerprint` identifies the part and its training recipe.

    Workers of one stage may share the folder. A worker that was frozen and replaced may resume in the middle of a write
    or a deletion: it stops when it finds a checkpoint of a later term (fencing by term).
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions in the folder, the newest last. Raises `ForeignCheckpoint` if the folder cannot be read."""
        try:
            names = [path.name for path in self._folder.iterdir()] if self._folder.is_dir() else []
        except FileNotFoundError:  # removed since `is_dir`
            return ()
        except OSError as error:
            raise ForeignCheckpoint(self._folder, f"it cannot be read ({error})") from error
        return tuple(sorted(int(match[1]) for match in map(_FILE_NAME.fullmatch, names) if match))

    @property
    def term(self) -> int:
        """The latest term in which one of the checkpoints was written; 0 without checkpoints."""
        return max((self._read_term(version) for version in self.versions), default=0)

    def check(self) -> None:
        """Create the folder if it is missing, and remove abandoned temporary files.

        Raises `ForeignCheckpoint` if it holds another part's, `UsageError` ("CannotCheckpoint") if it is not writable.
        """
        try:
            check_writable(self._folder)
        except OSError as error:
            message = (
                f"checkpoints cannot be written to {self._folder}: {error.strerror}: name another folder with "
                "`checkpoints` in the pipeline file or `sparse stage --checkpoints`"
            )
            raise UsageError("CannotCheckpoint", message, key="training.checkpoints", path=str(self._folder)) from error
        for temporary in (path for pattern in _TEMPORARY_FILES for path in self._folder.glob(pattern)):
            with suppress(OSError):
                if time.time() - temporary.stat().st_mtime > _ABANDONED_S:
                    temporary.unlink()
        for version in self.versions:
            path = self._path(version)
            try:
                self._read_metadata(path)
            except ForeignCheckpoint:
                if path.exists():  # otherwise the worker that trains has just deleted it
                    raise

    def save(self, checkpoint: Checkpoint) -> None:
        """Write `checkpoint`, and delete all but the newest two.

        Raises `SparseError` with the code "CannotCheckpoint" (a full disk, for example) or "StaleWriter" (a later term
        has written here); the folder then stays as it was.
        """
        path = self._path(checkpoint.version)
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        metadata = {
            "fingerprint": self._fingerprint,
            "version": str(checkpoint.version),
            "term": str(checkpoint.term),
            "progress": json.dumps({name: item.model_dump() for name, item in checkpoint.progress.items()}),
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path, durable=True, before_rename=lambda: self._check_term(checkpoint.term)) as temporary:
                save_file(tensors, temporary, metadata)
        except (OSError, SafetensorError) as error:
            message = f"cannot write checkpoint {path}: {error}; the earlier checkpoints are intact"
            raise SparseError("CannotCheckpoint", message, path=str(path)) from error
        with suppress(OSError):  # an old checkpoint that stays does no harm
            for version in self.versions[:-CHECKPOINTS_TO_KEEP]:
                self._path(version).unlink(missing_ok=True)

    def load(self, version: int) -> Checkpoint:
        """Read one checkpoint. Raises `ForeignCheckpoint`."""
        path = self._path(version)
        metadata = self._read_metadata(path)
        try:
            progress = _PROGRESS.validate_json(metadata.get("progress", "{}"))
            with safe_open(path, framework="pt") as file:
                # Cloned: a view of the file may start at an odd address, where kernels add up in another order.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
        except ValidationError as error:
            raise ForeignCheckpoint(path, "its progress is malformed") from error
        except (SafetensorError, OSError) as error:
            raise ForeignCheckpoint(path, f"it cannot be read ({error})") from error
        return Checkpoint(version, tensors, progress)

    def delete_after(self, version: int, term: int) -> None:
        """Delete all newer versions: they were rolled back in `term`, and their numbers will be used again.

        Raises `SparseError` with the code "StaleWriter".
        """
        for newer in self.versions:
            if newer > version:
                self._check_term(term)
                self._path(newer).unlink(missing_ok=True)

    def _check_term(self, term: int) -> None:
        if (latest := self.term) > term:
            message = f"another worker has written to {self._folder} in term {latest}, this worker is in term {term}"
            raise SparseError("StaleWriter", message, path=str(self._folder), expected_term=latest, actual_term=term)

    def _read_term(self, version: int) -> int:
        """The term in which a version was written; 0 if it is unknown."""
        try:
            return int(self._read_metadata(self._path(version)).get("term", "0"))
        except (ForeignCheckpoint, ValueError):
            return 0

    def _path(self, version: int) -> Path:
        return self._folder / f"version-{version:012d}.safetensors"

    def _read_metadata(self, path: Path) -> dict[str, str]:
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ForeignCheckpoint(path, f"it cannot be read ({error})") from error
        if (actual := metadata.get("fingerprint")) != self._fingerprint:
            problem = f"expected part {self._fingerprint!r}, found {actual!r}: another model, cut or training recipe"
            raise ForeignCheckpoint(path, problem)
        return metadata
