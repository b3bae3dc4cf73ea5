"""Sources and data sets from the settings of a pipeline file."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

from brokers.config.schema import SourceTable
from brokers.errors import UsageError
from sources.inputs.factory import make_source
from sources.inputs.images import ImageFolder
from sources.inputs.source import Sample, Source
from sources.inputs.video import Camera, VideoFile
from tests.support.environment.clips import image_bytes, write_video
from tests.support.errors import raises_error

MODULE = "tests.unit.sources.inputs.test_factory"


class Countdown(Source):
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


def make(settings: dict[str, Any], folder: Path) -> Source:
    return make_source(SourceTable.model_validate({"name": "x", **settings}), folder)


def test_each_kind_makes_its_source_with_paths_below_the_folder(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 3)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(image_bytes())
    assert isinstance(make({"kind": "video", "path": "a.mp4"}, tmp_path), VideoFile)
    assert isinstance(make({"kind": "images", "path": "pictures"}, tmp_path), ImageFolder)
    assert isinstance(make({"kind": "camera", "device": "0"}, tmp_path), Camera)


def test_own_class_gets_its_name_and_settings_and_inherits_defaults() -> None:
    source = make({"kind": f"{MODULE}:Countdown", "name": "rocket", "settings": {"start": 5}}, Path())
    assert [sample.index for sample in source.samples()] == [0, 1, 2, 3, 4]
    assert (source.name, source.live, source.dropped, source.unreadable) == ("rocket", False, 0, 0)


@pytest.mark.parametrize(
    ("settings", "code", "text"),
    [
        ({"kind": "videos"}, "UnknownSource", "'videos': expected one of video, images, camera"),
        ({"kind": "video"}, "BadSetting", "'path' is None, expected the file to read for kind 'video'"),
        ({"kind": "no_such_module:Door"}, "BadSourceClass", "No module named 'no_such_module'"),
        ({"kind": ".relative:Door"}, "BadSourceClass", "expected package.module:name"),
        ({"kind": f"{MODULE}:Door"}, "BadSourceClass", "has no Door"),
        ({"kind": f"{MODULE}:Broken"}, "BadSourceClass", r"ZeroDivisionError: x \(test_factory.py, line "),
        ({"kind": f"{MODULE}:NotASource"}, "BadSourceClass", "has no 'samples'"),
        ({"kind": f"{MODULE}:Countdown", "settings": {"stop": 1}}, "BadSourceClass", "unexpected keyword .* 'stop'"),
    ],
)
def test_wrong_setting_raises_usage_error(settings: dict[str, Any], code: str, text: str) -> None:
    with raises_error(UsageError, code, match=text) as caught:
        make(settings, Path())
    assert "\n" not in str(caught.value)
