"""Data sets: valid examples, the built-in ones, own classes, and errors."""

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
from sources import Dataset, Examples
from sources.datasets import bundled
from sources.datasets.bundled import Cifar10, Digits
from sources.inputs.factory import make_dataset
from sources.inputs.images import DatasetSource
from tests.support.brokers.ports import free_port
from tests.support.errors import raises_error

MODULE = "tests.unit.sources.datasets.test_bundled"


def labels(*values: int) -> NDArray[numpy.int64]:
    return numpy.array(values, numpy.int64)


class Waves(Dataset):
    name = "waves"
    classes = ("sine", "square")

    def __init__(self, count: int = 4, wrong: int | None = None) -> None:
        self.count = count
        self.wrong = wrong

    def train(self) -> Examples:
        classes = numpy.arange(self.count) % 2
        if self.wrong is not None:
            classes[self.count - 1] = self.wrong
        return Examples(numpy.zeros((self.count, 8), numpy.float32), classes)

    def test(self) -> Examples:
        raise ZeroDivisionError("no\nwaves")


class Tuples(Waves):
    def train(self) -> Any:
        return numpy.zeros((2, 8)), [0, 1]


class Nameless(Waves):
    classes: Any = ()


class Letters(Waves):
    classes: Any = "ab"


class Values(Nameless):
    def train(self) -> Examples:
        return Examples(numpy.zeros((2, 8), numpy.float32), numpy.array([-1.5, 70], numpy.float32))


class Sequences(Waves):
    def train(self) -> Examples:
        return Examples(labels(7, 8), numpy.array([[0, 1], [1, 2]], numpy.int64))


class NotADataset:
    name = "x"


def make(table: dict[str, Any], folder: Path = Path()) -> Dataset:
    return make_dataset(SourceTable.model_validate(table), folder)


@pytest.mark.parametrize(
    ("inputs", "targets", "code", "text"),
    [
        (numpy.zeros((3, 1, 2, 2), numpy.uint8), labels(0, 1), "CountsDiffer", "with 3 inputs has 2 labels"),
        (numpy.zeros((0, 1, 2, 2), numpy.uint8), labels(), "NoExamples", "has no examples"),
        (numpy.zeros((3, 4), numpy.uint8), labels(0, 1, 2), "BadArray", r"uint8 \[3, 4\], expected uint8 \(N, C, H, W"),
        (numpy.zeros((3, 4)), labels(0, 1, 2), "BadArray", r"the inputs of a data set are float64 \[3, 4\]"),
        (numpy.float32(1), labels(0), "BadArray", r"the inputs of a data set are float32 \[\]"),
        (numpy.zeros((1, 4), numpy.float32), numpy.zeros(1), "BadArray", r"labels .* float64 \[1\], expected int64 or"),
        (
            numpy.zeros((1, 4), numpy.float32),
            labels(0)[0],
            "BadArray",
            r"labels of a data set are int64 \[\], expected",
        ),
        ({}, labels(0), "BadArray", "the inputs of a data set are an empty dict"),
        ({"x": numpy.zeros(2)}, labels(0, 1), "BadArray", r"the inputs 'x' of a data set are float64 \[2\]"),
        ({"sparse.labels": labels(0)}, labels(0), "BadArray", "a name that does not begin with 'sparse.'"),
        ({"": labels(0)}, labels(0), "BadArray", "the inputs '' of a data set: expected a name"),
        ({"a": labels(0), "b": labels(0, 1)}, labels(0), "CountsDiffer", "with 2 inputs 'b' has 1 labels"),
    ],
)
def test_invalid_examples_raise_usage_error(inputs: Any, targets: Any, code: str, text: str) -> None:
    with raises_error(UsageError, code, match=text):
        Examples(inputs, targets)


def test_integers_and_values_of_any_shape_are_examples() -> None:
    inputs = {"ids": labels(1, 2), "mask": numpy.ones((2, 5), numpy.bool_), "x": numpy.zeros((2, 3), numpy.float32)}
    examples = Examples(inputs, numpy.zeros((2, 7), numpy.float32))
    first = examples.first(1)
    assert len(first) == 1
    assert {name: array.shape for name, array in first.inputs.items()} == {"ids": (1,), "mask": (1, 5), "x": (1, 3)}
    assert Examples(labels(5), labels(0)[None]).labels.shape == (1, 1)


def test_digits_are_balanced_pictures_with_a_fixed_split() -> None:
    train, test = Digits().train(), Digits().test()
    assert (train.inputs.shape, str(train.inputs.dtype)) == ((1438, 3, 32, 32), "uint8")
    assert (test.inputs.shape, str(test.labels.dtype)) == ((359, 3, 32, 32), "int64")
    assert (train.inputs.min(), train.inputs.max()) == (0, 255)
    for examples in (train, test):
        assert numpy.bincount(examples.labels).min() > 0.07 * len(examples)
    training_pictures = {picture.tobytes() for picture in train.inputs}
    assert not training_pictures & {picture.tobytes() for picture in test.inputs}


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    bundled._split.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # makes its import fail
    with raises_error(UsageError, "NotInstalled", match=r"needs scikit-learn: .* extra 'train'"):
        Digits().train()


