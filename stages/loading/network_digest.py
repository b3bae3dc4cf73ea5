"""A digest of the whole network, which travels with activations, so that no part continues another network.

The workers of one stage compare fingerprints of their part before they join. This compares the stages with each other:
other code or weights, or a constructor that draws other numbers in each process, would give wrong results in silence.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from torch import Tensor
from torch.utils._pytree import tree_leaves

from brokers.errors import WireError
from brokers.process.download_cache import cache_folder
from brokers.process.files import write_atomic
from stages.partition.partition import FINGERPRINT_DIGITS, tensor_bytes
from stages.partition.tracing import TracedModel

NETWORK_KEY = "sparse.network"  # the metadata key of the digest; its value does not depend on the device
_OF_PROCESS = re.compile(r" at 0x[0-9a-f]+|device\(type='\w+'(, index=\d+)?\)")


def network_digest(traced: TracedModel, cuts: Sequence[int], weights: Path | None) -> str:
    """Return a digest of the graph, the cuts and all tensors; of the file's bytes for those from a weights file."""
    digest = hashlib.sha256(json.dumps(list(cuts)).encode())

    def add(name: object, tensor: Tensor) -> None:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))

    for node in traced.graph.nodes:
        digest.update(_OF_PROCESS.sub("", f"{node.op} {node.name} {node.args} {node.kwargs}\n").encode())
    if weights is None:
        for name, parameter in traced.model.named_parameters():
            add(name, parameter)
    else:
        digest.update(_file_digest(weights).encode())
    for name, buffer in (*traced.model.named_buffers(), *traced.constants.items()):
        add(name, buffer)
    for path, module in traced.model.named_modules():
        attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        for index, value in enumerate(tree_leaves(attributes)):  # lists and dicts of tensors too
            if isinstance(value, Tensor):
                add(f"{path} {index}", value)
    return digest.hexdigest()[:FINGERPRINT_DIGITS]


def check_network(metadata: Mapping[str, str], own: str, stage: str) -> None:
    """Raise `WireError` "OtherNetwork" if activations are those of another network than `own`.

    Foreign clients need not state theirs.
    """
    if (other := metadata.get(NETWORK_KEY, own)) != own:
        message = (
            f"the activations are those of the network {other}, stage {stage!r} has {own}: all stages need the same "
            "code, weights, cuts and seed, and a constructor that makes the same network in each process"
        )
        raise WireError("OtherNetwork", message, expected=own, actual=other)


def _file_digest(path: Path) -> str:
    """Return the SHA-256 of a file; kept in the cache folder as long as its size and time of change are the same."""
    status = path.stat()
    key = hashlib.sha256(json.dumps([str(path.resolve()), status.st_size, status.st_mtime_ns]).encode()).hexdigest()
    kept = cache_folder() / "digests" / key
    with suppress(OSError, ValueError):
        text = kept.read_text("ascii")
        if re.fullmatch(r"[0-9a-f]{64}", text):
            return text
    with path.open("rb") as file:
        text = hashlib.file_digest(file, "sha256").hexdigest()
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept, text.encode())
    return text
