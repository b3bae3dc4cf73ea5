"""What the long tests share: processes and brokers, whether to take is_long_run, and a way to print their figures."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.pipeline.conftest import _broker, _embedded_broker, _sandbox  # noqa: F401 - fixtures
from tests.support.environment.external_programs import require_dependency

PrintLine = Callable[[str], None]


@pytest.fixture(name="is_long_run")
def _is_long_run(request: pytest.FixtureRequest) -> bool:
    """Whether this is `make soak`."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(name="print_line")
def _print_line(capsys: pytest.CaptureFixture[str]) -> PrintLine:
    """Print a line of figures, whatever pytest captures; tests that run side by side have nowhere to print."""

    def print_line(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}", end="", flush=True)

    return print_line


@pytest.fixture(scope="module", name="require_mosquitto")
def _require_mosquitto() -> None:
    """These tests are about Mosquitto: fail or skip where it is not installed."""
    require_dependency("mosquitto")
