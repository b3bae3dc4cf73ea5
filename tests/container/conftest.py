"""The image, built once, and the compose project, up once; all of it gone when the tests are done."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.environment.container_engine import ComposeProject, require_container_engine
from tests.support.environment.external_programs import require_dependency
from tests.support.environment.image import IMAGE_TAG, build_image
from tests.support.pipelines.mqtt_camera import MqttCamera

ENGINE_FIXTURES = {"image", "address"}  # the fixtures that need an engine; all others are made of them
# What can be had without the images of InfluxDB, Chronograf and Grafana, which stand in a profile of their own.
COMPOSE_SERVICES = ("broker", "gateway", "head", "body", "tail", "monitor")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Say once what is left out where no engine runs: of skips in a fixture pytest would list each."""
    if isinstance(item, pytest.Function) and not ENGINE_FIXTURES.isdisjoint(item.fixturenames):
        require_container_engine()


@pytest.fixture(scope="session", name="image")
def _image() -> str:
    """The image of this checkout; `.ci/run` has most of it in the engine's cache by now."""
    build_image()
    return IMAGE_TAG


@pytest.fixture(scope="session", name="photograph")
def _photograph() -> Path:
    """A dog, a bicycle and a car, with which the authors of the network show it."""
    return require_dependency("darknet-files") / "data" / "dog.jpg"


@pytest.fixture(scope="module", name="compose")
def _compose(image: str) -> Iterator[ComposeProject]:
    assert image
    compose = ComposeProject(f"sparse-test-{uuid.uuid4().hex[:8]}")
    try:
        compose.up(*COMPOSE_SERVICES)
        yield compose
    finally:
        compose("down", "--volumes", "--timeout", "1")


@pytest.fixture(name="door")
def _camera(compose: ComposeProject) -> Iterator[MqttCamera]:
    door = MqttCamera(compose.broker_port)
    yield door
    door.close()
