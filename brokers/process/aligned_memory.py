"""Memory for received tensors, aligned as torch aligns its own."""

import numpy as np

# Of torch's tensors on a CPU. Kernels round differently on data that is aligned less: they vectorise from the first
# aligned element on.
ALIGNMENT_BYTES = 64


def allocate_aligned(size_bytes: int) -> memoryview:
    """Return a writable buffer at a multiple of `ALIGNMENT_BYTES`; raises `MemoryError`.

    It is uninitialised: no page is touched until bytes arrive, and zero-filling 64 MiB costs more than receiving it.
    """
    memory = np.empty(size_bytes + ALIGNMENT_BYTES - 1, np.uint8)
    begin = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[begin : begin + size_bytes].data
