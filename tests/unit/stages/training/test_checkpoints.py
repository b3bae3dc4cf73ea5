"""Versions on disk: whole or not there, the last two of them, and of this part alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from brokers.errors import UsageError
from brokers.protocol.training import SourceProgress
from stages.training.checkpoints import CHECKPOINTS_TO_KEEP, Checkpoint, CheckpointStore
from stages.training.errors import CannotCheckpoint, ForeignCheckpoint, StaleWriter
from tests.support.environment.checkout import ROOT
from tests.support.environment.full_disk import full_disk

PROGRESS = {"digits": SourceProgress(steps=7, settings={"lr": 0.05, "limit": None, "shuffle": True, "kind": "digits"})}


def version(number: int, size: int = 1000, term: int = 0) -> Checkpoint:
    tensors = {
        "model/weight": torch.arange(size, dtype=torch.float32) + number,
        "optimizer/weight/step": torch.tensor(float(number)),
        "model/count": torch.tensor(number),
    }
    return Checkpoint(number, tensors, PROGRESS, term)


def checkpoints(folder: Path, fingerprint: str = "vgg11/0") -> CheckpointStore:
    return CheckpointStore(folder, fingerprint)


def named(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def name_of(number: int) -> str:
    return f"version-{number:012d}.safetensors"


def assert_is(found: Checkpoint, number: int) -> None:
    wanted = version(number)
    assert found.version == number
    assert found.progress == PROGRESS
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in wanted.tensors.items())
    assert all(found.tensors[name].dtype == tensor.dtype for name, tensor in wanted.tensors.items())


def test_what_is_written_is_read_again_with_its_progress(tmp_path: Path) -> None:
    checkpoints(tmp_path / "a" / "b").save(version(50))
    assert_is(checkpoints(tmp_path / "a" / "b").load(50), 50)


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    made = checkpoints(tmp_path)
    assert not made.versions
    for number in (50, 100, 150, 1_000_000):
        made.save(version(number))
    assert CHECKPOINTS_TO_KEEP == 2
    assert made.versions == (150, 1_000_000)
    assert named(tmp_path) == [name_of(150), name_of(1_000_000)]


def test_what_was_given_up_is_let_go_of(tmp_path: Path) -> None:
    made = checkpoints(tmp_path)
    made.save(version(50))
    made.save(version(100))
    made.delete_after(50, 0)
    assert made.versions == (50,)
    made.delete_after(0, 0)
    assert not made.versions


def test_who_wakes_when_another_has_written_in_a_later_term_neither_writes_nor_removes_anything(tmp_path: Path) -> None:
    frozen, its_heir = checkpoints(tmp_path), checkpoints(tmp_path)
    frozen.save(version(50, term=7))
    its_heir.delete_after(50, 9)
    its_heir.save(version(100, term=9))
    assert frozen.term == 9
    for number in (100, 150):
        with pytest.raises(StaleWriter, match="in term 9, this one is of term 7"):
            frozen.save(version(number, size=5, term=7))
    with pytest.raises(StaleWriter):
        frozen.delete_after(50, 7)
    assert named(tmp_path) == [name_of(50), name_of(100)]
    assert_is(its_heir.load(100), 100)
    its_heir.delete_after(50, 9)
    assert its_heir.versions == (50,)


def test_a_version_of_which_no_term_is_known_is_older_than_all(tmp_path: Path) -> None:
    metadata = {"fingerprint": "vgg11/0", "version": "50"}  # as files were before terms were written
    save_file({"w": torch.zeros(3)}, tmp_path / name_of(50), metadata)
    made = checkpoints(tmp_path)
    assert made.term == 0
    made.save(version(100, term=1))
    made.delete_after(0, 1)
    assert not made.versions


def test_a_version_that_goes_while_a_worker_starts_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoints(tmp_path)
    made.save(version(50))
    made.save(version(100))
    monkeypatch.setattr(CheckpointStore, "versions", (1, 50, 100))  # as it was an instant ago
    made.check()
    assert made.term == 0


def test_a_version_that_is_written_again_replaces_the_former_one(tmp_path: Path) -> None:
    made = checkpoints(tmp_path)
    made.save(Checkpoint(50, {"model/weight": torch.zeros(3)}, {}))
    made.save(version(50))
    assert_is(made.load(50), 50)


def test_other_files_in_the_folder_are_not_ours(tmp_path: Path) -> None:
    for name in ("version-1.safetensors", f"{name_of(1)}.bak", "notes.txt", "version-000000000002.part"):
        (tmp_path / name).write_text("x")
    made = checkpoints(tmp_path)
    made.check()
    assert not made.versions
    made.save(version(50))
    assert len(named(tmp_path)) == 5


def test_what_is_read_has_memory_of_its_own(tmp_path: Path) -> None:
    made = checkpoints(tmp_path)
    made.save(version(50))
    found = made.load(50)
    (tmp_path / name_of(50)).unlink()
    assert_is(found, 50)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in found.tensors.values())


# Foreign --------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_part_is_told_from_ours_in_one_line(tmp_path: Path) -> None:
    checkpoints(tmp_path, "vgg11/0 cut 6").save(version(50))
    ours = checkpoints(tmp_path, "vgg11/0 cut 9")
    for ask in (ours.check, lambda: ours.load(50)):
        with pytest.raises(ForeignCheckpoint) as caught:
            ask()
        assert isinstance(caught.value, UsageError)
        text = str(caught.value)
        assert "expected the part 'vgg11/0 cut 9', it is of 'vgg11/0 cut 6': another model, cut or recipe" in text
        assert text.startswith(str(tmp_path))
        assert "\n" not in text


def test_weights_of_somebody_else_under_that_name_are_foreign(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3)}, tmp_path / name_of(50))
    with pytest.raises(ForeignCheckpoint, match="it is of None"):
        checkpoints(tmp_path).check()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
def test_a_file_that_was_cut_off_is_told_in_one_line(tmp_path: Path, share: float) -> None:
    made = checkpoints(tmp_path)
    made.save(version(50))
    path = tmp_path / name_of(50)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ForeignCheckpoint, match="it cannot be read") as caught:
        made.check()
    assert "\n" not in str(caught.value)
    assert "name another folder, or move it away" in str(caught.value)
    with pytest.raises(ForeignCheckpoint):
        made.load(50)


@pytest.mark.parametrize("progress", ["{", "[]", '{"digits": 7}', '{"digits": {"steps": -1}}', '{"digits": {}}'])
def test_progress_that_cannot_be_read_is_foreign(tmp_path: Path, progress: str) -> None:
    metadata = {"fingerprint": "vgg11/0", "progress": progress}
    save_file({"w": torch.zeros(3)}, tmp_path / name_of(50), metadata)
    with pytest.raises(ForeignCheckpoint) as caught:
        checkpoints(tmp_path).load(50)
    assert "\n" not in str(caught.value)


def test_a_version_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ForeignCheckpoint, match="cannot be read"):
        checkpoints(tmp_path).load(50)


# Crashes and full disks -----------------------------------------------------------------------------------------------

DIES = """\
import os, pathlib, sys
import torch
from stages.training.checkpoints import CheckpointStore, Checkpoint
made = Checkpoints(pathlib.Path(sys.argv[1]), "vgg11/0")
die = lambda *_: os.kill(os.getpid(), 9)
if sys.argv[2] == "rename":
    pathlib.Path.replace = die
