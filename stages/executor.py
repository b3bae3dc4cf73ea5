"""The API of an application's own stages: a function of named arrays, or a subclass of `TaskExecutor`.

A pipeline file names the function as `executor = "my_app.stages:smooth"`. Its parameters are the names of the arrays
that it takes; it returns a dict of named arrays:

    def smooth(values):
        return {"values": numpy.convolve(values, numpy.ones(5) / 5, mode="same")}

It receives numpy arrays, or torch tensors if a parameter is annotated `torch.Tensor`. A stage with settings or state (a
file, a model, earlier readings) is a class:

    class Smooth(TaskExecutor):
        def start(self, node):  self.past = {}
        def execute(self, tensors, task): ...
        def stop(self): ...
"""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from brokers.errors import BadPayload, SparseError, UsageError
from brokers.process.import_string import CannotLoad, describe_exception, import_string
from brokers.protocol.messages import JSON, SAFETENSORS, BinaryContent, Content
from brokers.protocol.safetensors_codec import to_numpy, to_torch

Tensors = dict[str, Any]  # numpy arrays or torch tensors, by name

# The names of an unnamed array (`await offload(x)`) and an unnamed JSON number: a function with one parameter takes it.
DEFAULT_TENSOR_NAMES = frozenset({"input", "value"})


@dataclass(slots=True)
class TaskContext:
    """The request being processed; `metadata` travels on with it, and an executor may add to it.

    `request_id` is 16 bytes; `source` the name of the request's source; `attempt` counts from 1.
    """

    request_id: bytes
    source: str
    attempt: int
    metadata: dict[str, str] = field(default_factory=dict)


class Node(Protocol):
    """The worker, as its executor sees it; `device` is that of the pipeline file, such as "cuda:0"."""

    pipeline: str
    stage: str
    worker: str
    device: str

    def dispatch(self, tensors: Mapping[str, Any], task: TaskContext, stage: str) -> None:
        """Send this request to `stage` of the same pipeline instead of the next one, as for an early exit.

        Call it once from `execute`, which then returns None; not together with `batchable`.
        """
        ...


class TaskExecutor:
    """Base class of a stage. A worker calls all methods in its compute thread, one at a time.

    `framework`: which arrays `execute` receives. `batchable`: rows (dimension 0) are independent, so that the worker
    may join requests into one call and split the result by rows. `fingerprint`: equal for all workers of a stage.
    `formats`: the Content Types that `prepare` accepts, published in the worker's presence record; not enforced.
    """

    framework: Literal["numpy", "torch"] = "numpy"
    batchable: bool = False
    fingerprint: str = ""
    formats: tuple[str, ...] = (SAFETENSORS, JSON)

    def __init_subclass__(cls) -> None:
        if "prepare" in vars(cls) and "formats" not in vars(cls):
            cls.formats = ()  # unknown

    def start(self, node: Node) -> None:
        """Initialise; called once, before the first task."""

    def prepare(self, content: Content, task: TaskContext) -> Tensors:
        """Convert one request's content to named arrays; override it to accept pictures or other bytes.

        Raises `BadPayload` for content that is neither tensors nor JSON numbers.
        """
        if isinstance(content, BinaryContent):
            return parse_json_arrays(content)
        task.metadata.update(content.metadata)
        convert = to_torch if self.framework == "torch" else to_numpy
        return {name: convert(tensor) for name, tensor in content.tensors.items()}

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors | None:
        """Compute named arrays from named arrays; return None after `Node.dispatch`."""
        raise NotImplementedError

    def finish(self, tensors: Tensors, task: TaskContext) -> Tensors:
        """Convert one request's outputs before they are sent; called after a batch has been split."""
        return tensors

    def stop(self) -> None:
        """Clean up; called once, after the last task, unless `start` failed."""


class FunctionExecutor(TaskExecutor):
    """A stage that calls a function of named arrays."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function
        parameters = inspect.signature(function).parameters.values()
        self._accepts_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        named = [parameter for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
        self._names = [parameter.name for parameter in named]
        self._required = {parameter.name for parameter in named if parameter.default is parameter.empty}
        if any("torch" in str(parameter.annotation) for parameter in parameters):
            self.framework = "torch"

    def execute(self, tensors: Tensors, task: TaskContext) -> Tensors:
        if len(self._names) == len(tensors) == 1 and not DEFAULT_TENSOR_NAMES.isdisjoint(tensors):
            tensors = {self._names[0]: next(iter(tensors.values()))}
        if missing := self._required - set(tensors):
            problem = f"expected {sorted(self._required)}, {sorted(missing)} missing from {sorted(tensors)}"
            raise BadPayload("tensors", problem)
        if not self._accepts_any:
            tensors = {name: tensors[name] for name in self._names if name in tensors}
        outputs = self._function(**tensors)
        if not isinstance(outputs, dict):
            name = getattr(self._function, "__name__", "the function")
            raise TypeError(f"{name} must return a dict of named arrays, returned {type(outputs).__name__}")
        return outputs


def parse_json_arrays(content: BinaryContent) -> Tensors:
    """Convert JSON numbers to float64 arrays: an object names them, a bare number or list is named `value`.

    Raises `BadPayload` for another Content Type, for text that is not JSON, and for values that are not finite numbers.
    """
    if content.content_type != JSON:
        raise BadPayload(content.content_type, "this stage accepts only tensors and JSON numbers")
    try:
        values = json.loads(bytes(content.data))
        named = values if isinstance(values, dict) else {"value": values}
        arrays = {name: np.asarray(value, dtype=np.float64) for name, value in named.items()}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise ValueError(f"null, NaN or infinity in {name!r}")
    except (ValueError, TypeError, RecursionError) as error:
        raise BadPayload(JSON, f"expected numbers, lists of numbers, or an object of them: {error}") from None
    if not arrays:
        raise BadPayload(JSON, "expected numbers, got an empty object")
    return arrays


def load_executor(address: str, settings: Mapping[str, Any], folder: str) -> TaskExecutor:
    """Load the function or class at `package.module:name`, searched in `folder` and the installed packages.

    `settings` are the arguments of the class. Raises `UsageError` "BadExecutor".
    """
    try:
        target = import_string(address, folder)
    except CannotLoad as error:
        raise _executor_error(address, error.problem) from error
    if inspect.isclass(target) and issubclass(target, TaskExecutor):
        return _create(address, target, settings, folder)
    if not inspect.isfunction(target):
        raise _executor_error(address, f"expected a function or a TaskExecutor, found {type(target).__name__}")
    if settings:
        raise _executor_error(address, "a function has no settings: write a TaskExecutor instead")
    kinds = {parameter.kind for parameter in inspect.signature(target).parameters.values()}
    if kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY}:
        raise _executor_error(address, "arguments are passed by name: remove *args and positional-only parameters")
    return FunctionExecutor(target)


def _create(address: str, target: type[TaskExecutor], settings: Mapping[str, Any], folder: str) -> TaskExecutor:
    try:
        return target(**settings)
    except SparseError:
        raise
    except Exception as error:  # the application's own code may raise anything
        if isinstance(error, TypeError) and error.__traceback__ is not None and error.__traceback__.tb_next is None:
            # The call itself failed: the constructor was not entered.
            raise _executor_error(address, f"its settings do not match its constructor: {error}") from None
        problem = f"its constructor raised {describe_exception(error, folder)}"
        raise _executor_error(address, problem) from error


def _executor_error(address: str, problem: str) -> UsageError:
    return UsageError("BadExecutor", f"executor {address!r}: {problem}", key="stage.executor", address=address)
