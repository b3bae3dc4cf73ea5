"""What every test gets: one torch thread, so that tests on a small machine do not fight for cores."""

import os

# Read by torch's OpenMP when it is first imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
