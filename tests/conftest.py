"""What every test gets: one torch thread, so that tests on a small machine do not fight for cores; `--long`.

And no monitor: what tests do is not to stand among what one of this machine keeps.
"""

import os
import tempfile
from pathlib import Path

import pytest

# Read by torch's OpenMP when it is first imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that wants to be told of events listens at this name or another: tests/support/monitor/fake_monitor.py.
os.environ["SPARSE_MONITOR"] = str(Path(tempfile.gettempdir()) / f"sparse-test-{os.getpid()}.sock")
os.environ.pop("SPARSE_RUN", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="tests/soak in its long form, as docs/operations.md quotes it: make soak"
    )
