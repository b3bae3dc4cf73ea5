"""`CheckpointStore`: atomic files, the newest two, of one part only."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from brokers.errors import SparseError, UsageError
from brokers.protocol.training import SourceProgress
from stages.training import checkpoints
from stages.training.checkpoints import CHECKPOINTS_TO_KEEP, Checkpoint, CheckpointStore, ForeignCheckpoint
from tests.support.environment.full_disk import full_disk
from tests.support.errors import raises_error

PROGRESS = {"digits": SourceProgress(steps=7, settings={"lr": 0.05, "limit": None, "shuffle": True, "kind": "digits"})}


def checkpoint(version: int, size: int = 1000, term: int = 0) -> Checkpoint:
    tensors = {
        "model/weight": torch.arange(size, dtype=torch.float32) + version,
        "optimizer/weight/step": torch.tensor(float(version)),
        "model/count": torch.tensor(version),
    }
    return Checkpoint(version, tensors, PROGRESS, term)


def open_store(folder: Path, fingerprint: str = "vgg11/0") -> CheckpointStore:
    return CheckpointStore(folder, fingerprint)


def file_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def file_name(version: int) -> str:
    return f"version-{version:012d}.safetensors"


def assert_equals(actual: Checkpoint, version: int) -> None:
    expected = checkpoint(version)
    assert actual.version == version
    assert actual.progress == PROGRESS
    assert actual.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(actual.tensors[name], tensor)
        assert actual.tensors[name].dtype == tensor.dtype


def test_saved_checkpoint_is_loaded_with_its_progress(tmp_path: Path) -> None:
    open_store(tmp_path / "a" / "b").save(checkpoint(50))
    assert_equals(open_store(tmp_path / "a" / "b").load(50), 50)


def test_newest_two_are_kept(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert not store.versions
    for version in (50, 100, 150, 1_000_000):
        store.save(checkpoint(version))
    assert CHECKPOINTS_TO_KEEP == 2
    assert store.versions == (150, 1_000_000)
    assert file_names(tmp_path) == [file_name(150), file_name(1_000_000)]


def test_rolled_back_versions_are_deleted(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save(checkpoint(50))
    store.save(checkpoint(100))
    store.delete_after(50, 0)
    assert store.versions == (50,)
    store.delete_after(0, 0)
    assert not store.versions


def test_saving_a_version_again_replaces_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save(Checkpoint(50, {"model/weight": torch.zeros(3)}, {}))
    store.save(checkpoint(50))
    assert_equals(store.load(50), 50)


def test_other_files_are_ignored(tmp_path: Path) -> None:
    for name in ("version-1.safetensors", f"{file_name(1)}.bak", "notes.txt", f".{file_name(2)}.7-ab.part"):
        (tmp_path / name).write_text("x")
    store = open_store(tmp_path)
    store.check()
    assert not store.versions
    store.save(checkpoint(50))
    assert len(file_names(tmp_path)) == 5


def test_loaded_tensors_have_separate_aligned_memory(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save(checkpoint(50))
    loaded = store.load(50)
    (tmp_path / file_name(50)).unlink()
    assert_equals(loaded, 50)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in loaded.tensors.values())


def test_file_is_readable_by_the_safetensors_library(tmp_path: Path) -> None:
    open_store(tmp_path).save(checkpoint(50))
    assert set(load_file(tmp_path / file_name(50))) == {"model/weight", "model/count", "optimizer/weight/step"}


# Terms ----------------------------------------------------------------------------------------------------------------


def test_worker_of_an_earlier_term_writes_and_deletes_nothing(tmp_path: Path) -> None:
    frozen, successor = open_store(tmp_path), open_store(tmp_path)
    frozen.save(checkpoint(50, term=7))
    successor.save(checkpoint(100, term=9))
    assert frozen.term == 9
    for version in (100, 150):
        with raises_error(SparseError, "StaleWriter") as caught:
            frozen.save(checkpoint(version, size=5, term=7))
        assert (caught.value.fields["expected_term"], caught.value.fields["actual_term"]) == (9, 7)
    with raises_error(SparseError, "StaleWriter"):
        frozen.delete_after(50, 7)
    assert file_names(tmp_path) == [file_name(50), file_name(100)]
    assert_equals(successor.load(100), 100)
    successor.delete_after(50, 9)
    assert successor.versions == (50,)


def test_term_is_checked_after_the_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that is frozen while it flushes a large file finds out afterwards that it was replaced."""
    frozen, successor = open_store(tmp_path), open_store(tmp_path)
    fsync = os.fsync

    def freeze(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        successor.save(checkpoint(50, term=2))

    monkeypatch.setattr(os, "fsync", freeze)
    with raises_error(SparseError, "StaleWriter"):
        frozen.save(checkpoint(50, size=9, term=1))
    assert_equals(open_store(tmp_path).load(50), 50)
    assert file_names(tmp_path) == [file_name(50)]


def test_checkpoint_without_a_term_is_older_than_all(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / file_name(50), {"fingerprint": "vgg11/0", "version": "50"})
    store = open_store(tmp_path)
    assert store.term == 0
    store.save(checkpoint(100, term=1))
    store.delete_after(0, 1)
    assert not store.versions


def test_version_that_another_worker_deletes_during_the_check_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    store.save(checkpoint(50))
    monkeypatch.setattr(CheckpointStore, "versions", (1, 50))  # as they were an instant ago
    store.check()
    assert store.term == 0


# Foreign and damaged files --------------------------------------------------------------------------------------------


def test_checkpoint_of_another_part_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path, "vgg11/0 cut 6").save(checkpoint(50))
    store = open_store(tmp_path, "vgg11/0 cut 9")
    calls: list[Callable[[], object]] = [store.check, lambda: store.load(50)]
    for call in calls:
        with pytest.raises(ForeignCheckpoint) as caught:
            call()
        assert (caught.value.key, caught.value.fields["path"]) == (
            "training.checkpoints",
            str(tmp_path / file_name(50)),
        )
        text = str(caught.value)
        assert "expected part 'vgg11/0 cut 9', found 'vgg11/0 cut 6': another model, cut or training recipe" in text
        assert "name another folder, or move it away" in text
        assert "\n" not in text


