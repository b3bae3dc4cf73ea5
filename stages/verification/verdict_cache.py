"""A cache of verdicts, so that the check of a network runs once for its code, weights, cuts and mode."""

import hashlib
import json
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

import stages
from brokers.process.download_cache import cache_folder
from brokers.process.files import file_lock, write_atomic
from stages.partition.partition import tensor_bytes
from stages.partition.python_state import PythonState
from stages.partition.tracing import TracedModel
from stages.verification.verdict import Verdict

log = logging.getLogger(__name__)

_VERDICT = TypeAdapter(Verdict)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function: differs between processes
_FORMAT = "1"  # changes when the check itself does
# Their versions are part of the key.
_VERSIONED_PACKAGES = frozenset({"torch", "torchvision", "builtins", "numpy"})


def verdict_key(
    traced: TracedModel,
    cuts: Sequence[int],
    example: Mapping[str, Tensor],
    weights: Path | None,
    folder: str,
    extra: str,
) -> str | None:
    """Return a digest of all that the check depends on; None if the source of a module's class is unknown.

    `folder`: of the pipeline, whose modules a network may use. `extra`: mode, device and seed.
    """
    digest = hashlib.sha256()

    def add(*items: object) -> None:
        digest.update(json.dumps([_ADDRESS.sub("", str(item)) for item in items]).encode())

    add(_FORMAT, torch.__version__, version("torchvision"), platform.python_version(), platform.machine(), extra)
    add(torch.get_num_threads(), list(cuts))
    if weights is not None:
        status = weights.stat()
        add(weights.resolve(), status.st_size, status.st_mtime_ns)
    for name, tensor in example.items():
        add(name, tensor.dtype, tuple(tensor.shape))
        digest.update(tensor_bytes(tensor))
    _add_network(traced, digest, add, with_values=weights is None)
    try:
        for file in sorted(_source_files(traced.model, folder)):
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    except (OSError, _NoSource):
        return None
    return digest.hexdigest()


def _add_network(traced: TracedModel, digest: "hashlib._Hash", add: Callable[..., None], *, with_values: bool) -> None:
    """Add the graph, modules and state; `with_values`: also the parameters, initial or read by the factory."""
    for node in traced.graph.nodes:
        add(node.op, node.target, node.args, node.kwargs)
    for path, module in traced.model.named_modules():
        add(path, type(module).__qualname__, module.training)
    for path, tensor in (*traced.model.named_parameters(), *traced.model.named_buffers()):
        add(path, tensor.dtype, tuple(tensor.shape), tensor.requires_grad)
        if with_values:  # initial values, or those that the factory has read
            digest.update(tensor_bytes(tensor))
    state = PythonState(traced.model)
    add(*state.values)
    for name in sorted({type(module).__module__.partition(".")[0] for module in traced.model.modules()}):
        add(name, getattr(sys.modules.get(name), "__version__", ""))
    for tensor in state.tensors:
        digest.update(tensor_bytes(tensor))


def cached_verdict(key: str | None, check: Callable[[], Verdict]) -> Verdict:
    """Return the verdict of this key from the cache folder; the first process that asks for it runs `check`.

    Refusals are not kept: they may have had a reason outside of the network.
    """
    if key is None:
        return check()
    path = cache_folder() / "verdicts" / f"{key}.json"
    if (cached := _read(path)) is not None:  # before taking the lock: the cache in a container may be read-only
        return cached
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _enter_lock(stack, path.with_name(f".{key}.lock"))
        except OSError as error:
            log.info("the check of the network is repeated at each start, as its result cannot be kept: %s", error)
        if (cached := _read(path)) is not None:
            return cached
        verdict = check()
        if not verdict.problem:
            with suppress(OSError):
                write_atomic(path, _VERDICT.dump_json(verdict))
        return verdict


def _enter_lock(stack: ExitStack, path: Path) -> None:
    try:
        stack.enter_context(file_lock(path, wait=False))
    except BlockingIOError:
        log.info("another worker checks the network: waiting for its result (lock: %s)", path)
        stack.enter_context(file_lock(path))


class _NoSource(Exception):
    """A class of the network is not from a file."""


def _read(path: Path) -> Verdict | None:
    try:
        return _VERDICT.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _source_files(model: nn.Module, folder: str) -> set[Path]:
    """Return the Python files that the network's code may be in: of its classes, their packages, and the folder."""
    files = _python_files(Path(stages.__path__[0]))  # the check itself too
    if folder:
        files |= _python_files(Path(folder))
    for name in sorted({base.__module__ for module in model.modules() for base in type(module).__mro__}):
        package = name.partition(".")[0]
        if package in _VERSIONED_PACKAGES:
            continue
        path = getattr(sys.modules.get(name), "__file__", None)
        if path is None:
            raise _NoSource
        files.add(Path(path))
        if package != name and "site-packages" not in path:
            files |= _python_files(Path(path).parents[name.count(".") - 1])
    return files


def _python_files(folder: Path) -> set[Path]:
    """Return the Python files of a folder, and of those folders in it that have such files."""
    files: set[Path] = set()
    for root, folders, names in os.walk(folder):
        found = [Path(root, name) for name in names if name.endswith(".py")]
        files.update(found)
        folders[:] = [name for name in folders if not name.startswith(".")] if found or Path(root) == folder else []
    return files
