"""Folders of pictures: files are sent unchanged, in natural order."""

import logging
from pathlib import Path
from typing import Any

import pytest

from brokers.config.schema import SourceTable
from brokers.errors import UsageError
from sources.inputs.images import ImageFolder
from tests.support.environment.clips import frame_number, image_bytes
from tests.support.errors import raises_error


def image_folder(path: Path, **settings: Any) -> ImageFolder:
    return ImageFolder(SourceTable(kind="images", **settings), path)


def test_files_are_sent_unchanged_in_natural_order(tmp_path: Path) -> None:
    for index in (10, 2, 1):
        (tmp_path / f"{index}.jpg").write_bytes(image_bytes("JPEG", index))
    (tmp_path / "3.PNG").write_bytes(image_bytes("PNG", 3))
    samples = list(image_folder(tmp_path).samples())
    names = ["1.jpg", "2.jpg", "3.PNG", "10.jpg"]
    assert [sample.index for sample in samples] == [0, 1, 2, 3]
    assert [sample.payload for sample in samples] == [(tmp_path / name).read_bytes() for name in names]
    assert [sample.content_type for sample in samples] == ["image/jpeg", "image/jpeg", "image/png", "image/jpeg"]
    assert [frame_number(sample.load_image()) for sample in samples if sample.load_image] == [1, 2, 3, 10]


def test_content_type_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes("PNG"))
    assert [sample.content_type for sample in image_folder(tmp_path).samples()] == ["image/png"]


def test_path_may_be_one_file(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes())
    assert len(list(image_folder(tmp_path / "a.jpg").samples())) == 1


def test_pattern_selects_files_in_subfolders(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(image_bytes())
    assert len(list(image_folder(tmp_path, pattern="**/*.jpg").samples())) == 1


def test_unreadable_files_are_skipped_counted_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jpg").write_bytes(b"not a picture")
    (tmp_path / "b.jpg").write_bytes(image_bytes())
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "d.jpg").write_bytes(image_bytes("GIF"))
    source = image_folder(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert [sample.index for sample in source.samples()] == [0]
    assert source.unreadable == 3
    assert all(name in caplog.text for name in ("a.jpg", "c.png", "d.jpg"))


def test_loop_counts_unreadable_file_once_and_ends_when_closed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes())
    (tmp_path / "b.jpg").write_bytes(b"no")
    source = image_folder(tmp_path, loop=True)
    indices = []
    for sample in source.samples():
        indices.append(sample.index)
        if sample.index == 4:
            source.close()
    assert indices == [0, 1, 2, 3, 4]
    assert source.unreadable == 1


def test_folder_without_pictures_raises_usage_error(tmp_path: Path) -> None:
    with raises_error(UsageError, "NoPictures", match="no file matches"):
        image_folder(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"no")
    with raises_error(UsageError, "NoPictures", match=r"none of its 1 files is a JPEG or PNG picture: a\.jpg"):
        list(image_folder(tmp_path, loop=True).samples())
    with raises_error(UsageError, "NoSuchFile"):
        image_folder(tmp_path / "none")