def test_weights_file_under_the_name_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / file_name(50))
    with pytest.raises(ForeignCheckpoint):
        open_store(tmp_path).check()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    store = open_store(tmp_path)
    store.save(checkpoint(50))
    path = tmp_path / file_name(50)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ForeignCheckpoint) as caught:
        store.check()
    assert "\n" not in str(caught.value)
    with pytest.raises(ForeignCheckpoint):
        store.load(50)


@pytest.mark.parametrize("progress", ["{", "[]", '{"digits": 7}', '{"digits": {"steps": -1}}', '{"digits": {}}'])
def test_malformed_progress_is_refused(tmp_path: Path, progress: str) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / file_name(50), {"fingerprint": "vgg11/0", "progress": progress})
    with pytest.raises(ForeignCheckpoint) as caught:
        open_store(tmp_path).load(50)
    assert "\n" not in str(caught.value)


def test_missing_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ForeignCheckpoint):
        open_store(tmp_path).load(50)


def test_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    open_store(tmp_path).save(checkpoint(50))
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ForeignCheckpoint, match=r"Permission denied") as caught:
        open_store(tmp_path).check()
    assert "\n" not in str(caught.value)


# Crashes and full disks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["write", "rename"])
def test_earlier_checkpoints_are_intact_at_every_moment_of_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A process that is killed at this moment leaves exactly these files."""
    store = open_store(tmp_path)
    store.save(checkpoint(50))
    store.save(checkpoint(100))
    seen = []

    def look() -> None:
        other = open_store(tmp_path)
        other.check()
        assert_equals(other.load(100), 100)
        seen.append(other.versions)

    def write_half(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        look()
        save_file(tensors, path, metadata)

    if moment == "write":
        monkeypatch.setattr(checkpoints, "save_file", write_half)
    else:
        replace = Path.replace

        def look_and_replace(path: Path, target: Path) -> None:
            look()
            replace(path, target)

        monkeypatch.setattr(Path, "replace", look_and_replace)
    store.save(checkpoint(150))
    assert seen == [(50, 100)]
    assert file_names(tmp_path) == [file_name(100), file_name(150)]


def test_abandoned_temporary_files_are_removed_at_the_start(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save(checkpoint(50))
    abandoned = (f".{file_name(7)}.1-ab.part", ".tmpAbCdEf")
    recent = (f".{file_name(8)}.1-ab.part", ".tmpGhIjKl")
    for name in (*abandoned, *recent, "notes.txt"):
        (tmp_path / name).write_text("half")
    for name in (*abandoned, "notes.txt", file_name(50)):
        os.utime(tmp_path / name, (0, 0))
    store.check()
    assert file_names(tmp_path) == sorted((*recent, "notes.txt", file_name(50)))


def test_full_disk_leaves_the_earlier_checkpoints_and_no_temporary_file(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.save(checkpoint(50))
    store.save(checkpoint(100))
    with full_disk(20_000), raises_error(SparseError, "CannotCheckpoint") as caught:
        store.save(checkpoint(150, size=10_000))
    assert file_names(tmp_path) == [file_name(50), file_name(100)]
    for version in (50, 100):
        assert_equals(store.load(version), version)
    text = str(caught.value)
    assert text.startswith(f"cannot write checkpoint {tmp_path / file_name(150)}: ")
    assert "File too large" in text
    assert text.endswith("; the earlier checkpoints are intact")
    assert "\n" not in text
    store.save(checkpoint(150))
    assert store.versions == (100, 150)


def test_file_that_cannot_be_renamed_is_removed(tmp_path: Path) -> None:
    (tmp_path / file_name(150)).mkdir()
    with raises_error(SparseError, "CannotCheckpoint"):
        open_store(tmp_path).save(checkpoint(150))
    assert file_names(tmp_path) == [file_name(150)]


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_folder_that_cannot_be_created_is_an_error(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("x")
    with raises_error(SparseError, "CannotCheckpoint"):
        open_store(tmp_path / folder).save(checkpoint(50))


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_check_finds_a_folder_that_cannot_be_written(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("x")
    with raises_error(UsageError, "CannotCheckpoint", match=f"cannot be written to {tmp_path / folder}: ") as caught:
        open_store(tmp_path / folder).check()
    assert caught.value.key == "training.checkpoints"
    assert "\n" not in str(caught.value)


def test_check_finds_a_full_disk_and_leaves_nothing(tmp_path: Path) -> None:
    with full_disk(0), raises_error(UsageError, "CannotCheckpoint", match="File too large: name another folder"):
        open_store(tmp_path / "new").check()
    open_store(tmp_path / "new").check()
    assert file_names(tmp_path / "new") == []
