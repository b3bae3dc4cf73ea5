"""What can be wrong with where samples come from: all are a person's to put right, each is one line."""

from __future__ import annotations

from dataclasses import dataclass

from brokers.errors import UsageError


@dataclass(eq=False)
class NoSuchFile(UsageError):
    """A source's file or folder that is not there."""

    key = "source.path"

    path: str
    expected: str

    def __str__(self) -> str:
        return f"{self.path}: no such file or folder; expected {self.expected}"


@dataclass(eq=False)
class NotAVideo(UsageError):
    """A file that cannot be read as a video."""

    key = "source.path"

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: not a video that can be read: {self.reason}"


@dataclass(eq=False)
class NoVideoStream(UsageError):
    """A media file without pictures that move: a song, subtitles."""

    key = "source.path"

    path: str
    streams: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path}: has no video stream, only: {', '.join(self.streams) or 'nothing'}"


@dataclass(eq=False)
class NoPictures(UsageError):
    """A folder in which no picture can be sent."""

    key = "source.path"

    path: str
    pattern: str
    unreadable: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.unreadable:
            return f"{self.path}: no file matches {self.pattern!r}"
        names = ", ".join(self.unreadable[:3]) + (", ..." if len(self.unreadable) > 3 else "")
        return f"{self.path}: none of its {len(self.unreadable)} files is a JPEG or PNG picture: {names}"


@dataclass(eq=False)
class CameraUnavailable(UsageError):
    """A camera that could not be opened when the source began."""

    key = "source.device"

    device: str
    reason: str

    def __str__(self) -> str:
        return f"camera {self.device}: {self.reason}"


@dataclass(eq=False)
class UnknownSource(UsageError):
    """A kind of source that Sparse does not have."""

    key = "source.kind"

    kind: str
    known: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"source kind {self.kind!r}: expected one of {', '.join(self.known)}, or a class as 'package.module:Class'"
        )


@dataclass(eq=False)
class BadSourceClass(UsageError):
    """A source class of the user's own that could not be loaded or made."""

    key = "source.kind"

    target: str
    reason: str

    def __str__(self) -> str:
        return f"source {self.target!r}: {self.reason}"


@dataclass(eq=False)
class BadSetting(UsageError):
    """A setting of a source that is missing or has a value it cannot have."""

    key = "source"

    setting: str
    value: object
    expected: str

    def __str__(self) -> str:
        return f"source setting {self.setting!r} is {self.value!r}, expected {self.expected}"


# Data sets --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class CountsDiffer(UsageError):
    """Examples of which some have no label, or labels of nothing."""

    key = "source.kind"

    inputs: int
    labels: int

    def __str__(self) -> str:
        return f"a data set with {self.inputs} inputs has {self.labels} labels, expected one for each input"


@dataclass(eq=False)
class NoExamples(UsageError):
    """A data set of which one part is empty."""

    def __init__(self) -> None:
        problem = "a data set has no examples, expected at least one for training and one for testing"
        super().__init__("NoExamples", problem, key="source.kind")


@dataclass(eq=False)
class BadArray(UsageError):
    """An array of a data set with a dtype or a shape that it cannot have."""

    key = "source.kind"

    what: str
    expected: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.what} of a data set are {self.dtype} {list(self.shape)}, expected {self.expected}"


@dataclass(eq=False)
class LabelOutOfRange(UsageError):
    """A label for which the data set has no class."""

    key = "source.kind"

    dataset: str
    part: str
    index: int
    label: int
    classes: int

    def __str__(self) -> str:
        return (
            f"data set {self.dataset!r}: label {self.index} of its {self.part}() is {self.label}, "
            f"expected 0 to {self.classes - 1} for {self.classes} classes"
        )


@dataclass(eq=False)
class NotInstalled(UsageError):
    """A package that a kind of source needs, and that comes with one of our extras."""

    key = "source.kind"

    kind: str
    package: str
    extra: str

    def __str__(self) -> str:
        return (
            f"source kind {self.kind!r} needs {self.package}, which is not installed: "
            f"install Sparse with its extra {self.extra!r}, pip install '.[{self.extra}]'"
        )


@dataclass(eq=False)
class NotDownloaded(UsageError):
    """A data set that is neither in its folder nor to be had from where it is public."""

    key = "source.kind"

    dataset: str
    folder: str
    origin: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.dataset} is not in {self.folder}, and {self.origin} did not give it: {self.reason}; "
            'kind = "digits" needs no download'
        )


@dataclass(eq=False)
class CannotAugment(UsageError):
    """Inputs that are no pictures, and cannot be shifted or mirrored."""

    key = "training.augment"

    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"only pictures (C, H, W) can be augmented, the inputs of this data set are {list(self.shape)}"
