"""Video files: complete, in order, as fast as asked, and told of in one line when they are none."""

import time
from pathlib import Path

import pytest

from sources.errors import NoSuchFile, NotAVideo, NoVideoStream
from sources.inputs.sample import decode_image
from sources.inputs.video import VideoFile
from tests.support.environment.clips import frame_number, video_bytes, wav_bytes, write_video


def test_every_frame_comes_once_and_in_order(tmp_path: Path) -> None:
    source = VideoFile(write_video(tmp_path / "a.mp4", 30), name="door")
    samples = list(source.samples())
    assert [sample.index for sample in samples] == list(range(30))
    assert [frame_number(sample.load_image()) for sample in samples if sample.load_image] == list(range(30))
    assert {sample.source for sample in samples} == {"door"}
    assert not source.live
    assert source.count == 30


def test_the_jpeg_payload_is_the_picture_that_the_album_gets(tmp_path: Path) -> None:
    sample = next(iter(VideoFile(write_video(tmp_path / "a.mp4", 3), quality=95).samples()))
    assert sample.content_type == "image/jpeg"
    assert isinstance(sample.payload, bytes)
    assert sample.load_image is not None
    assert abs(decode_image(sample.payload).astype(int) - sample.load_image()).max() <= 3


def test_raw_encoding_sends_the_pixels_themselves(tmp_path: Path) -> None:
    sample = next(iter(VideoFile(write_video(tmp_path / "a.mp4", 3), encoding="raw").samples()))
    assert not isinstance(sample.payload, bytes)
    assert sample.content_type == "application/x-safetensors"
    assert sample.payload["picture"].shape == (48, 64, 3)
    assert sample.payload["picture"].dtype.name == "uint8"


def test_a_looping_video_goes_on_to_its_limit_with_rising_indices(tmp_path: Path) -> None:
    source = VideoFile(write_video(tmp_path / "a.mp4", 4), loop=True, limit=10)
    samples = list(source.samples())
    assert [sample.index for sample in samples] == list(range(10))
    assert [frame_number(sample.load_image()) for sample in samples if sample.load_image] == [
        0,
        1,
        2,
        3,
        0,
        1,
        2,
        3,
        0,
        1,
    ]
    assert source.count == 10


def test_native_pace_takes_as_long_as_the_film(tmp_path: Path) -> None:
    source = VideoFile(write_video(tmp_path / "a.mp4", 10), pace="native")
    started_s = time.monotonic()
    assert len(list(source.samples())) == 10
    assert time.monotonic() - started_s >= 9 / 25


def test_a_closed_video_ends_even_while_it_waits_for_its_time(tmp_path: Path) -> None:
    source = VideoFile(write_video(tmp_path / "a.mp4", 30), loop=True, pace="native")
    taken = 0
    for _ in source.samples():
        taken += 1
        if taken == 3:
            source.close()
    assert taken == 3


def test_a_video_damaged_in_the_middle_gives_the_frames_around_the_damage(tmp_path: Path) -> None:
    whole = video_bytes(30, container="mpegts", codec="mpeg2video")
    middle = len(whole) // 2
    (tmp_path / "a.ts").write_bytes(whole[:middle] + bytes(188 * 5) + whole[middle + 188 * 5 :])
    assert 10 <= len(list(VideoFile(tmp_path / "a.ts").samples())) <= 31


def test_a_missing_file_is_named_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(NoSuchFile, match=r"none\.mp4: no such file"):
        VideoFile(tmp_path / "none.mp4")


@pytest.mark.parametrize("content", [b"", b"\x00" * 4096, video_bytes(5)[:400]], ids=["empty", "zeros", "truncated"])
def test_a_file_that_is_no_video_is_named_with_the_reason(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises((NotAVideo, NoVideoStream)) as caught:
        list(VideoFile(tmp_path / "a.mp4").samples())
    assert "a.mp4" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_with_sound_only_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav_bytes())
    with pytest.raises(NoVideoStream, match="only: audio"):
        VideoFile(tmp_path / "a.wav")
