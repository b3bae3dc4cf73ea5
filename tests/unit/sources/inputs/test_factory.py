"""From settings to a source: each kind, a class of one's own, and what is said of a wrong setting."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from brokers.config.schema import SourceTable
from brokers.errors import UsageError
from sources.errors import BadSetting, BadSourceClass, UnknownSource
from sources.inputs import demo_videos as assets
from sources.inputs.camera import Camera
from sources.inputs.demo_videos import DemoVideo, find_video
from sources.inputs.factory import make_source
from sources.inputs.images import ImageFolder
from sources.inputs.sample import Sample
from sources.inputs.source import Source
from sources.inputs.video import VideoFile
from tests.support.environment.clips import image_bytes, write_video

HERE = "tests.unit.sources.inputs.test_factory"


class Countdown(Source):
    """What a user writes."""

    def __init__(self, name: str, start: int = 3) -> None:
        self.name = name
        self.start = start

    def samples(self) -> Iterator[Sample]:
        for index in range(self.start):
            yield Sample(self.name, index, {"left": numpy.array([self.start - index])}, "application/x-safetensors")

    def close(self) -> None:
        self.start = 0


class Broken:
    def __init__(self, name: str) -> None:
        raise ZeroDivisionError(name)


class NotASource:
    def __init__(self, name: str) -> None:
        self.name = name


def made(settings: dict[str, Any], base: Path) -> Source:
    return make_source(SourceTable.model_validate({"name": "x", **settings}), base)


def test_each_kind_makes_its_source_below_the_folder_of_the_pipeline_file(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 3)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(image_bytes())
    assert isinstance(made({"kind": "video", "path": "a.mp4"}, tmp_path), VideoFile)
    assert isinstance(made({"kind": "images", "path": "pictures"}, tmp_path), ImageFolder)
    assert isinstance(made({"kind": "camera", "device": "0"}, tmp_path), Camera)


def test_a_class_of_ones_own_gets_its_name_and_its_options_and_inherits_the_rest() -> None:
    source = made({"kind": f"{HERE}:Countdown", "name": "rocket", "settings": {"start": 5}}, Path())
    assert [sample.index for sample in source.samples()] == [0, 1, 2, 3, 4]
    assert (source.name, source.live, source.dropped, source.unreadable) == ("rocket", False, 0, 0)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"kind": "videos"}, UnknownSource, "'videos': expected one of video, images, camera"),
        ({"kind": "video"}, BadSetting, "'path' is None, expected the file to read for kind 'video'"),
        ({"kind": "no_such_module:Door"}, BadSourceClass, "No module named 'no_such_module'"),
        ({"kind": ".relative:Door"}, BadSourceClass, "expected package.module:name"),
        ({"kind": f"{HERE}:Door"}, BadSourceClass, "has no Door"),
        ({"kind": f"{HERE}:Broken"}, BadSourceClass, "ZeroDivisionError: x (test_factory.py, line "),
        ({"kind": f"{HERE}:NotASource"}, BadSourceClass, "has no 'samples'"),
        ({"kind": f"{HERE}:Countdown", "settings": {"stop": 1}}, BadSourceClass, "unexpected keyword argument 'stop'"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(settings: dict[str, Any], error: type[UsageError], text: str) -> None:
    with pytest.raises(error) as caught:
        made(settings, Path())
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_street_is_found_by_name_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = write_video(tmp_path / "street.mp4", 3)
    sha256 = hashlib.sha256(video.read_bytes()).hexdigest()
    monkeypatch.setattr(assets, "VIDEOS", {"street": DemoVideo("street.mp4", sha256, ())})
    assert find_video("street", Path("elsewhere"), cache=tmp_path) == video
    assert find_video("a.mp4", tmp_path) == tmp_path / "a.mp4"
