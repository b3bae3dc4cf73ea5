"""What the long tests share: processes and brokers, whether to take long, and a way to print their figures."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.pipeline.conftest import _box, _broker, _embedded  # noqa: F401 - fixtures
from tests.support.environment.external_programs import need

Tell = Callable[[str], None]


@pytest.fixture(name="long")
def _long(request: pytest.FixtureRequest) -> bool:
    """Whether this is `make soak`."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(name="tell")
def _tell(capsys: pytest.CaptureFixture[str]) -> Tell:
    """Print a line of figures, whatever pytest captures; tests that run side by side have nowhere to print."""

    def tell(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}", end="", flush=True)

    return tell


@pytest.fixture(scope="module", name="mosquitto")
def _mosquitto() -> None:
    """These tests are about Mosquitto: fail or skip where it is not installed."""
    need("mosquitto")
