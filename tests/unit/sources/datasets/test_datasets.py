"""Data sets: what examples may be, which there are, and what is said when one cannot be had."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torchvision
from numpy.typing import NDArray
from PIL import Image

from brokers.config.schema import SourceTable
from brokers.errors import UsageError
from sources.datasets.cifar10 import Cifar10
from sources.datasets.dataset import Dataset, Examples
from sources.datasets.digits import Digits
from sources.errors import (
    BadArray,
    BadSourceClass,
    CountsDiffer,
    LabelOutOfRange,
    NoExamples,
    NotDownloaded,
    NotInstalled,
    UnknownSource,
)
from sources.inputs.factory import make_dataset, make_source
from tests.support.brokers.ports import free_port

HERE = "tests.unit.sources.datasets.test_datasets"


def labels(*values: int) -> NDArray[numpy.int64]:
    return numpy.array(values, numpy.int64)


class Waves(Dataset):
    """What a user writes."""

    name = "waves"
    classes = ("sine", "square")

    def __init__(self, count: int = 4, wrong: int | None = None) -> None:
        self.count, self.wrong = count, wrong

    def train(self) -> Examples:
        chosen = numpy.arange(self.count) % 2
        if self.wrong is not None:
            chosen[self.count - 1] = self.wrong
        return Examples(numpy.zeros((self.count, 8), numpy.float32), chosen)

    def test(self) -> Examples:
        raise ZeroDivisionError("no\nwaves")


class Tuples(Waves):
    def train(self) -> Any:
        return numpy.zeros((2, 8)), [0, 1]


class Nameless(Waves):
    classes: Any = ()


class Letters(Waves):
    classes: Any = "ab"


class NotADataset:
    name = "x"


def made(table: dict[str, Any], base: Path = Path()) -> Dataset:
    return make_dataset(SourceTable.model_validate(table), base)


@pytest.mark.parametrize(
    ("pictures", "given", "error", "text"),
    [
        (numpy.zeros((3, 1, 2, 2), numpy.uint8), labels(0, 1), CountsDiffer, "with 3 inputs has 2 labels"),
        (numpy.zeros((0, 1, 2, 2), numpy.uint8), labels(), NoExamples, "has no examples"),
        (numpy.zeros((3, 4), numpy.uint8), labels(0, 1, 2), BadArray, r"uint8 \[3, 4\], expected uint8 \(N, C, H, W\)"),
        (numpy.zeros((3, 4)), labels(0, 1, 2), BadArray, r"inputs of a data set are float64 \[3, 4\]"),
        (numpy.float32(1), labels(0), BadArray, r"inputs of a data set are float32 \[\]"),
        (numpy.zeros((1, 4), numpy.float32), numpy.zeros(1), BadArray, r"labels .* float64 \[1\], expected int64"),
        (numpy.zeros((1, 4), numpy.float32), labels(0)[None], BadArray, r"labels of a data set are int64 \[1, 1\]"),
    ],
)
def test_examples_that_do_not_fit_together_are_one_clear_line(
    pictures: Any, given: Any, error: type[UsageError], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        Examples(pictures, given)
    assert "\n" not in str(caught.value)


def test_digits_are_pictures_of_real_handwriting_split_once_and_for_all() -> None:
    train, test = Digits().train(), Digits().test()
    assert (train.inputs.shape, str(train.inputs.dtype)) == ((1438, 3, 32, 32), "uint8")
    assert (test.inputs.shape, str(test.labels.dtype)) == ((359, 3, 32, 32), "int64")
    assert (train.inputs.min(), train.inputs.max()) == (0, 255)
    assert numpy.array_equal(Digits().train().inputs, train.inputs)
    for examples in (train, test):
        assert numpy.bincount(examples.labels).min() > 0.07 * len(examples)
    seen = {picture.tobytes() for picture in train.inputs}
    assert not seen & {picture.tobytes() for picture in test.inputs}


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # as if it were not installed
    with pytest.raises(NotInstalled, match=r"needs scikit-learn, .* extra 'train', pip install '\.\[train\]'"):
        Digits().train()


class StandInForCIFAR10:
    """In place of torchvision's loader, whose files are pickles: two pictures in the shape that it gives them."""

    url = "stand-in"
    roots: list[Path] = []  # noqa: RUF012 - what the one test that uses it asks for

    def __init__(self, root: Path, *, train: bool, download: bool) -> None:
        self.roots.append(root)
        self.data = numpy.zeros((2, 32, 32, 3), numpy.uint8)
        self.data[0, 5, 7] = (1, 2, 3)
        self.targets = [3, 9] if train else [0, 1]


