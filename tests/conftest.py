"""Settings of all tests: one thread for torch, no monitor of this machine, the fork server, and `--soak-factor`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pipelines.fork_server import OWNER_VARIABLE, SOCKET_VARIABLE
from tests.support.pipelines.processes import ProcessSandbox, process_sandbox

# Read by OpenMP when torch is first imported, here and in the processes that tests start: the tests that run side by
# side share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No monitor listens there: telemetry of tests is not for the monitor of this machine.
os.environ["SPARSE_MONITOR"] = str(Path(tempfile.gettempdir()) / f"sparse-test-{os.getpid()}.sock")
os.environ.pop("SPARSE_RUN", None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak-factor", type=int, default=1, help="multiply the work of the slow sizes of tests/soak; see `make soak`"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the fork server's socket, for this process and those of pytest-xdist that it starts."""
    if not hasattr(config, "workerinput"):
        os.environ[SOCKET_VARIABLE] = str(Path(tempfile.mkdtemp(prefix="sparse-tests-", dir="/tmp")) / "fork")
        os.environ[OWNER_VARIABLE] = str(os.getpid())


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(Path(os.environ[SOCKET_VARIABLE]).parent, ignore_errors=True)


@pytest.fixture(name="sandbox")
def _sandbox(tmp_path: Path) -> Iterator[ProcessSandbox]:
    with process_sandbox(tmp_path) as sandbox:
        yield sandbox
