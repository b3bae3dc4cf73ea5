"""Folders of pictures: the bytes as they are, in an order that never changes."""

import io
import logging
from pathlib import Path

import numpy
import pytest
from PIL import Image

from sources.errors import NoPictures, NoSuchFile
from sources.inputs.images import ImageFolder
from sources.inputs.sample import decode_image
from tests.support.environment.clips import frame_number, image_bytes


def test_files_are_sent_as_they_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for index in (10, 2, 1):
        (tmp_path / f"{index}.jpg").write_bytes(image_bytes("JPEG", index))
    (tmp_path / "3.PNG").write_bytes(image_bytes("PNG", 3))
    samples = list(ImageFolder(tmp_path).samples())
    names = ["1.jpg", "2.jpg", "3.PNG", "10.jpg"]
    assert [sample.payload for sample in samples] == [(tmp_path / name).read_bytes() for name in names]
    assert [sample.content_type for sample in samples] == ["image/jpeg", "image/jpeg", "image/png", "image/jpeg"]
    assert [frame_number(sample.load_image()) for sample in samples if sample.load_image] == [1, 2, 3, 10]


def test_the_content_type_follows_the_content_not_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes("PNG"))
    assert [sample.content_type for sample in ImageFolder(tmp_path).samples()] == ["image/png"]


def test_a_picture_of_a_telephone_held_upright_is_seen_upright() -> None:
    body = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF orientation: to be turned right by a quarter
    stored = numpy.zeros((40, 80, 3), numpy.uint8)
    stored[:, :40] = 255  # the left half becomes the upper half
    Image.fromarray(stored).save(body, "JPEG", quality=95, exif=exif)
    picture = decode_image(body.getvalue())
    assert picture.shape == (80, 40, 3)
    assert picture[:30].min() > 240
    assert picture[50:].max() < 15


def test_sixteen_bit_grey_keeps_its_upper_eight_bits() -> None:
    body = io.BytesIO()
    Image.fromarray(numpy.full((4, 4), 0x4321, numpy.uint16)).save(body, "PNG")
    assert (decode_image(body.getvalue()) == 0x43).all()


def test_one_file_is_a_source_too(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes())
    assert len(list(ImageFolder(tmp_path / "a.jpg").samples())) == 1


def test_a_pattern_reaches_into_folders(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(image_bytes())
    assert len(list(ImageFolder(tmp_path, "**/*.jpg").samples())) == 1


def test_unreadable_files_are_left_out_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jpg").write_bytes(b"not a picture")
    (tmp_path / "b.jpg").write_bytes(image_bytes())
    (tmp_path / "c.png").write_bytes(b"")
    (tmp_path / "d.jpg").write_bytes(image_bytes("GIF"))
    source = ImageFolder(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert [sample.index for sample in source.samples()] == [0]
    assert source.unreadable == 3
    assert all(name in caplog.text for name in ("a.jpg", "c.png", "d.jpg"))


def test_a_loop_ends_at_its_limit_and_counts_a_bad_file_once(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(image_bytes())
    (tmp_path / "b.jpg").write_bytes(b"no")
    source = ImageFolder(tmp_path, limit=5, loop=True)
    assert [sample.index for sample in source.samples()] == [0, 1, 2, 3, 4]
    assert source.unreadable == 1


def test_a_folder_without_a_picture_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoPictures, match="no file matches"):
        ImageFolder(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"no")
    with pytest.raises(NoPictures, match=r"none of its 1 files is a JPEG or PNG picture: a\.jpg"):
        list(ImageFolder(tmp_path, loop=True).samples())
    with pytest.raises(NoSuchFile):
        ImageFolder(tmp_path / "none")
