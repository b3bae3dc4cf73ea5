"""The store's contract with an InfluxDB 2: a server that the environment names, or a container.

SPARSE_TEST_INFLUX2_URL, _ORG, _BUCKET and _TOKEN name a bucket that the tests may fill. Debian has no package of
InfluxDB 2: without either the tests are skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from monitor.errors import BadStore
from monitor.points.points import TelemetryPoint
from monitor.points.schema import MEASUREMENTS
from monitor.stores.influx.config import InfluxTarget
from monitor.stores.influx.store import InfluxReader, InfluxStore
from tests.contract.monitor.test_stores import NOW_NS, full_point
from tests.support.pipelines.processes import eventually

IMAGE = "influxdb:2.7"
_PULL_TIMEOUT_S = 60


@pytest.fixture(scope="module")
def target() -> Iterator[InfluxTarget]:
    setting = {name: os.environ.get(f"SPARSE_TEST_INFLUX2_{name}", "") for name in ("URL", "ORG", "BUCKET", "TOKEN")}
    if setting["URL"]:
        org, bucket = setting["ORG"] or "sparse", setting["BUCKET"] or "sparse"
        yield InfluxTarget(setting["URL"].rstrip("/"), org, bucket, setting["TOKEN"])
        return
    if problem := _image_problem():
        pytest.skip(f"no InfluxDB 2: SPARSE_TEST_INFLUX2_URL is not set, and {problem}")
    from testcontainers.influxdb2 import InfluxDb2Container

    token = "a-token-for-tests"
    container = InfluxDb2Container(
        IMAGE, init_mode="setup", username="sparse", password="for-tests-only", org_name="sparse", bucket="sparse",
        admin_token=token,
    )  # fmt: skip
    with container:
        yield InfluxTarget(container.get_url(), token=token)


def _image_problem() -> str:
    """Why a container cannot be started; empty if it can."""
    docker = shutil.which("docker")
    if docker is None:
        return "docker is not installed"
    for command in (["image", "inspect", IMAGE], ["pull", "--quiet", IMAGE]):
        try:
            done = subprocess.run(
                [docker, *command], capture_output=True, text=True, timeout=_PULL_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return f"{IMAGE} was not pulled within {_PULL_TIMEOUT_S} s"
        if done.returncode == 0:
            return ""
    return f"{IMAGE} cannot be pulled: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"


def test_every_measurement_is_read_back(target: InfluxTarget, tmp_path: Path) -> None:
    run = uuid.uuid4().hex
    shift_ns = time.time_ns() % 1_000_000_000
    points = {
        name: [replace(full_point(known, number, run=run), time_ns=NOW_NS + shift_ns + number) for number in (1, 2, 3)]
        for name, known in MEASUREMENTS.items()
    }
    store = InfluxStore(target, tmp_path / "spool")
    store.check()
    store.write([point for each in points.values() for point in each])
    eventually("all points to be accepted", lambda: not store.waiting)
    store.close()
    assert store.dropped == 0
    reader = InfluxReader(target)
    for name, expected in points.items():
        assert reader.points(name, run) == expected
    assert run in reader.runs()


def test_wrong_token_and_missing_bucket_raise_bad_store(target: InfluxTarget, tmp_path: Path) -> None:
    for wrong, problem in [
        (replace(target, token="wrong"), "the token is not accepted"),
        (replace(target, bucket=uuid.uuid4().hex), "not found"),
    ]:
        store = InfluxStore(wrong, tmp_path / "spool")
        with pytest.raises(BadStore, match=problem):
            store.check()
        store.write([TelemetryPoint("batch", time.time_ns(), {}, {"tasks": 1})])
        store.close()
        assert (store.waiting > 0, store.dropped) == (True, 0)
