"""What every test gets: one torch thread, so that tests on a small machine do not fight for cores; `--long`."""

import os

import pytest

# Read by torch's OpenMP when it is first imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="tests/soak in its long form, as docs/operations.md quotes it: make soak"
    )
