"""Video files: every frame in order, at the rate that is asked for."""

import hashlib
import time
from pathlib import Path
from typing import Any

import pytest

from brokers.config.schema import SourceTable
from brokers.errors import UsageError
from brokers.process.image_decode import decode_picture
from sources.inputs import video as video_module
from sources.inputs.video import VideoFile, find_video
from tests.support.environment.clips import frame_number, video_bytes, wav_bytes, write_video
from tests.support.errors import raises_error


def video(path: Path, **settings: Any) -> VideoFile:
    return VideoFile(SourceTable(kind="video", **settings), path)


def test_every_frame_comes_once_and_in_order(tmp_path: Path) -> None:
    source = video(write_video(tmp_path / "a.mp4", 30), name="door")
    samples = list(source.samples())
    assert [sample.index for sample in samples] == list(range(30))
    assert [frame_number(sample.load_image()) for sample in samples if sample.load_image] == list(range(30))
    assert {sample.source for sample in samples} == {"door"}
    assert (source.live, source.frames_per_s) == (False, 25.0)


def test_jpeg_payload_is_the_picture_of_the_gallery(tmp_path: Path) -> None:
    sample = next(iter(video(write_video(tmp_path / "a.mp4", 3), quality=95).samples()))
    assert sample.content_type == "image/jpeg"
    assert isinstance(sample.payload, bytes)
    assert sample.load_image is not None
    assert abs(decode_picture(sample.payload).astype(int) - sample.load_image()).max() <= 3


def test_raw_encoding_sends_pixels(tmp_path: Path) -> None:
    sample = next(iter(video(write_video(tmp_path / "a.mp4", 3), encoding="raw").samples()))
    assert not isinstance(sample.payload, bytes)
    assert sample.content_type == "application/x-safetensors"
    assert sample.payload["picture"].shape == (48, 64, 3)
    assert sample.payload["picture"].dtype.name == "uint8"


def test_loop_continues_indices_until_closed(tmp_path: Path) -> None:
    source = video(write_video(tmp_path / "a.mp4", 4), loop=True)
    numbers = []
    for sample in source.samples():
        assert sample.load_image is not None
        numbers.append((sample.index, frame_number(sample.load_image())))
        if sample.index == 9:
            source.close()
    assert numbers == [(index, index % 4) for index in range(10)]


def test_native_pace_is_the_frame_rate(tmp_path: Path) -> None:
    source = video(write_video(tmp_path / "a.mp4", 4), pace="native")
    begin_s = time.monotonic()
    assert len(list(source.samples())) == 4
    assert time.monotonic() - begin_s >= 3 / 25


def test_damaged_video_yields_the_frames_around_the_damage(tmp_path: Path) -> None:
    data = video_bytes(30, container="mpegts", codec="mpeg2video")
    middle = len(data) // 2
    (tmp_path / "a.ts").write_bytes(data[:middle] + bytes(188 * 5) + data[middle + 188 * 5 :])
    assert 10 <= len(list(video(tmp_path / "a.ts").samples())) <= 31


def test_missing_file_raises_before_anything_starts(tmp_path: Path) -> None:
    with raises_error(UsageError, "NoSuchFile", match=r"none\.mp4: no such file"):
        video(tmp_path / "none.mp4")


@pytest.mark.parametrize("content", [b"", b"\x00" * 4096, video_bytes(5)[:400]], ids=["empty", "zeros", "truncated"])
def test_file_that_is_not_a_video_raises_usage_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        list(video(tmp_path / "a.mp4").samples())
    assert caught.value.code == "NotAVideo"
    assert caught.value.key == "source.path"
    assert "a.mp4" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_audio_file_raises_usage_error_with_its_streams(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav_bytes())
    with raises_error(UsageError, "NotAVideo", match="no video stream, only: audio"):
        video(tmp_path / "a.wav")


def test_video_street_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "street.mp4", 3)
    monkeypatch.setattr(video_module, "STREET_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert find_video("street", Path("elsewhere"), cache=tmp_path) == path
    assert find_video("a.mp4", tmp_path) == tmp_path / "a.mp4"