class FakeCIFAR10:
    """Replaces torchvision's loader, whose files are pickles: two pictures in its format."""

    url = "fake"
    roots: list[Path] = []  # noqa: RUF012 - replaced by the test

    def __init__(self, root: Path, *, train: bool, download: bool) -> None:
        self.roots.append(root)
        self.data = numpy.zeros((2, 32, 32, 3), numpy.uint8)
        self.data[0, 5, 7] = (1, 2, 3)
        self.targets = [3, 9] if train else [0, 1]


def test_cifar10_is_loaded_channels_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
    monkeypatch.setattr(FakeCIFAR10, "roots", [])
    monkeypatch.setenv("SPARSE_CACHE", str(tmp_path / "cache"))
    dataset = make({"kind": "cifar10", "path": "photographs"}, tmp_path)
    train = dataset.train()
    assert (train.inputs.shape, train.labels.tolist()) == ((2, 3, 32, 32), [3, 9])
    assert train.inputs[0, :, 5, 7].tolist() == [1, 2, 3]
    assert make({"kind": "cifar10"}).test().labels.tolist() == [0, 1]
    assert FakeCIFAR10.roots == [tmp_path / "photographs", tmp_path / "cache" / "cifar10"]
    assert (dataset.name, dataset.horizontal_flip) == ("cifar10", True)
    assert (dataset.classes[3], len(dataset.classes)) == ("cat", 10)


def test_cifar10_that_cannot_be_downloaded_raises_usage_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/cifar-10-python.tar.gz"
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", url)
    with raises_error(UsageError, "NotDownloaded", match="refused") as caught:
        Cifar10(tmp_path / "empty").train()
    assert caught.value.fields["url"] == url
    assert "\n" not in str(caught.value)
    (tmp_path / "file").touch()
    with raises_error(UsageError, "NotDownloaded", match="Not a directory"):
        Cifar10(tmp_path / "file" / "below").train()


def test_own_class_gets_its_settings_and_is_cut_to_the_limit() -> None:
    dataset = make({"kind": f"{MODULE}:Waves", "settings": {"count": 6}, "limit": 5})
    assert len(dataset.train()) == 5
    assert (dataset.name, dataset.classes, dataset.horizontal_flip) == ("waves", ("sine", "square"), False)


@pytest.mark.parametrize(
    ("table", "code", "text"),
    [
        ({"kind": "video"}, "UnknownSource", "'video': expected one of digits, cifar10, or a class"),
        ({"kind": "no_such_module:Waves"}, "BadSourceClass", "No module named 'no_such_module'"),
        ({"kind": f"{MODULE}:Waves", "settings": {"counts": 1}}, "BadSourceClass", "unexpected keyword .* 'counts'"),
        ({"kind": f"{MODULE}:NotADataset"}, "BadSourceClass", "has no 'classes': see sources.datasets.dataset.Dataset"),
        ({"kind": f"{MODULE}:Nameless"}, "BadSourceClass", r"its 'classes' are \(\), expected a tuple of names"),
        ({"kind": f"{MODULE}:Letters"}, "BadSourceClass", "its 'classes' are 'ab', expected a tuple of names"),
        ({"kind": f"{MODULE}:Tuples"}, "BadSourceClass", r"train\(\) returned tuple, expected sources.Examples"),
        ({"kind": f"{MODULE}:Waves", "settings": {"wrong": 2}}, "LabelOutOfRange", r"label 3 of train\(\) is 2, expec"),
        ({"kind": f"{MODULE}:Sequences"}, "LabelOutOfRange", r"label 1 of train\(\) is 2, expected 0 to 1"),
        ({"kind": f"{MODULE}:Waves", "settings": {"wrong": -1}}, "LabelOutOfRange", r"label 3 of train\(\) is -1"),
    ],
)
def test_wrong_data_set_raises_usage_error(table: dict[str, Any], code: str, text: str) -> None:
    with raises_error(UsageError, code, match=text) as caught:
        make(table).train()
    assert "\n" not in str(caught.value)


def test_exception_of_an_own_class_is_reported_with_its_line() -> None:
    with raises_error(UsageError, "BadSourceClass", match=r"ZeroDivisionError: no waves \(test_bundled.py, line \d+"):
        make({"kind": f"{MODULE}:Waves"}).test()


def test_labels_that_are_values_need_no_classes() -> None:
    assert make({"kind": f"{MODULE}:Values"}).train().labels.tolist() == [-1.5, 70]


class Pictures(Waves):
    def test(self) -> Examples:
        pictures = numpy.arange(3 * 3 * 4 * 5, dtype=numpy.uint8).reshape(3, 3, 4, 5)
        return Examples(pictures, labels(0, 1, 0))


def test_data_set_as_a_source_yields_its_test_pictures() -> None:
    samples = list(DatasetSource(Pictures(), "x").samples())
    assert [(sample.source, sample.index, sample.content_type) for sample in samples] == [
        ("x", index, "image/png") for index in range(3)
    ]
    for sample, picture in zip(samples, Pictures().test().inputs.transpose(0, 2, 3, 1), strict=True):
        assert isinstance(sample.payload, bytes)
        assert sample.load_image is not None
        assert numpy.array_equal(numpy.asarray(Image.open(io.BytesIO(sample.payload))), picture)
        assert numpy.array_equal(sample.load_image(), picture)


def test_data_set_as_a_looping_source_ends_when_closed() -> None:
    source = DatasetSource(Pictures(), "x", loop=True)
    indices = []
    for sample in source.samples():
        indices.append(sample.index)
        if sample.index == 7:
            source.close()
    assert indices == list(range(8))
