"""What can go wrong in a stage, one class a failure, in the branches of `brokers.errors`."""

from __future__ import annotations

from dataclasses import dataclass

from brokers.errors import BadFile, SparseError, UsageError, WireError


class BadWeights(BadFile):
    """A file that cannot be used as weights at all."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path, problem)
        self.key = "pipeline.weights"


# Darknet's weight files -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class NotDarknet(UsageError):
    """A file that does not begin as Darknet's weight files do."""

    key = "pipeline.weights"

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path} is not a Darknet weights file: {self.problem}"


@dataclass(eq=False)
class DarknetTruncated(UsageError):
    """A weights file that ends before the network's last layer: cut off, or made for a smaller network."""

    key = "pipeline.weights"

    path: str
    layer: int
    expected_bytes: int
    actual_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.path} ends inside layer {self.layer}: the network needs {self.expected_bytes} bytes, "
            f"the file has {self.actual_bytes}: it was cut off, or made for another network"
        )


@dataclass(eq=False)
class DarknetTrailing(UsageError):
    """A weights file that goes on after the network's last layer: made for a larger network."""

    key = "pipeline.weights"

    path: str
    expected_bytes: int
    actual_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.path} goes on after the last layer: the network needs {self.expected_bytes} bytes, "
            f"the file has {self.actual_bytes}: it was made for another network"
        )


# Detections -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class BadDetectorOutput(UsageError):
    """Outputs that are not those of one picture by a detector with these anchors and labels."""

    expected: str
    actual: str

    def __str__(self) -> str:
        return f"detections expect {self.expected}, the network gave {self.actual}"


# Pictures ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class BadCrop(UsageError):
    """A centre crop larger than the picture it is cut from."""

    resize: int
    crop: int

    def __str__(self) -> str:
        return f"a crop of {self.crop} pixels does not fit into a picture resized to {self.resize}"


# Cutting networks -------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class CannotTrace(UsageError):
    """A network that torch.fx cannot follow, and that has no children to cut between."""

    key = "pipeline.model"

    model: str
    reason: str

    def __str__(self) -> str:
        return (
            f"{self.model} cannot be cut as it is, torch.fx says: {self.reason}; "
            "make it an nn.Sequential, or give a list of modules, and it is cut between those"
        )


@dataclass(eq=False)
class NoSuchCut(UsageError):
    """A cut that is not between two layers of the network."""

    key = "pipeline.cuts"

    cut: int
    layers: tuple[str, ...]

    def __str__(self) -> str:
        last = len(self.layers) - 1
        if last < 1:
            return f"cut {self.cut} does not exist: the network has {len(self.layers)} layer and no cuts"
        near = min(max(self.cut, 1), last)
        return (
            f"cut {self.cut} does not exist: the network has {len(self.layers)} layers and cuts 1 to {last}; "
            f"the nearest, {near}, is between {self.layers[near - 1]!r} and {self.layers[near]!r}"
        )


@dataclass(eq=False)
class CutsNotIncreasing(UsageError):
    """Cuts that are not in order, or given twice: a part would be empty."""

    key = "pipeline.cuts"

    cuts: tuple[int, ...]

    def __str__(self) -> str:
        return f"cuts {list(self.cuts)} must increase from one to the next"


@dataclass(eq=False)
class NonTensorValue(UsageError):
    """A value that is neither a tensor nor a tuple of tensors, at a cut or at the end of a network."""

    key = "pipeline.cuts"

    name: str
    kind: str

    def __str__(self) -> str:
        return f"{self.name!r} is of type {self.kind}, only tensors and tuples of tensors can cross: cut elsewhere"


@dataclass(eq=False)
class TensorMissing(WireError):
    """A message without one of the tensors that the part takes."""

    name: str
    actual: tuple[str, ...]

    def __str__(self) -> str:
        return f"expected a tensor {self.name!r}, the message has {', '.join(map(repr, self.actual)) or 'none'}"


@dataclass(eq=False)
class SharedWeights(UsageError):
    """A parameter that two parts use: each would train a copy of its own."""

    key = "pipeline.cuts"

    name: str
    first: int
    second: int

    def __str__(self) -> str:
        return (
            f"{self.name!r} is used before and after a cut, by parts {self.first} and {self.second} (from 0): "
            "each would train a copy of its own; cut where it is not shared"
        )


# Executors ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class BadExecutor(UsageError):
    """An executor that the pipeline file names and that cannot be had."""

    key = "stage.executor"

    address: str
    problem: str

    def __str__(self) -> str:
        return f"executor {self.address!r}: {self.problem}"


@dataclass(eq=False)
class WorkerConflict(UsageError):
    """A worker that cannot join its stage: one of the same id is up, or one with another model."""

    worker: str
    problem: str

    def __str__(self) -> str:
        return f"worker {self.worker!r} cannot join: {self.problem}"


@dataclass(eq=False)
class RowsDoNotMatch(SparseError):
    """A batch whose answer cannot be split: the executor's rows are not independent."""

    tensor: str
    expected_rows: int
    actual_rows: int

    def __str__(self) -> str:
        return (
            f"a batch of {self.expected_rows} rows gave {self.actual_rows} in {self.tensor!r}: "
            "an executor whose rows depend on one another must not be batchable"
        )


# Networks by name, and their weights ------------------------------------------------------------------------------


@dataclass(eq=False)
class UnknownModel(UsageError):
    """A model name that is not registered."""

    key = "pipeline.model"

    name: str
    nearest: tuple[str, ...]
    known: tuple[str, ...]

    def __str__(self) -> str:
        guess = f"did you mean {' or '.join(self.nearest)}? " if self.nearest else ""
        return f"model {self.name!r} is not known: {guess}There are {', '.join(self.known)}"


@dataclass(eq=False)
class BadModel(UsageError):
    """A factory that cannot be found, or that does not build a network."""

    key = "pipeline.model"

    address: str
    problem: str

    def __str__(self) -> str:
        return f"model {self.address!r}: {self.problem}"


@dataclass(eq=False)
class PickledWeights(UsageError):
    """A weights file that is a pickle, which runs whatever code is in it."""

    key = "pipeline.weights"

    path: str

    def __str__(self) -> str:
        return (
            f"{self.path} is a pickle, which can run any code: convert it once, where you trust it, with "
            "safetensors.torch.save_file(torch.load(PATH, weights_only=True), 'NAME.safetensors')"
        )


@dataclass(eq=False)
class WeightsDoNotFit(UsageError):
    """A weights file for another network: a tensor is missing, unknown, or of another shape."""

    key = "pipeline.weights"

    path: str
    name: str
    expected: tuple[int, ...] | None
    actual: tuple[int, ...] | None

    def __str__(self) -> str:
        if self.expected is None:
            return f"{self.path} does not fit: it has a tensor {self.name!r}, the network has none of that name"
        found = f"the file has {list(self.actual)}" if self.actual is not None else "the file has none of that name"
        return f"{self.path} does not fit: expected {self.name!r} of shape {list(self.expected)}, {found}"


@dataclass(eq=False)
class BadDevice(UsageError):
    """A GPU that is asked for and is not there."""

    key = "stage.device"

    device: str
    available: int

    def __str__(self) -> str:
        return f"device {self.device!r}: this machine has {self.available} CUDA devices; use 'auto' or 'cpu'"
