"""Fixtures of the soak tests: processes and brokers, the size of a test, and a way to print its figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.pipeline.conftest import _broker, _embedded_broker, _sandbox  # noqa: F401 - fixtures
from tests.support.environment.external_programs import require_dependency

PrintLine = Callable[[str], None]


def sizes(short: Any, slow: Any) -> list[Any]:
    """Parameters of a test: the short size is part of `make test`, the slow one of `make test-slow`."""
    return [pytest.param(short, id="short"), pytest.param(slow, id="slow", marks=pytest.mark.slow)]


@pytest.fixture(name="soak_factor")
def _soak_factor(request: pytest.FixtureRequest) -> int:
    """How many times the usual amount of work: 1, and more in `make soak`."""
    return int(request.config.getoption("--soak-factor"))


@pytest.fixture(name="print_line")
def _print_line(capsys: pytest.CaptureFixture[str]) -> PrintLine:
    """Print a line of figures past pytest's capture; the workers of pytest-xdist have no terminal to print on."""

    def print_line(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}", end="", flush=True)

    return print_line


@pytest.fixture(scope="module", name="require_mosquitto")
def _require_mosquitto() -> None:
    """Skip where Mosquitto is not installed; fail in CI."""
    require_dependency("mosquitto")
