"""Memory that a worker keeps for the next step."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.pipelines.processes import PROCESS_TIMEOUT_S

# Pages faulted in while 16 MiB are allocated, filled and freed, again and again.
_PROGRAM = """
import resource, sys, torch
from stages.training.malloc_tuning import tune_malloc

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1] == "kept":
    keep_memory()
for turn in range(20):
    if turn == 10:
        before = faults()
    torch.ones(4 << 20)
    torch.ones(16 << 20)
print(faults() - before)
"""


def _faults(how: str) -> int:
    command = [sys.executable, "-c", _PROGRAM, how]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PROCESS_TIMEOUT_S)
    return int(run.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is meant")
def test_what_is_freed_is_used_again_without_faulting_it_in() -> None:
    assert _faults("kept") * 100 < _faults("given back")