def test_cifar10_has_its_channels_first_and_its_classes_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", StandInForCIFAR10)
    monkeypatch.setattr(StandInForCIFAR10, "roots", [])
    monkeypatch.setenv("SPARSE_CACHE", str(tmp_path / "cache"))
    dataset = made({"kind": "cifar10", "path": "photographs"}, tmp_path)
    train = dataset.train()
    assert (train.inputs.shape, train.labels.tolist()) == ((2, 3, 32, 32), [3, 9])
    assert train.inputs[0, :, 5, 7].tolist() == [1, 2, 3]
    assert made({"kind": "cifar10"}).test().labels.tolist() == [0, 1]
    assert StandInForCIFAR10.roots == [tmp_path / "photographs", tmp_path / "cache" / "cifar10"]
    assert (dataset.name, dataset.horizontal_flip, dataset.classes[3], len(dataset.classes)) == (
        "cifar10",
        True,
        "cat",
        10,
    )


def test_cifar10_that_cannot_be_downloaded_says_what_was_tried_and_what_needs_no_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nobody = f"http://127.0.0.1:{free_port()}/cifar-10-python.tar.gz"
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", nobody)
    with pytest.raises(NotDownloaded) as caught:
        Cifar10(tmp_path / "empty").train()
    said = str(caught.value)
    assert said.startswith(f"CIFAR-10 is not in {tmp_path / 'empty'}, and {nobody} did not give it: ")
    assert "refused" in said
    assert said.endswith('kind = "digits" needs no download')
    assert "\n" not in said


def test_cifar10_says_so_when_its_folder_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotDownloaded, match="Not a directory"):
        Cifar10(tmp_path / "file" / "below").train()


def test_a_data_set_of_ones_own_gets_its_settings_and_as_many_rows_as_the_limit() -> None:
    dataset = made({"kind": f"{HERE}:Waves", "settings": {"count": 6}, "limit": 5})
    assert len(dataset.train()) == 5
    assert (dataset.name, dataset.classes, dataset.horizontal_flip) == ("waves", ("sine", "square"), False)


@pytest.mark.parametrize(
    ("table", "error", "text"),
    [
        ({"kind": "video"}, UnknownSource, "'video': expected one of digits, cifar10, or a class"),
        ({"kind": "no_such_module:Waves"}, BadSourceClass, "No module named 'no_such_module'"),
        ({"kind": f"{HERE}:Waves", "settings": {"counts": 1}}, BadSourceClass, "unexpected keyword argument 'counts'"),
        ({"kind": f"{HERE}:NotADataset"}, BadSourceClass, "has no 'classes': see sources.datasets.dataset.Dataset"),
        ({"kind": f"{HERE}:Nameless"}, BadSourceClass, "its 'classes' are (), expected a tuple of names"),
        ({"kind": f"{HERE}:Letters"}, BadSourceClass, "its 'classes' are 'ab', expected a tuple of names"),
        (
            {"kind": f"{HERE}:Tuples"},
            BadSourceClass,
            "its train() gave tuple, expected sources.datasets.dataset.Examples",
        ),
        (
            {"kind": f"{HERE}:Waves", "settings": {"wrong": 2}},
            LabelOutOfRange,
            "data set 'waves': label 3 of its train() is 2, expected 0 to 1 for 2 classes",
        ),
        ({"kind": f"{HERE}:Waves", "settings": {"wrong": -1}}, LabelOutOfRange, "label 3 of its train() is -1"),
    ],
)
def test_a_wrong_data_set_is_one_clear_line(table: dict[str, Any], error: type[UsageError], text: str) -> None:
    with pytest.raises(error) as caught:
        made(table).train()
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_data_set_of_ones_own_raises_is_told_with_its_line() -> None:
    with pytest.raises(BadSourceClass, match=r"ZeroDivisionError: no waves \(test_datasets.py, line \d+\)"):
        made({"kind": f"{HERE}:Waves"}).test()


def test_a_data_set_as_a_source_gives_its_test_pictures_as_png() -> None:
    source = make_source(SourceTable.model_validate({"kind": "digits", "name": "x", "limit": 3}), Path())
    samples = list(source.samples())
    expected = Digits().test().inputs[:3].transpose(0, 2, 3, 1)
    assert [(sample.source, sample.index, sample.content_type) for sample in samples] == [
        ("x", index, "image/png") for index in range(3)
    ]
    for sample, picture in zip(samples, expected, strict=True):
        assert isinstance(sample.payload, bytes)
        assert numpy.array_equal(numpy.asarray(Image.open(io.BytesIO(sample.payload))), picture)
        assert sample.load_image is not None
        assert numpy.array_equal(sample.load_image(), picture)


def test_a_data_set_as_a_source_ends_after_its_last_picture_or_when_closed() -> None:
    source = make_source(SourceTable.model_validate({"kind": "digits"}), Path())
    assert [sample.index for sample in source.samples()] == list(range(359))
    endless = make_source(SourceTable.model_validate({"kind": "digits", "loop": True}), Path())
    indices = []
    for sample in endless.samples():
        indices.append(sample.index)
        if sample.index == 400:
            endless.close()
    assert indices[-1] == 400
