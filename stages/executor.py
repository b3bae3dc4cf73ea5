"""What an application developer writes: one function of named tensors, or one `TaskExecutor`.

A function stands in the pipeline file as `executor = "my_app.stages:smooth"`. Its parameters are the names of the
tensors it takes, and it returns a dict of those it gives:

    def smooth(values):
        return {"values": numpy.convolve(values, numpy.ones(5) / 5, mode="same")}

It gets numpy arrays; one with a parameter that is annotated `torch.Tensor` gets torch tensors. What has a life of its
own (a file, a model, a memory of former readings) is a class:

    class Smooth(TaskExecutor):
        def start(self, node):  self.past = {}
        def execute(self, tensors, task): ...
        def stop(self): ...
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from brokers.errors import BadPayload, SparseError
from brokers.process.import_string import CannotLoad, describe_exception, import_string
from brokers.protocol.messages import JSON, SAFETENSORS, BinaryContent, Content
from brokers.protocol.safetensors_codec import to_numpy, to_torch
from stages.errors import BadExecutor

Tensors = dict[str, Any]

# What a bare array (`await offload(x)`) and a bare JSON number are called: the only parameter of a function takes them.
DEFAULT_TENSOR_NAMES = frozenset({"input", "value"})


@dataclass(slots=True)
class TaskContext:
    """The request that is being worked on. `metadata` travels on with it: an executor may add to it."""

    request_id: bytes
    source: str
    attempt: int
    metadata: dict[str, str] = field(default_factory=dict)


class Node(Protocol):
    """The worker, as its executor sees it."""

    pipeline: str
    stage: str
    worker: str
    device: str

    def dispatch(self, tensors: Mapping[str, Any], task: TaskContext, stage: str) -> None:
        """Pass this request on to `stage` of the same pipeline, instead of the next one.

        For an executor that chooses the way itself (an early exit, a detour): call it once from `execute`, and return
        None.
        """
        ...


class TaskExecutor:
    """One part of the work. All its methods run in the worker's compute thread, one at a time.

    `framework` says which arrays `execute` gets. `batchable` promises that rows (dimension 0) do not influence one
    another: the worker may then put several requests into one call, and split the answer by rows. `formats` are the
    Content Types that `prepare` takes, for the worker's record; nothing is refused because of it.
    """

    framework: Literal["numpy", "torch"] = "numpy"
    batchable: bool = False
    fingerprint: str = ""
    formats: tuple[str, ...] = (SAFETENSORS, JSON)

    def __init_subclass__(cls) -> None:
        if "prepare" in vars(cls) and "formats" not in vars(cls):
            cls.formats = ()  # it takes what only its author knows

    def start(self, node: Node) -> None:
        """Called once, before the first task."""

    def prepare(self, content: Content, task: TaskContext) -> Tensors:
        """The named arrays of what came in, one request at a time; override it to take pictures or other bytes."""
        if isinstance(content, BinaryContent):
            return parse_json_arrays(content)
        task.metadata.update(content.metadata)
        convert = to_torch if self.framework == "torch" else to_numpy
        return {name: convert(tensor) for name, tensor in content.tensors.items()}

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors | None:
        """The work itself: named arrays in, named arrays out; None when `Node.dispatch` has passed the request on."""
        raise NotImplementedError

    def finish(self, tensors: Tensors, task: TaskContext) -> Tensors:
        """What goes out, one request at a time, after a batch has been split again."""
        return tensors

    def stop(self) -> None:
        """Called once, after the last task."""


class FunctionExecutor(TaskExecutor):
    """A plain function of named tensors as a stage."""

    def __init__(self, function: Callable[..., Tensors]) -> None:
        self._function = function
        parameters = inspect.signature(function).parameters.values()
        self._takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        self._names = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        self._needs = {item.name for item in parameters if item.default is item.empty} & set(self._names)
        if any("torch" in str(parameter.annotation) for parameter in parameters):
            self.framework = "torch"

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        if len(self._names) == len(tensors) == 1 and not DEFAULT_TENSOR_NAMES.isdisjoint(tensors):
            tensors = {self._names[0]: next(iter(tensors.values()))}
        if missing := self._needs - set(tensors):
            raise BadPayload(
                "tensors", f"expected {sorted(self._needs)}, {sorted(missing)} missing from {sorted(tensors)}"
            )
        taken = tensors if self._takes_any else {name: tensors[name] for name in self._names if name in tensors}
        given = self._function(**taken)
        if not isinstance(given, dict):
            raise TypeError(
                f"{self._function.__name__} must return a dict of named arrays, returned {type(given).__name__}"
            )
        return given


def parse_json_arrays(blob: BinaryContent) -> Tensors:
    """JSON numbers as arrays: an object names them, a bare number or list is called `value`."""
    import json

    import numpy as np

    if blob.content_type != JSON:
        raise BadPayload(blob.content_type, "this stage takes numbers: JSON or tensors")
    try:
        found = json.loads(bytes(blob.data))
        named = found if isinstance(found, dict) else {"value": found}
        arrays = {name: np.asarray(value, dtype=np.float64) for name, value in named.items()}
        if strange := [name for name, value in arrays.items() if not np.isfinite(value).all()]:
            raise ValueError(f"null, NaN or infinity in {strange[0]!r}")
    except (ValueError, TypeError, RecursionError) as error:
        raise BadPayload(JSON, f"expected numbers, lists of them, or an object of such: {error}") from None
    if not arrays:
        raise BadPayload(JSON, "expected numbers, got an empty object")
    return arrays


def load_executor(address: str, settings: Mapping[str, Any], folder: str) -> TaskExecutor:
    """The executor at `package.module:name`; `folder` (the pipeline file's) is searched beside the installed packages.

    Raises `BadExecutor` with what was wrong: the form, the module, the name, or the settings.
    """
    try:
        target = import_string(address, folder)
    except CannotLoad as error:
        raise BadExecutor(address, error.problem) from error
    if inspect.isclass(target) and issubclass(target, TaskExecutor):
        return _made(address, target, settings, folder)
    if inspect.isfunction(target):
        if settings:
            raise BadExecutor(address, "a function takes no settings: write a TaskExecutor for that")
        kinds = {parameter.kind for parameter in inspect.signature(target).parameters.values()}
        if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}:
            raise BadExecutor(address, "its parameters are given by name: it cannot have *args, nor any before a /")
        return FunctionExecutor(target)
    raise BadExecutor(address, f"expected a function or a TaskExecutor, found {type(target).__name__}")


def _made(address: str, target: type[TaskExecutor], settings: Mapping[str, Any], folder: str) -> TaskExecutor:
    try:
        return target(**settings)
    except SparseError:
        raise
    except Exception as error:  # whatever a user's own code raises, its author needs to see: where, and what
        if isinstance(error, TypeError) and error.__traceback__ is not None and error.__traceback__.tb_next is None:
            raise BadExecutor(address, f"its settings do not fit: {error}") from None  # it was not even entered
        raise BadExecutor(address, f"making it raised {describe_exception(error, folder)}") from error