else:
    import stages.training.checkpoints as module
    module.save_file = lambda tensors, path, metadata: (pathlib.Path(path).write_bytes(b"half"), die())
made.save(Version(150, {"model/weight": torch.zeros(1000)}))
"""


@pytest.mark.parametrize("where", ["write", "rename"])
def test_a_crash_before_the_file_has_its_name_leaves_the_old_ones(tmp_path: Path, where: str) -> None:
    made = checkpoints(tmp_path)
    made.save(version(50))
    made.save(version(100))
    ended = subprocess.run([sys.executable, "-c", DIES, tmp_path, where], cwd=ROOT, timeout=90, check=False)
    assert ended.returncode == -signal.SIGKILL
    made.check()
    assert made.versions == (50, 100)
    assert_is(made.load(100), 100)
    made.save(version(150))  # what the dead one left is no hindrance, and does not stay
    assert made.versions == (100, 150)
    assert named(tmp_path) == [name_of(100), name_of(150)]


def test_what_was_left_half_written_long_ago_is_taken_away_at_the_start(tmp_path: Path) -> None:
    made = checkpoints(tmp_path)
    made.save(version(50))
    long_ago, lately = ("version-000000000007.part", ".tmpAbCdEf"), ("version-000000000008.part", ".tmpGhIjKl")
    for name in (*long_ago, *lately, "notes.txt"):
        (tmp_path / name).write_text("half")
    for name in (*long_ago, "notes.txt", name_of(50)):
        os.utime(tmp_path / name, (0, 0))
    made.check()
    assert named(tmp_path) == sorted((*lately, "notes.txt", name_of(50)))


def test_on_a_full_disk_the_old_ones_stay_and_nothing_half_written_is_left(tmp_path: Path) -> None:
    made = checkpoints(tmp_path)
    made.save(version(50))
    made.save(version(100))
    with full_disk(20_000), pytest.raises(CannotCheckpoint) as caught:
        made.save(version(150, size=10_000))
    assert named(tmp_path) == [name_of(50), name_of(100)]
    for number in (50, 100):
        assert_is(made.load(number), number)
    text = str(caught.value)
    assert text.startswith(f"no checkpoint at {tmp_path / name_of(150)}: ")
    assert "File too large" in text
    assert "those before it are whole" in text
    assert "\n" not in text
    made.save(version(150))
    assert made.versions == (100, 150)


def test_a_file_that_cannot_have_its_name_is_told_and_does_not_stay(tmp_path: Path) -> None:
    (tmp_path / name_of(150)).mkdir()
    with pytest.raises(CannotCheckpoint, match="those before it are whole"):
        checkpoints(tmp_path).save(version(150))
    assert named(tmp_path) == [name_of(150)]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CannotCheckpoint, match=r"no checkpoint at .*file"):
        checkpoints(tmp_path / "file").save(version(50))
    with pytest.raises(CannotCheckpoint):
        checkpoints(tmp_path / "file" / "below").save(version(50))


def test_a_file_holds_what_any_reader_of_safetensors_finds(tmp_path: Path) -> None:
    checkpoints(tmp_path).save(version(50))
    found = load_file(tmp_path / name_of(50))
    assert set(found) == {"model/weight", "model/count", "optimizer/weight/step"}


def test_a_folder_that_cannot_be_read_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    checkpoints(tmp_path).save(version(50))
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ForeignCheckpoint, match=r"it cannot be read .*Permission denied") as caught:
        checkpoints(tmp_path).check()
    assert "\n" not in str(caught.value)


def test_who_wakes_does_not_take_what_its_successor_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    successor, sleeper = checkpoints(tmp_path), checkpoints(tmp_path)
    successor.save(version(40, term=2))

    def flush(_: Path) -> None:
        monkeypatch.undo()
        with pytest.raises(StaleWriter):
            sleeper.save(version(50, size=9, term=1))

    monkeypatch.setattr("stages.training.checkpoints._fsync", flush)
    successor.save(version(50, term=2))
    assert_is(checkpoints(tmp_path).load(50), 50)
    assert named(tmp_path) == [name_of(40), name_of(50)]
