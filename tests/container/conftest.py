"""Fixtures of the container tests: the image, built once, and the compose project, started once for each file."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.environment.container_engine import ComposeProject, require_container_engine
from tests.support.environment.external_programs import require_dependency
from tests.support.environment.image import IMAGE_TAG, build_image
from tests.support.pipelines.mqtt_camera import MqttCamera

# All services but InfluxDB, Chronograf and Grafana, which are in a separate profile and need further images.
COMPOSE_SERVICES = ("broker", "gateway", "head", "body", "tail", "monitor")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip before any fixture is set up where no engine runs: pytest reports equal reasons in one line."""
    require_container_engine()


@pytest.fixture(scope="session", name="image")
def _image() -> str:
    """The tag of the image of this checkout; `.ci/run` has filled the engine's build cache."""
    build_image()
    return IMAGE_TAG


@pytest.fixture(scope="session", name="photograph")
def _photograph() -> Path:
    """Darknet's example picture: a dog, a bicycle and a car."""
    return require_dependency("darknet-files") / "data" / "dog.jpg"


@pytest.fixture(scope="module", name="compose")
def _compose(image: str) -> Iterator[ComposeProject]:
    compose = ComposeProject(f"sparse-test-{uuid.uuid4().hex[:8]}")
    try:
        compose.up(*COMPOSE_SERVICES)
        yield compose
    finally:
        compose("down", "--volumes", "--timeout", "1")


@pytest.fixture(name="camera")
def _camera(compose: ComposeProject) -> Iterator[MqttCamera]:
    camera = MqttCamera(compose.broker_port)
    yield camera
    camera.close()
