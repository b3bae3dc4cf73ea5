"""Memory that a worker uses again instead of giving it back: a tenth or more of the time of a step with large weights.

The gradient of a convolution's weights is allocated for each micro-batch, megabytes at a time. By default glibc gives
such pieces back to the kernel, and each page of the next one is faulted in and filled with zeros anew: up to 40,000 a
step for the second half of VGG-11. A worker that trains needs the same memory in every step: it may keep it.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Of mallopt(3), as in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30  # the largest power of two that an int has: more than that at the end of the heap is given back


def tune_malloc() -> None:
    """Have this process keep what it frees, and torch ask for large pages. Does nothing where there is no glibc.

    To be called before torch's first tensor. What the environment says of either counts more.
    """
    # torch's own, for pieces of 2 MiB and more: c10/core/CPUAllocator.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has none of this
        return
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        library.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
