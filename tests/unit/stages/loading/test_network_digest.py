"""The digest of a whole network: equal in all processes for one network, different for another one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import save_file

from brokers.errors import WireError
from stages.loading.network_digest import NETWORK_KEY, check_network
from stages.loading.part_loader import load_part
from stages.models.registry import get_model_spec
from tests.support.errors import raises_error
from tests.support.training.factories import TinyNetwork

TINY = "tests.support.training.factories:tiny_network"
SHUFFLED = "tests.support.training.factories:shuffled_network"
PROGRAM = """\
import sys
from stages.loading.part_loader import load_part
from stages.models.registry import get_model_spec
print(load_part(get_model_spec(sys.argv[1]), [2], 1, None, 7, "cpu").network)
"""


def digest(model: str = TINY, cuts: tuple[int, ...] = (2,), index: int = 0, weights: Path | None = None) -> str:
    return load_part(get_model_spec(model), cuts, index, weights, 7, "cpu").network


def digest_of_other_process(model: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": "3"}
    command = [sys.executable, "-c", PROGRAM, model]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=True)
    return result.stdout.strip()


def test_all_parts_in_all_processes_have_one_digest() -> None:
    assert digest(index=0) == digest(index=1) == digest_of_other_process(TINY)


def test_constructor_that_differs_between_processes_has_other_digests() -> None:
    assert digest(SHUFFLED) != digest_of_other_process(SHUFFLED)


def test_other_cuts_and_seeds_have_other_digests() -> None:
    other_seed = load_part(get_model_spec(TINY), [2], 0, None, 8, "cpu").network
    assert len({digest(), digest(cuts=(1,)), other_seed}) == 3


def test_other_weights_have_other_digests(tmp_path: Path) -> None:
    """Also of a part whose own weights are the same, and of a file that is replaced by one of the same size."""
    path = tmp_path / "model.safetensors"
    state = TinyNetwork().state_dict()
    save_file(state, path)
    first = digest(weights=path, index=0)
    copy = tmp_path / "copy.safetensors"
    save_file(state, copy)
    assert digest(weights=copy, index=1) == first
    state["last.bias"] = state["last.bias"] + 1
    save_file(state, path)
    os.utime(path, ns=(0, 0))
    assert digest(weights=path, index=0) != first


def test_activations_of_another_network_are_refused() -> None:
    check_network({}, "a", "tail")
    check_network({NETWORK_KEY: "a"}, "a", "tail")
    with raises_error(WireError, "OtherNetwork", match="network b, stage 'tail' has a: all stages need the same code"):
        check_network({NETWORK_KEY: "b"}, "a", "tail")
