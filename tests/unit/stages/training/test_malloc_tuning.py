"""`tune_malloc`: freed memory is reused without page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.pipelines.processes import PROCESS_TIMEOUT_S

# A separate process, because the setting is global. It prints the page faults of allocating, filling and freeing
# 64 MiB ten times, before and after.
_PROGRAM = """
import ctypes, resource
from stages.training.malloc_tuning import tune_malloc

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p

def count_page_faults():
    for repetition in range(20):
        if repetition == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        address = ctypes.c_void_p(library.malloc(64 << 20))
        ctypes.memset(address, 1, 64 << 20)
        library.free(address)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(count_page_faults())
tune_malloc()
print(count_page_faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the settings are those of glibc")
def test_freed_memory_is_reused_without_page_faults() -> None:
    command = [sys.executable, "-c", _PROGRAM]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PROCESS_TIMEOUT_S)
    default, tuned = map(int, result.stdout.split())
    assert tuned * 100 < default
